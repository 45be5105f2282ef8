const ROW = 24, BLOCK = 100, CLICK = 300; // pixels, rows, milliseconds
const KINDS = { density: percent, density_user: percent, feature: String };

function render({ model, el }) {
  const root = rootOf(el, "qsae-explorer");
  const dog = watchdog(root, model);

  // --- what is looked for
  const bar = make("div", "bar");
  const field = (text, control) => { const l = make("label", "", text); l.append(control); bar.append(l); return control; };
  const option = (value, text) => { const o = make("option", "", text); o.value = value; return o; };
  const site = field("SAE", make("select"));
  site.append(...model.get("sites").map((name, i) => option(i, visible(name))));
  const mode = field("find", make("select"));
  for (const name of model.get("live") ? ["text", "fires on", "near"] : ["text"]) mode.append(option(name, name));
  const box = make("input", "grow", null, { type: "search", "aria-label": "search features", spellcheck: "false" });
  bar.append(box);
  const info = make("span", "soft", "", { "aria-live": "polite" });
  const chip = make("button", "", "", { type: "button", title: "show all features again" });
  chip.onclick = () => { dog.asked(); model.send({ op: "all", key: "" }); box.focus(); };
  bar.append(info, chip);
  const hints = { text: "words, a feature's number, density<0.01", "fires on": "a text to see what fires on it", near: "a feature's number" };

  // --- the table
  const grid = make("div", "grid", null, { role: "grid", "aria-label": "features" });
  const head = make("div", "head", null, { role: "row" });
  const view = make("div", "view", null, { tabindex: "0", role: "rowgroup", "aria-label": "features: up and down to walk, Enter for the page" });
  const pad = make("div"), empty = make("p", "soft");
  view.append(pad);
  grid.append(head, view);
  const sheet = make("div", "sheet", null, { "aria-label": "the selected feature" });
  const status = make("div", "status", "", { role: "status" });
  root.append(bar, grid, status, sheet);

  let rows = new Map(), asked = new Set(), cursor = 0, timer = null;
  const past = [], ahead = [];
  let walk = () => {}; // switches the buttons that walk the table on and off
  const save = (changes) => {
    const others = Object.entries(changes).filter(([name, value]) => model.get(name) !== value);
    if (!others.length) return; // nothing would be answered
    for (const [name, value] of others) model.set(name, value);
    dog.asked();
    model.save_changes();
  };
  let staying = false; // whether the next order is the same one with another label

  function header() {
    const columns = model.get("columns");
    root.style.setProperty("--cols", columns.map((c) => ({ label: "minmax(6em, 1.6fr)", hint: "minmax(6em, 1.6fr)", top_token: "minmax(8em, 1.2fr)", warnings: "minmax(6em, 1fr)" })[c.name] || "minmax(5.5em, 0.7fr)").join(" "));
    const focused = [...head.children].indexOf(document.activeElement);
    head.replaceChildren(...columns.map((c) => {
      const sorted = model.get("sort_by") === c.name, up = model.get("ascending");
      const b = make("button", isText(c.name) ? "" : "num", visible(c.title) + (sorted ? (up ? " \u25b2" : " \u25bc") : ""),
        { type: "button", role: "columnheader", "aria-sort": sorted ? (up ? "ascending" : "descending") : "none", title: `sort by ${c.title}` });
      b.onclick = () => save({ sort_by: c.name, ascending: sorted ? !up : isText(c.name) || c.name === "feature" });
      return b;
    }));
    if (focused >= 0) head.children[focused]?.focus();
  }
  const isText = (name) => name === "label" || name === "hint" || name === "top_token" || name === "warnings";
  function shown(name, value) {
    if (typeof value === "string") return visible(value);
    return (KINDS[name] || number)(value);
  }
  function draw() {
    const n = model.get("n_rows"), columns = model.get("columns");
    const top = Math.floor(view.scrollTop / ROW), end = Math.min(n, top + Math.ceil(view.clientHeight / ROW) + 1);
    pad.style.height = `${n * ROW}px`;
    empty.hidden = n > 0;
    empty.textContent = nothing();
    info.textContent = `${n.toLocaleString("en")} of ${model.get("n_features").toLocaleString("en")} features`
      + (model.get("n_hidden") ? ` (${model.get("n_hidden").toLocaleString("en")} dead: fired=0)` : "");
    chip.hidden = !model.get("selection");
    chip.textContent = `${visible(model.get("selection"))} \u00d7`;
    grid.setAttribute("aria-rowcount", n);
    const lines = [];
    let missing = false;
    for (let r = top; r < end; r++) {
      const block = rows.get(Math.floor(r / BLOCK));
      if (!block) {
        missing = true;
        const start = Math.floor(r / BLOCK) * BLOCK;
        if (!asked.has(start)) { asked.add(start); dog.asked(); model.send({ op: "rows", start }); }
        continue;
      }
      const row = block[r % BLOCK];
      if (!row) continue;
      const line = make("div", r % 2 ? "row odd" : "row", null, { role: "row", "aria-rowindex": r + 1, "aria-selected": row[0] === model.get("selected") });
      line.style.top = `${r * ROW}px`;
      line.dataset.feature = row[0];
      line.dataset.place = r;
      columns.forEach((c, i) => {
        const cell = make("div", (isText(c.name) ? "" : "num") + (c.name === "top_token" ? " tok" : ""), shown(c.name, row[i]), { role: "gridcell" });
        if (isText(c.name)) cell.title = cell.textContent.slice(0, 500);
        line.append(cell);
      });
      lines.push(line);
    }
    const keep = view.scrollTop;
    view.replaceChildren(pad, empty, ...lines);
    view.scrollTop = keep;
    walk();
    if (!missing) root.dataset.drawn = model.get("version");
  }
  function nothing() {
    const asked = visible(model.get("query")).slice(0, 80), within = model.get("selection") ? ` among the ${visible(model.get("selection"))}` : "";
    const ways = { text: "no label, hint, token or number holds these words, or no feature meets the condition; "
      + "find \u201cfires on\u201d takes a whole text", "fires on": "no feature fires on this text", near: "there is nothing near" };
    return `Nothing is found for \u201c${asked}\u201d${within}: ${ways[model.get("mode")]}.`;
  }
  let wanted = -1; // a place whose row is on its way
  function place(r) {
    const n = model.get("n_rows");
    cursor = Math.max(0, Math.min(n - 1, r));
    if (cursor * ROW < view.scrollTop) view.scrollTop = cursor * ROW;
    if ((cursor + 1) * ROW > view.scrollTop + view.clientHeight) view.scrollTop = (cursor + 1) * ROW - view.clientHeight;
    const row = rowAt(cursor);
    wanted = row ? -1 : cursor;
    if (row) select(row[0]);
    draw();
  }
  const rowAt = (r) => (r < 0 ? null : rows.get(Math.floor(r / BLOCK))?.[r % BLOCK]);
  const placeOf = (feature) => {
    for (const [block, some] of rows) { const i = some.findIndex((row) => row[0] === feature); if (i >= 0) return block * BLOCK + i; }
    return -1;
  };
  function select(feature, remember = true) {
    if (feature === model.get("selected")) return;
    if (remember) { past.push([model.get("site"), model.get("selected")]); ahead.length = 0; }
    save({ selected: feature });
  }
  function travel(from, to) {
    const target = from.pop();
    if (!target) return;
    to.push([model.get("site"), model.get("selected")]);
    if (target[0] === model.get("site")) save({ selected: target[1] });
    else { after = target[1]; save({ site: target[0] }); }
  }
  let after = null; // the feature to go to when the SAE has changed

  // --- the page of a feature
  let trial = ""; // the text that features are tried on, and what came of it
  const tried = make("div");
  function drawTried(message) {
    if (message.feature !== model.get("selected") || message.text !== trial) return;
    const where = make("div", "soft", ""), largest = model.get("page").figures.max;
    const most = Math.max(0, ...message.acts);
    const rest = most > 0 ? `largest here ${number(most)}, ${percent(most / largest)} of its largest anywhere` : "It does not fire on this text.";
    where.textContent = rest;
    tried.replaceChildren(tokenLine(message.tokens, message.acts, Math.max(largest, most), { label: "your text",
      show: (i) => { where.textContent = i < 0 ? rest : `\u201c${visible(message.tokens[i]).slice(0, 60)}\u201d ${number(message.acts[i])}`; } }), where);
    tried.dataset.of = `${model.get("site")}/${message.feature}`;
  }
  function link(feature, text) {
    const b = make("button", "", text, { type: "button", "aria-label": `go to feature ${feature}` });
    b.onclick = () => select(feature);
    b.dataset.offline = `selected:${feature}`;
    return b;
  }
  const named = (i, p) => `feature ${i}` + (p.names?.[i] ? ` \u00b7 ${visible(p.names[i]).slice(0, 40)}` : "");
  function list(title, items) {
    const part = make("div");
    part.append(make("h3", "", title));
    const ul = make("ul", "list");
    for (const [left, right] of items) {
      const li = make("li");
      li.append(left, make("span", "num", number(right)));
      ul.append(li);
    }
    if (!items.length) ul.append(make("li", "soft", "none"));
    part.append(ul);
    return part;
  }
  const token = (text) => make("span", "tok", visible(text), { title: visible(text).slice(0, 200) });
  function examples(title, some, largest) {
    const part = make("section");
    part.append(make("h3", "", title));
    for (const e of some) {
      const where = make("div", "soft", "");
      const rest = `dialogue ${e.document}, token ${e.pos}: ${number(e.value)}`;
      where.textContent = rest;
      part.append(tokenLine(e.tokens, e.acts, largest, { at: e.at, label: `example, strongest ${number(e.value)}`,
        show: (i) => { where.textContent = i < 0 ? rest : `${rest}  \u00b7  \u201c${visible(e.tokens[i]).slice(0, 60)}\u201d ${number(e.acts[i])}`; } }), where);
    }
    if (!some.length) part.append(make("p", "soft", "It never fired on the index's dialogues."));
    return part;
  }
  function page() {
    const p = model.get("page");
    if (!p || p.feature !== model.get("selected")) return;
    const f = p.figures, inside = sheet.contains(document.activeElement) ? document.activeElement.dataset.keep : null;
    const title = make("div", "bar");
    const back = make("button", "", "\u2190 back", { type: "button" }), on = make("button", "", "forward \u2192", { type: "button" });
    back.dataset.keep = "back"; on.dataset.keep = "on";
    back.dataset.offline = on.dataset.offline = "yes";
    const steps = [["\u2191", "previous", -1], ["\u2193", "next", 1]].map(([sign, word, step]) => {
      const b = make("button", "", sign, { type: "button", "aria-label": `${word} feature of the table`, title: `${word} in the table` });
      b.dataset.keep = word;
      b.onclick = () => { const at = placeOf(p.feature); if (at >= 0) place(at + step); };
      return [b, step];
    });
    walk = () => steps.forEach(([b, step]) => {
      const at = placeOf(p.feature), row = rowAt(at + step);
      b.disabled = at < 0 || at + step < 0 || at + step >= model.get("n_rows");
      if (row) b.dataset.offline = `selected:${row[0]}`; else delete b.dataset.offline;
    });
    walk();
    back.disabled = !past.length; on.disabled = !ahead.length;
    back.onclick = () => travel(past, ahead);
    on.onclick = () => travel(ahead, past);
    const name = make("h2", "", `Feature ${p.feature}`);
    const label = make("input", "grow", null, { type: "text", maxlength: "500", "aria-label": "label of this feature", placeholder: "label" });
    label.value = p.label;
    label.dataset.keep = "label";
    ownKeys(label);
    let sent = p.label;
    const keep = () => {
      if (label.value === p.label) return;
      sent = label.value;
      staying = true;
      dog.asked();
      model.send({ op: "label", feature: p.feature, text: sent, key: "" });
    };
    label.addEventListener("keydown", (e) => { if (e.key === "Enter") keep(); });
    // not before a click is over that took the focus away: what it is on is drawn again
    label.addEventListener("blur", () => setTimeout(() => { if (label.value !== sent) keep(); }, CLICK));
    title.append(back, on, ...steps.map(([b]) => b), name, label);
    if (model.get("steers")) {
      const steer = make("button", "", "Steer with it", { type: "button", "aria-label": `make feature ${p.feature} a slider of the steering lab` });
      steer.dataset.keep = "steer";
      steer.onclick = () => { dog.asked(); model.send({ op: "steer", feature: p.feature }); };
      title.append(steer);
    }
    const facts = make("p", "", "");
    for (const w of (f.warnings || "").split(",").filter(Boolean)) facts.append(make("span", "warn", WARNINGS[w] || w));
    facts.append(make("span", "", `fires on ${percent(f.density)} of tokens (template ${percent(f.density_template)}, user ${percent(f.density_user)}, `
      + `thinking ${percent(f.density_thinking)}, assistant ${percent(f.density_assistant)}); largest ${number(f.max)}, mean ${number(f.mean)}; `
      + `the token alone predicts it with F1 ${number(f.token_f1)}`));
    if (f.hint) facts.append(make("span", "", `; ${visible(f.hint)}`));
    const columns = make("div", "cols");
    const bars = make("div");
    bars.append(make("h3", "", "activations"), histogram(p.histogram, p.edges));
    columns.append(bars, list("promoted tokens (logit)", p.promoted.slice(0, 8).map(([t, v]) => [token(t), v])),
      list("suppressed tokens (logit)", p.suppressed.slice(0, 8).map(([t, v]) => [token(t), v])),
      list("nearest decoder rows (cosine)", p.neighbours.map(([i, v]) => [link(i, named(i, p)), v])),
      list("fires together (Jaccard)", p.together.map(([i, v]) => [link(i, named(i, p)), v])));
    const attempt = make("section");
    if (model.get("live")) {
      const text = make("input", "grow", null, { type: "text", "aria-label": "a text to try this feature on", placeholder: "try it on a text of yours", spellcheck: "false" });
      text.value = trial;
      text.dataset.keep = "try";
      ownKeys(text);
      let wait = null;
      const ask = () => { trial = text.value; if (trial.trim()) { dog.asked(); model.send({ op: "try", feature: p.feature, text: trial }); } else tried.replaceChildren(); };
      text.oninput = () => { clearTimeout(wait); wait = setTimeout(ask, 150); };
      const around = make("div", "bar");
      around.append(text);
      attempt.append(make("h3", "", "on your text"), around, tried);
      if (tried.dataset.of !== `${model.get("site")}/${p.feature}`) { tried.replaceChildren(); if (trial.trim()) ask(); }
    }
    const scroll = make("div", "scroll", null, { tabindex: "0", role: "region", "aria-label": "examples" });
    scroll.append(examples("strongest, one a dialogue", p.top, f.max));
    p.bands.forEach((b, i) => scroll.append(examples(`quarter ${i + 1} of its firing tokens: ${number(b.low)} to ${number(b.high)}`, b.examples, f.max)));
    sheet.replaceChildren(title, facts, columns, attempt, scroll);
    if (inside) sheet.querySelector(`[data-keep="${inside}"]`)?.focus();
    root.dataset.page = `${model.get("site")}/${p.feature}`;
  }

  // --- what comes from the user
  site.onchange = () => { past.push([model.get("site"), model.get("selected")]); ahead.length = 0; save({ site: +site.value, query: "", sort_by: "" }); };
  mode.onchange = () => { box.placeholder = hints[mode.value]; save({ mode: mode.value, query: box.value }); };
  box.oninput = () => { clearTimeout(timer); timer = setTimeout(() => save({ query: box.value }), mode.value === "text" ? 40 : 200); };
  ownKeys(box);
  ownKeys(site);
  ownKeys(mode);
  view.addEventListener("scroll", draw, { passive: true });
  view.addEventListener("click", (e) => { const line = e.target.closest(".row"); if (line) { cursor = +line.dataset.place; select(+line.dataset.feature); } });
  view.addEventListener("keydown", (e) => {
    const step = { ArrowDown: 1, ArrowUp: -1, PageDown: 12, PageUp: -12, Home: -1e9, End: 1e9 }[e.key];
    if (e.key === "Enter") sheet.querySelector("button:not(:disabled), .scroll")?.focus();
    else if (step === undefined) {
      // what is typed here is searched for
      if (e.key.length === 1 && e.key !== " " && !e.ctrlKey && !e.metaKey && !e.altKey) box.focus();
      return;
    } else place(cursor + step);
    e.preventDefault();
    e.stopPropagation();
  });

  // --- what comes from Python
  const reordered = () => {
    dog.answered();
    rows = new Map([[0, model.get("first")]]);
    asked = new Set();
    if (!staying) { view.scrollTop = 0; cursor = 0; }
    staying = false;
    site.value = model.get("site");
    mode.value = model.get("mode");
    if (document.activeElement !== box) box.value = model.get("query");
    header();
    draw();
  };
  const unsaved = saver(model, root, dog), off = listen(model, root, {
    "change:version": reordered,
    "change:selected": draw,
    "change:page": () => {
      dog.answered();
      if (after !== null) { const feature = after; after = null; if (feature !== model.get("selected")) { save({ selected: feature }); return; } }
      page();
      draw();
    },
    "change:status": () => { dog.answered(); status.textContent = model.get("status"); },
    "change:steers": page,
    "msg:custom": (message) => {
      dog.answered();
      if (message.op === "tried") { drawTried(message); return; }
      if (message.op !== "rows" || message.version !== model.get("version")) return;
      rows.set(Math.floor(message.start / BLOCK), message.rows);
      if (wanted >= 0 && rowAt(wanted)) place(wanted); else draw();
    },
  });
  box.placeholder = hints.text;
  status.textContent = model.get("status");
  reordered();
  page();
  const resized = new ResizeObserver(draw);
  resized.observe(view);
  return () => { off(); unsaved(); dog.stop(); clearTimeout(timer); resized.disconnect(); root.remove(); };
}
const WARNINGS = { dead: "dead: never fired", dense: "dense: on more than 10 % of tokens", position: "position: mostly in the first 8 tokens",
  sink: "sink: fires on position 0 or on sinks", token: "token: the token alone tells it" };
export default { render };
