// Sliders for features at the left, the answers without and with them at the right.
const UNIT = { add: "median norms", clamp: "median norms", scale: "times", ablate: "", edit: "times" };
const SETTINGS = ["controls", "policy", "max_new_tokens", "sample", "seed", "thinking"];
const FULL = 2; // nats of change that a token is shaded fully at
const SEEN = 0.005; // nats below which nothing is said to change
const RANGE = { add: [-3, 3, 0.05], clamp: [0, 3, 0.05], scale: [0, 10, 0.1], ablate: [0, 1, 1], edit: [-2, 2, 0.05] };

function render({ model, el }) {
  const root = rootOf(el, "qsae-lab");
  const dog = watchdog(root, model);
  const send = (message) => { dog.asked(); model.send(message); };
  const set = (values) => { for (const [name, value] of Object.entries(values)) model.set(name, value); model.save_changes(); };
  let asked = 0, shown = 0; // runs asked for here, and the number of the one that is on the screen

  // --- what is asked, and how
  const prompt = make("textarea", "", null, { rows: "3", spellcheck: "false", "aria-label": "prompt: a question, or lines that begin with user: or assistant:" });
  prompt.style.width = "100%";
  const settings = make("div", "bar");
  const pick = (label, names) => {
    const select = make("select"), around = make("label", "", label + " ");
    names.forEach((name) => { const o = make("option", "", visible(name)); o.value = name; select.append(o); });
    around.append(select);
    return [around, select];
  };
  const tick = (label) => {
    const box = make("input", "", null, { type: "checkbox" }), around = make("label");
    around.append(box, label);
    return [around, box];
  };
  const count = (label, least) => {
    const box = make("input", "", null, { type: "number", min: String(least), step: "1" }), around = make("label", "", label + " ");
    box.style.width = "5.5em";
    around.append(box);
    return [around, box];
  };
  const [policyAround, policy] = pick("steered tokens", model.get("policies"));
  const [lengthAround, length] = count("tokens at most", 1);
  const [sampleAround, sample] = tick("sample");
  const [seedAround, seed] = count("seed", 0);
  const [thinkAround, think] = tick("thinking");
  const run = make("button", "", "Run", { type: "button" }), stop = make("button", "", "Stop", { type: "button" });
  settings.append(policyAround, lengthAround, sampleAround, seedAround);
  if (model.get("can_think")) settings.append(thinkAround);
  const buttons = make("span", "bar");
  buttons.append(run, stop);
  settings.append(buttons);

  // --- sliders
  const sliders = make("div", "sliders", null, { role: "group", "aria-label": "features" });
  const finder = make("div", "bar"), sites = make("select", "", null, { "aria-label": "SAE to search" });
  model.get("sites").forEach((name, i) => { const o = make("option", "", visible(name)); o.value = i; sites.append(o); });
  const words = make("input", "grow", null, { type: "search", "aria-label": "find features" });
  finder.append(sites, words);
  const results = make("ul", "list found", null, { "aria-label": "features found", tabindex: "0" });
  const presets = make("div", "bar"), name = make("input", "", null, { type: "text", placeholder: "name", "aria-label": "name of the preset" });
  const keep = make("button", "", "Keep as preset", { type: "button" });
  const [takeAround, take] = pick("preset", []);
  const study = make("button", "", "Send to study", { type: "button" });
  const undo = make("button", "", "Undo", { type: "button", "aria-label": "undo the last change of the sliders" });
  const zero = make("datalist", "", null, { id: `zero-${Math.random().toString(36).slice(2)}` });
  zero.append(make("option", "", null, { value: "0" }));
  const stale = make("p", "stale", "These answers are of another setting or prompt; press Run.", { role: "status" });
  stale.hidden = true;
  name.style.width = "9em";
  presets.append(name, keep, takeAround, study);

  // --- answers
  const [colorAround, color] = pick("shade answers by", ["change of log-probability", "feature activation", "nothing"]);
  color.dataset.offline = "yes";
  const panes = make("div", "panes"), body = {};
  for (const [key, title] of [["base", "Without"], ["steered", "With the features"]]) {
    const pane = make("section", "pane", null, { "aria-label": title });
    body[key] = make("div", "toks");
    pane.append(make("h3", "", title), body[key]);
    panes.append(pane);
  }
  const legend = make("p", "soft", "", { "aria-live": "polite" }), history = make("ol", "list history", null, { "aria-label": "tries", tabindex: "0" });
  const status = make("div", "status", "", { role: "status" });
  const search = make("section", "side"), tries = make("section", "side"), both = make("div", "lab");
  search.append(make("h3", "", "Add a feature"), finder, results, presets);
  tries.append(make("h3", "", "Tries"), history);
  both.append(search, tries);
  root.append(prompt, settings, sliders, undo, zero, stale, panes, colorAround, legend, both, status);
  for (const e of [prompt, words, name, length, seed, policy, sites, color, take, sample, think]) ownKeys(e);

  // A message carries the settings that it means: traits may reach Python after it.
  const setting = () => Object.fromEntries(SETTINGS.map((n) => [n, model.get(n)]));
  // What decides on an answer, in one order; the answers say what they are of.
  const key = (s) => JSON.stringify(["prompt", ...SETTINGS].map((n) => s[n]));
  let written = false; // whether other answers are on their way
  const mark = () => {
    const of = model.get("answers").of;
    stale.hidden = !of || written || key(of) === key({ prompt: prompt.value, ...setting() });
    panes.classList.toggle("old", !stale.hidden);
  };
  const go = () => { asked += 1; root.dataset.asked = asked; written = true; mark(); send({ op: "run", prompt: prompt.value, ...setting() }); };
  const past = [];
  const put = (controls) => { past.push(model.get("controls")); set({ controls }); mark(); };
  const changed = (i, values) => put(model.get("controls").map((c, j) => (j === i ? { ...c, ...values } : c)));
  undo.onclick = () => { if (past.length) { set({ controls: past.pop() }); drawSliders(); go(); } };
  let drawn = "", parts = []; // the rows that there are, and what of them a strength changes
  function drawSliders() {
    const controls = model.get("controls"), held = document.activeElement;
    undo.disabled = !past.length;
    const rows = JSON.stringify(controls.map((c) => [c.site, c.feature, c.name, c.action]));
    if (rows === drawn && controls.length) { // in place: a click may be on its way to one of them
      controls.forEach((c, i) => {
        const p = parts[i];
        p.on.checked = c.on;
        p.slide.value = c.strength;
        if (document.activeElement !== p.value) p.value.value = +c.strength;
      });
      return;
    }
    drawn = rows;
    parts = [];
    const at = sliders.contains(held) ? [held.closest(".slider")?.dataset.i, held.dataset.part] : null;
    sliders.replaceChildren(...controls.map((c, i) => {
      const whole = c.action === "edit", row = make("div", "slider"), what = whole ? "the edit" : `feature ${c.feature}`;
      row.dataset.i = i;
      const on = make("input", "", null, { type: "checkbox", "aria-label": `${what} on` });
      on.checked = c.on;
      on.dataset.part = "on";
      on.onchange = () => { changed(i, { on: on.checked }); go(); };
      const told = whole ? visible(c.name) : `${c.feature}` + (c.name ? ` \u00b7 ${visible(c.name).slice(0, 60)}` : "");
      const leads = model.get("linked") && !whole, site = visible(model.get("sites")[c.site]);
      const title = make(leads ? "button" : "span", "grow tok", told, { title: leads ? `${site}: its page in the explorer` : whole ? told : site });
      if (leads) { title.type = "button"; title.dataset.part = "title"; title.onclick = () => send({ op: "look", site: c.site, feature: c.feature }); }
      const action = make("select", "", null, { "aria-label": `what to do with ${what}` });
      (whole ? ["edit"] : model.get("actions")).forEach((a) => { const o = make("option", "", a); o.value = a; action.append(o); });
      action.disabled = whole;
      action.value = c.action;
      action.dataset.part = "action";
      action.onchange = () => { changed(i, { action: action.value, strength: action.value === "scale" ? 1 : 0 }); go(); };
      const [lowest, most, step] = RANGE[c.action] || RANGE.add, least = c.least ?? lowest;
      const slide = make("input", "", null, { type: "range", min: least, max: most, step, "aria-label": `strength of ${what}` });
      slide.value = c.strength;
      slide.disabled = c.action === "ablate";
      slide.dataset.part = "slide";
      slide.setAttribute("list", zero.id);
      const value = make("input", "num", null, { type: "number", min: least, max: most, step, "aria-label": `strength of ${what} as a number` });
      value.value = +c.strength;
      value.disabled = slide.disabled;
      value.dataset.part = "value";
      const to = (text) => { changed(i, { strength: Math.max(least, Math.min(most, +text || 0)) }); go(); };
      slide.oninput = () => { value.value = +slide.value; };
      slide.onchange = () => to(slide.value);
      value.onchange = () => to(value.value);
      const unit = make("span", "soft", UNIT[c.action] ?? "");
      const reset = make("button", "", "0", { type: "button", "aria-label": `reset ${what}`, title: "back to where it changes nothing" });
      reset.textContent = c.action === "scale" ? "1" : "0";
      reset.disabled = slide.disabled;
      reset.dataset.part = "reset";
      reset.onclick = () => to(reset.textContent);
      const away = make("button", "", "\u00d7", { type: "button", "aria-label": `take ${what} away` });
      away.dataset.part = "away";
      away.onclick = () => { put(model.get("controls").filter((_, j) => j !== i)); go(); };
      for (const e of [on, action, slide, value]) ownKeys(e);
      row.append(on, title, action, slide, value, unit, reset, away);
      parts.push({ on, slide, value });
      return row;
    }));
    if (!controls.length) sliders.append(make("p", "soft", "No feature yet: find one below and add it."));
    if (at) sliders.querySelector(`[data-i="${at[0]}"] [data-part="${at[1]}"]`)?.focus();
  }
  function drawFound() {
    dog.answered();
    const found = model.get("found"), features = found.features || [];
    results.replaceChildren(...features.map(([id, label]) => {
      const item = make("li"), add = make("button", "", `${id}` + (label ? ` \u00b7 ${visible(label).slice(0, 60)}` : ""), { type: "button", "aria-label": `add feature ${id}` });
      add.onclick = () => send({ op: "add", site: found.site, feature: id });
      item.append(add);
      return item;
    }));
    if (!features.length) results.append(make("li", "soft", found.text ? `No feature is found for \u201c${visible(found.text).slice(0, 60)}\u201d.` : "Write a prompt, or a feature's number."));
    hint();
  }
  function hint() {
    words.placeholder = model.get("indexed")[+sites.value] ? "words or a feature's number" : "a feature's number (words need an index)";
  }
  function signed(span, value, largest) {
    const share = largest > 0 ? Math.min(1, Math.abs(value) / largest) : 0, up = value > 0;
    span.style.backgroundColor = share > 0.02 ? `rgba(${up ? "230,159,0" : "86,180,233"},${(0.1 + 0.8 * share).toFixed(3)})` : "";
    span.style.color = share > 0.35 ? "#000" : "";
  }
  function drawAnswers() {
    const a = model.get("answers");
    if (!a.number || a.number < shown) return;
    shown = a.number;
    dog.answered();
    const by = color.value, field = by === "feature activation" ? "activation" : "change";
    const most = Math.max(0, ...["base", "steered"].flatMap((k) => a[k][field].map((v) => Math.abs(v ?? 0))));
    for (const key of ["base", "steered"]) {
      const part = a[key], values = part.tokens.map((_, j) => (by === "nothing" ? 0 : part[field][j] ?? 0));
      const line = tokenLine(part.tokens, values, field === "activation" ? most : 0, {
        label: `answer ${key === "base" ? "without" : "with"} the features`,
        show: (i) => { if (i >= 0) legend.textContent = `\u201c${visible(part.tokens[i])}\u201d: log-probability ${number(part.logprob[i])}, change by the features ${number(part.change[i])}, activation ${number(part.activation[i])}`; },
      });
      if (by === "change of log-probability") line.querySelectorAll("span").forEach((span, i) => signed(span, values[i], FULL));
      body[key].replaceWith(line);
      body[key] = line;
      line.dataset.text = part.text;
    }
    legend.textContent = by === "change of log-probability"
      ? (most < SEEN ? `The features change no token's log-probability by more than ${SEEN} nats.`
        : `Orange: likelier with the features than without; blue: less likely; fully coloured from ${FULL} nats on (largest change ${number(most)} nats).`)
      : by === "feature activation" ? (most > 0 ? `Orange: activation of the first feature (largest ${number(most)}).` : "The first feature does not fire here.") : "";
    root.dataset.number = a.number;
    mark();
  }
  function write(message) {
    if (message.number < shown) return; // of an older run
    dog.answered();
    if (message.number > shown) { shown = message.number; root.dataset.first = performance.now(); legend.textContent = ""; }
    body[message.name].textContent = visible(message.text);
    body[message.name].dataset.text = message.text;
  }
  function drawHistory() {
    history.replaceChildren(...model.get("history").map(([setting, answer]) => {
      const item = make("li");
      item.append(make("span", "soft", visible(setting).slice(0, 160)), make("span", "tok", visible(answer).slice(0, 160)));
      return item;
    }));
  }
  function drawPresets() {
    dog.answered();
    const first = make("option", "", "choose\u2026");
    first.value = "";
    take.replaceChildren(first, ...Object.keys(model.get("presets")).map((n) => { const o = make("option", "", visible(n)); o.value = n; return o; }));
  }
  function drawSettings() {
    policy.value = model.get("policy");
    if (document.activeElement !== length) length.value = model.get("max_new_tokens");
    if (document.activeElement !== seed) seed.value = model.get("seed");
    if (document.activeElement !== prompt) prompt.value = model.get("prompt");
    sample.checked = model.get("sample");
    think.checked = model.get("thinking");
    seed.disabled = !sample.checked;
    sites.value = model.get("site");
    stop.disabled = !model.get("running");
    root.dataset.running = model.get("running");
    hint();
    mark();
  }

  let timer = null;
  prompt.oninput = () => { mark(); clearTimeout(timer); timer = setTimeout(() => set({ prompt: prompt.value }), 150); };
  prompt.onkeydown = (e) => { if (e.key === "Enter" && (e.ctrlKey || e.metaKey)) { e.preventDefault(); run.onclick(); } };
  run.onclick = () => { clearTimeout(timer); set({ prompt: prompt.value }); go(); };
  stop.onclick = () => model.send({ op: "stop" });
  policy.onchange = () => { set({ policy: policy.value }); go(); };
  length.onchange = () => { set({ max_new_tokens: Math.max(1, Math.trunc(+length.value) || 1) }); mark(); };
  seed.onchange = () => { set({ seed: Math.max(0, Math.trunc(+seed.value) || 0) }); go(); };
  sample.onchange = () => { set({ sample: sample.checked }); go(); };
  think.onchange = () => { set({ thinking: think.checked }); go(); };
  let waiting = null;
  const find = () => send({ op: "find", site: +sites.value, text: words.value });
  words.oninput = () => { clearTimeout(waiting); waiting = setTimeout(find, 120); };
  sites.onchange = find;
  keep.onclick = () => send({ op: "keep", name: name.value, setting: setting() });
  take.onchange = () => { if (take.value) { send({ op: "take", name: take.value }); } };
  study.onclick = () => send({ op: "study", setting: setting() });
  color.onchange = drawAnswers;

  const unsaved = saver(model, root, dog), off = listen(model, root, {
    "change:controls": () => { dog.answered(); drawSliders(); mark(); },
    "change:found": drawFound,
    "change:answers": drawAnswers,
    "change:history": drawHistory,
    "change:presets": drawPresets,
    "change:prompt change:policy change:max_new_tokens change:sample change:seed change:thinking change:site change:running": drawSettings,
    "change:status": () => { dog.answered(); status.textContent = model.get("status"); written = written && model.get("running"); mark(); },
    "msg:custom": (message) => {
      if (message.op === "end" && !model.get("running")) { written = false; mark(); }
      if (message.op === "text") { write(message); return; }
      dog.answered();
      if (message.op === "added") { put([...model.get("controls"), message.control]); drawSliders(); }
    },
  });
  drawSettings();
  drawSliders();
  drawFound();
  drawPresets();
  drawAnswers();
  drawHistory();
  return () => { off(); unsaved(); dog.stop(); clearTimeout(timer); clearTimeout(waiting); root.remove(); };
}
export default { render };
