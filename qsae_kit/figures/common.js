// Shared by every page and widget. Text reaches the page through textContent alone.

/** An element with a class, text and attributes. */
function make(tag, className = "", text = null, attributes = {}) {
  const e = document.createElement(tag);
  if (className) e.className = className;
  if (text !== null) e.textContent = text;
  for (const [name, value] of Object.entries(attributes)) e.setAttribute(name, value);
  return e;
}

/** Invisible characters get a visible sign, so that two different tokens never look alike. */
const SIGNS = { "\n": "\u23ce", "\r": "\u240d", "\t": "\u21e5" };
function visible(text) {
  return text.replace(/[\u0000-\u001f\u007f-\u009f\u00ad\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]/g, (c) =>
    SIGNS[c] || "\u27e8" + c.codePointAt(0).toString(16).padStart(4, "0") + "\u27e9");
}

/** A number in three significant digits. */
function number(x) {
  if (x === null || x === undefined || Number.isNaN(x)) return "\u2013";
  if (x === 0) return "0"; // not -0
  if (Number.isInteger(x)) return x.toLocaleString("en");
  const a = Math.abs(x);
  return a !== 0 && (a < 1e-3 || a >= 1e5) ? x.toExponential(2) : String(+x.toPrecision(3));
}
const percent = (x) => (x === 0 ? "0 %" : `${number(100 * x)} %`);

/** Shades a token: orange by its share of the largest activation, blue below nothing; letters are black where the shade is
 *  strong, and as `--qsae-mid` has them where it is neither strong nor weak, which depends on what is behind it. */
function shade(span, act, largest) {
  const share = largest > 0 ? Math.min(1, Math.abs(act) / largest) : 0;
  const color = act < 0 ? "86,180,233" : "230,159,0";
  span.style.backgroundColor = share > 0 ? `rgba(${color},${(0.12 + 0.88 * share).toFixed(3)})` : "";
  span.style.color = share > 0.6 ? "#000" : share > 0.35 ? "var(--qsae-mid)" : "";
}

/** The element that holds a widget. JupyterLab's shortcuts of a single key, of which one deletes the cell, stop at it;
 *  those with Ctrl, Alt or the like, and Shift+Enter, are the notebook's still. */
function rootOf(el, name) {
  const root = make("div", `qsae ${name}`);
  root.addEventListener("keydown", (e) => {
    const theirs = e.ctrlKey || e.metaKey || e.altKey || (e.shiftKey && e.key === "Enter");
    if (!theirs) e.stopPropagation();
  });
  el.append(root);
  return root;
}

/** Tokens in a line: focus it and walk with the arrows, or point; `show(i)` is told where one is. A click (or Enter)
 *  pins a token, `pinned(i)` is told which, and another one or Escape frees it. */
function tokenLine(tokens, acts, largest, { at = -1, pin = -1, show = () => {}, pinned = () => {}, label = "tokens" } = {}) {
  const line = make("div", "toks", null, { tabindex: "0", role: "listbox", "aria-label": label });
  const spans = tokens.map((text, i) => {
    const span = make("span", i === at ? "at" : "", visible(text), { role: "option", "aria-label": `${visible(text)} ${number(acts[i] || 0)}` });
    if (text.includes("\n")) span.append("\n");
    shade(span, acts[i] || 0, largest);
    span.dataset.i = i;
    line.append(span);
    return span;
  });
  let on = -1;
  const go = (i) => {
    if (on >= 0) { spans[on].classList.remove("on"); spans[on].setAttribute("aria-selected", "false"); }
    on = i;
    if (i >= 0) { spans[i].classList.add("on"); spans[i].setAttribute("aria-selected", "true"); }
    show(i);
  };
  let held = -1, pressed = false; // pressed: the focus to come is the pointer's, which has chosen a token
  const hold = (i) => {
    if (held >= 0) spans[held].classList.remove("pin");
    held = i;
    if (i >= 0) { spans[i].classList.add("pin"); go(i); }
    pinned(i);
  };
  line.addEventListener("pointerover", (e) => { const i = e.target.dataset?.i; if (i !== undefined && held < 0) go(+i); });
  line.addEventListener("pointerleave", () => { pressed = false; if (held < 0) go(-1); });
  line.addEventListener("pointerdown", () => { pressed = true; });
  line.addEventListener("click", (e) => {
    pressed = false;
    const i = e.target.dataset?.i;
    if (i !== undefined) hold(+i === held ? -1 : +i);
  });
  line.addEventListener("focus", () => { if (!pressed) go(held >= 0 ? held : at >= 0 ? at : 0); });
  line.addEventListener("blur", () => { if (held < 0) go(-1); });
  line.addEventListener("keydown", (e) => {
    const step = { ArrowRight: 1, ArrowLeft: -1, Home: -1e9, End: 1e9 }[e.key];
    if (e.key === "Escape") hold(-1);
    else if (e.key === "Enter" && on >= 0) hold(on === held ? -1 : on);
    else if (step === undefined) return;
    else {
      const to = Math.max(0, Math.min(spans.length - 1, on + step));
      if (held >= 0) hold(to); else go(to);
    }
    e.preventDefault();
    e.stopPropagation();
  });
  if (pin >= 0 && pin < spans.length) { held = pin; spans[pin].classList.add("pin"); }
  return line;
}

