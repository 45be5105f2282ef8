function render({ model, el }) {
  const root = rootOf(el, "qsae-tokens");
  const dog = watchdog(root, model);
  const bar = make("div", "bar");
  const sites = make("select", "", null, { "aria-label": "SAE" });
  model.get("sites").forEach((name, i) => { const o = make("option", "", visible(name)); o.value = i; sites.append(o); });
  const before = make("button", "", "\u2190 site", { type: "button" }), after = make("button", "", "site \u2192", { type: "button" });
  const feature = make("input", "", null, { type: "number", min: "-1", step: "1", "aria-label": "feature to shade by (-1: the strongest)" });
  feature.style.width = "7em";
  const label = make("label", "", "shade by feature ");
  label.append(feature);
  bar.append(sites, before, after, label);
  const box = make("textarea", "", null, { rows: "3", "aria-label": "chat: lines that begin with user: or assistant:, or one question", spellcheck: "false" });
  box.style.width = "100%";
  box.value = model.get("text");
  const line = make("div"), word = make("p", "soft", "", { "aria-live": "polite" });
  const columns = make("div", "cols"), status = make("div", "status", "", { role: "status" });
  const map = make("div", "scroll", null, { tabindex: "0", role: "region", "aria-label": "tokens and features" });
  root.append(bar, box, line, word, columns, make("h3", "", "Tokens and the strongest features"), map, status);
  for (const e of [box, feature, sites]) ownKeys(e);

  let asked = 0, shown = -1, timer = null;
  let pin = -1, read = ""; // the pinned token, and the tokens that it is one of
  const ask = (changes = {}) => {
    asked += 1;
    dog.asked();
    model.send({ op: "look", seq: asked, text: box.value, site: +sites.value, feature: model.get("feature"), ...changes });
  };
  box.oninput = () => { clearTimeout(timer); timer = setTimeout(ask, 25); };
  sites.onchange = () => ask({ feature: -1 });
  const go = (step) => { const n = sites.options.length; sites.value = (+sites.value + step + n) % n; ask({ feature: -1 }); };
  before.onclick = () => go(-1);
  after.onclick = () => go(1);
  feature.onchange = () => ask({ feature: feature.value === "" ? -1 : Math.trunc(+feature.value) });

  function named(id, r) { const name = r.names[id]; return `feature ${id}` + (name ? ` \u00b7 ${visible(name).slice(0, 60)}` : ""); }
  function tell(i) {
    const r = model.get("result");
    if (i < 0 || !r.tokens[i]) { word.textContent = "Point at a token, or walk with the arrows, to see what fires on it; a click keeps it, Escape lets it go."; columns.replaceChildren(); return; }
    word.textContent = `token ${i} \u201c${visible(r.tokens[i]).slice(0, 80)}\u201d: ${named(r.feature, r)} ${number(r.acts[i])}`;
    const list = make("ul", "list");
    for (const [id, value] of r.top[i]) {
      const item = make("li"), b = make("button", "", named(id, r), { type: "button" });
      b.onclick = () => ask({ feature: id });
      item.append(b);
      if (model.get("linked")) {
        const page = make("button", "", "its page", { type: "button", "aria-label": `page of feature ${id} in the explorer` });
        page.onclick = () => { dog.asked(); model.send({ op: "page", site: model.get("site"), feature: id }); };
        item.append(page);
      }
      item.append(make("span", "num", number(value)));
      list.append(item);
    }
    if (!r.top[i].length) list.append(make("li", "soft", "nothing fires here, or the token does not count"));
    columns.replaceChildren(list);
  }
  function draw() {
    const r = model.get("result");
    if (r.seq === undefined || r.seq < shown) return; // an older answer
    dog.answered();
    shown = r.seq;
    asked = Math.max(asked, r.seq);
    sites.value = model.get("site");
    if (document.activeElement !== feature) feature.value = r.feature;
    if (document.activeElement !== box && box.value !== model.get("text")) box.value = model.get("text");
    let last = -1;
    const tokens = r.tokens.join("\0");
    if (tokens !== read) pin = -1;
    read = tokens;
    line.replaceChildren(r.tokens.length
      ? tokenLine(r.tokens, r.acts, Math.max(0, ...r.acts), { pin, pinned: (i) => { pin = i; },
        show: (i) => { if (i >= 0 && i !== last) { last = i; tell(i); } }, label: `tokens shaded by feature ${r.feature}` })
      : make("p", "soft", "Write something to look at."));
    const best = r.acts.reduce((a, v, i) => (v > r.acts[a] ? i : a), 0);
    tell(!r.tokens.length ? -1 : pin >= 0 ? pin : best);
    heat(r);
    root.dataset.seq = r.seq;
  }
  function heat(r) {
    const table = make("table", "heat"), head = make("tr");
    head.append(make("th", "", "token"));
    for (const id of r.features) {
      const th = make("th"), b = make("button", "", String(id), { type: "button", title: named(id, r), "aria-label": `shade by ${named(id, r)}` });
      b.onclick = () => ask({ feature: id });
      th.append(b);
      head.append(th);
    }
    table.append(head);
    const largest = r.features.map((_, j) => Math.max(...r.heat.map((row) => row[j])));
    r.heat.forEach((row, i) => {
      const tr = make("tr"), th = make("th", "tok clip", visible(r.tokens[i]), { scope: "row" });
      tr.append(th);
      row.forEach((value, j) => { const td = make("td", "num", value ? number(value) : ""); shade(td, value, largest[j]); tr.append(td); });
      table.append(tr);
    });
    map.replaceChildren(table);
  }
  const unsaved = saver(model, root, dog), off = listen(model, root, {
    "change:result": draw,
    "msg:custom": () => dog.answered(),
    "change:status": () => { dog.answered(); status.textContent = model.get("status"); },
  });
  draw();
  return () => { off(); unsaved(); dog.stop(); clearTimeout(timer); root.remove(); };
}
export default { render };