/** A dialogue, its tokens coloured by a feature that is chosen: by how strongly it fires, or by its part in a score. data:
 *  tokens; at, the token that is asked about; features with name, acts and parts at each token, largest and what that is of;
 *  largest_part. `chosen(i)` is told which feature; returns the element, and what chooses one. */
function dialogueView(data, title, chosen = () => {}) {
  const root = make("div", "dialogue"), bar = make("div", "bar choices"), choice = make("select"), quantity = make("select");
  const held = make("div"), told = make("p", "soft told", "", { role: "status" }), scale = make("p", "soft scale");
  data.features.forEach((one, i) => choice.append(make("option", "", `${i + 1}. ${visible(one.name)}`, { value: i })));
  for (const [value, text] of [["acts", "how strongly it fires"], ["parts", "what it does to the score"]])
    quantity.append(make("option", "", text, { value }));
  for (const [text, control] of [["Feature", choice], ["Colour", quantity]]) {
    const label = make("label", "", `${text} `);
    control.dataset.offline = "yes";
    label.append(control);
    bar.append(label);
  }
  root.append(bar, held, told, scale);
  let pin = -1, on = data.at;
  const nothing = { name: "no feature", acts: [], parts: [], largest: 0, of: "" };
  const say = () => {
    const one = data.features[+choice.value] || nothing, last = on === data.at ? ", the token that is asked about" : "";
    told.textContent = `token ${on} \u201c${visible(data.tokens[on])}\u201d${last}: activation ${number(one.acts[on] || 0)}, `
      + `part in the score ${number(one.parts[on] || 0)} nats. Walk with the arrows; Enter keeps a token, Escape lets it go.`;
  };
  const draw = () => {
    const one = data.features[+choice.value] || nothing, acts = quantity.value === "acts";
    const largest = acts ? one.largest : data.largest_part, former = held.firstChild;
    const top = former?.clientHeight ? former.scrollTop : null; // null: it was never seen
    held.replaceChildren(tokenLine(data.tokens, acts ? one.acts : one.parts, largest, {
      at: data.at, pin, pinned: (i) => { pin = i; }, show: (i) => { if (i >= 0) { on = i; say(); } },
      label: `${title}, coloured by ${visible(one.name)}`,
    }));
    const line = held.firstChild, asked = line.querySelector(".at");
    line.scrollTop = top ?? (asked ? asked.offsetTop - line.offsetTop - line.clientHeight / 2 : 0);
    scale.textContent = acts
      ? `Coloured by ${visible(one.name)}: none is 0, full orange ${number(largest)}, ${one.of}, in units of the site's activations. The token asked about is underlined.`
      : `Coloured by ${visible(one.name)}: none is 0, full orange +${number(largest)} nats and full blue \u2212${number(largest)} nats, on one scale for all features. `
        + "The token asked about is underlined.";
    say();
  };
  choice.onchange = () => { draw(); chosen(+choice.value); };
  quantity.onchange = draw;
  draw();
  return { root, draw, choose(i) { if (+choice.value !== i) { choice.value = i; draw(); } } };
}

/** Bars of a histogram, as an SVG with a title, axis ends and a text for those who do not see it. */
function histogram(counts, edges, { width = 300, height = 96, unit = "" } = {}) {
  const NS = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(NS, "svg");
  const first = counts.findIndex((c) => c > 0), last = counts.length - 1 - [...counts].reverse().findIndex((c) => c > 0);
  const put = (tag, attributes, text) => {
    const e = document.createElementNS(NS, tag);
    for (const [name, value] of Object.entries(attributes)) e.setAttribute(name, value);
    if (text !== undefined) e.textContent = text;
    svg.append(e);
    return e;
  };
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.setAttribute("width", width);
  svg.setAttribute("height", height);
  svg.setAttribute("role", "img");
  if (first < 0) {
    svg.setAttribute("aria-label", "never fired");
    put("text", { x: 4, y: 20 }, "never fired");
    return svg;
  }
  const shown = counts.slice(first, last + 1), most = Math.max(...shown), w = (width - 8) / shown.length, base = height - 30;
  const total = counts.reduce((a, b) => a + b, 0);
  svg.setAttribute("aria-label", `${total} firing tokens, activations from ${number(edges[first])} to ${number(edges[last + 1])}`);
  shown.forEach((count, i) => {
    const h = (count / most) * (base - 14);
    const bar = put("rect", { x: 4 + i * w, y: base - h, width: Math.max(1, w - 1), height: h });
    const tip = document.createElementNS(NS, "title");
    tip.textContent = `${number(edges[first + i])} to ${number(edges[first + i + 1])}: ${count.toLocaleString("en")} tokens`;
    bar.append(tip);
  });
  put("line", { class: "axis", x1: 4, x2: width - 4, y1: base, y2: base });
  put("text", { x: 4, y: 10 }, `${most.toLocaleString("en")} tokens`);
  put("text", { x: 4, y: base + 13 }, number(edges[first]));
  put("text", { x: width - 4, y: base + 13, "text-anchor": "end" }, number(edges[last + 1]));
  put("text", { x: width / 2, y: base + 26, "text-anchor": "middle" }, `activation${unit} (each bar \u00d7 1.19)`);
  return svg;
}

/** Listens to a model until the view goes; tells when the kernel does. Returns what to call at the end. */
function listen(model, root, handlers) {
  for (const [event, handler] of Object.entries(handlers)) model.on(event, handler);
  return () => { for (const [event, handler] of Object.entries(handlers)) model.off(event, handler); };
}

/** Keeps JupyterLab's shortcuts away from what is typed here. */
function ownKeys(element) {
  for (const type of ["keydown", "keypress", "keyup"]) element.addEventListener(type, (e) => e.stopPropagation());
}

/** Whether the kernel is busy, as the front end itself says; not known on a page of its own. */
function isBusy(model) {
  const kernel = model.widget_manager?.kernel;
  return Boolean(kernel) && !kernel.isDisposed && kernel.connectionStatus === "connected" && kernel.status === "busy";
}

const GONE = "The kernel does not answer: what is shown stays readable, but nothing new can be asked for. "
  + "Start the kernel and run the cell again.";
const WAITING = "Waiting: the kernel is busy; what was asked for comes when it is done.";

/** Waits for an answer from Python. Without one the page says, after `soon` seconds, that the kernel is busy, or, after
 *  `late` seconds without one, that the kernel is gone; it stays readable. */
function watchdog(root, model, soon = 2, late = 8) {
  const notice = make("div", "", "", { role: "alert" });
  let timer = null;
  const look = (waited, next) => {
    const busy = isBusy(model);
    if (busy || waited >= late) {
      notice.className = busy ? "waits" : "gone";
      notice.textContent = busy ? WAITING : GONE;
      if (!notice.isConnected) root.prepend(notice);
    }
    timer = setTimeout(() => look(waited + next, 1), next * 1000);
  };
  const stop = () => { clearTimeout(timer); timer = null; notice.remove(); };
  return { asked() { if (timer === null) timer = setTimeout(() => look(soon, late - soon), soon * 1000); }, answered: stop, stop };
}

/** A button that saves the widget as a page of its own, which needs neither kernel nor network. Returns what to call at the end. */
function saver(model, root, dog) {
  const button = make("button", "save", "Save page", { title: "A page that needs neither kernel nor network" });
  const saved = (message) => {
    if (message.op !== "saved") return;
    dog.answered();
    const link = make("a"), address = URL.createObjectURL(new Blob([message.text], { type: "text/html" }));
    Object.assign(link, { href: address, download: message.name });
    link.click();
    setTimeout(() => URL.revokeObjectURL(address), 1000);
  };
  button.onclick = () => { dog.asked(); model.send({ op: "save" }); };
  root.append(button);
  return listen(model, root, { "msg:custom": saved });
}
