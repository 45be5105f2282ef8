// The dialogue with its tokens coloured by the chosen feature, the features as a table, and score and answer without and with
// an ablation side by side.
function render({ model, el }) {
  const root = rootOf(el, "qsae-audit"), dog = watchdog(root, model), status = make("div", "status", "", { role: "status" });
  const features = model.get("features"), before = model.get("before");
  const view = dialogueView(model.get("dialogue"), "dialogue", (i) => choose(i));
  root.append(make("p", "", visible(model.get("sentence"))), make("h3", "", "The dialogue"), view.root);

  // --- the features
  root.append(make("h3", "", "The features that were ablated, ranked by what was predicted"));
  const around = make("div", "", null, { tabindex: "0", role: "region", "aria-label": "features" }), table = make("table", "heat choose");
  const head = make("tr");
  for (const name of ["feature", "predicted (nats)", "ablated (nats)", "share"]) head.append(make("th", "", name, { scope: "col" }));
  table.append(head);
  const rows = features.map((one, i) => {
    const row = make("tr"), name = make("th", "", null, { scope: "row" }), button = make("button", "", visible(one.name), { type: "button" });
    button.dataset.offline = "yes";
    button.onclick = () => choose(i);
    name.append(button);
    row.append(name, make("td", "num", number(one.predicted)), make("td", "num", number(one.effect)), make("td", "num", percent(one.share)));
    table.append(row);
    return button;
  });
  around.style.overflowX = "auto";
  around.append(table);

  // --- the ablation
  const bar = make("div", "bar"), one = make("button", "", "", { type: "button" }), all = make("button", "", "Ablate all", { type: "button" });
  const panes = make("div", "panes");
  const pane = (title) => {
    const part = make("div", "pane"), score = make("p"), answer = make("div", "toks");
    part.append(make("h3", "", title), score, answer);
    panes.append(part);
    return (told, said, ended = true) => {
      score.textContent = ended ? told : `${told}; the answer was cut, not ended`;
      answer.textContent = said;
      answer.dataset.text = said;
    };
  };
  const left = pane("As it is"), right = pane("Ablated");
  left(`${visible(before.said)}: ${number(before.score)} nats`, before.answer, before.ended);
  right("Nothing is ablated yet.", "");
  bar.append(one, all);
  all.dataset.offline = "ablate:all";
  root.append(around, bar, panes, status);
  let asked = null;
  const ask = (key) => { asked = key; dog.asked(); model.send({ op: "ablate", key }); };
  one.onclick = () => ask(String(chosen));
  all.onclick = () => ask("all");
  let chosen = 0;
  function choose(wanted) {
    const i = Math.max(0, Math.min(wanted, features.length - 1));
    chosen = i;
    view.choose(i);
    rows.forEach((button, n) => button.setAttribute("aria-pressed", String(n === i)));
    one.textContent = features[i] ? `Ablate ${visible(features[i].name)}` : "Ablate";
    one.dataset.offline = `ablate:${i}`;
    one.disabled = !features[i];
    if (model.get("feature") !== i) { model.set("feature", i); model.save_changes(); }
  }
  all.disabled = !features.length;
  const unsaved = saver(model, root, dog), off = listen(model, root, {
    "change:feature": () => choose(model.get("feature")),
    "change:status": () => { dog.answered(); status.textContent = model.get("status"); },
    "msg:custom": (message) => {
      dog.answered();
      if (message.op !== "ablate" || message.key !== asked) return;
      const what = asked === "all" ? "all of them" : visible(features[+asked].name);
      right(`without ${what}: ${number(message.score)} nats`, message.answer, message.ended);
      root.dataset.ablated = asked;
    },
  });
  choose(model.get("feature"));
  view.draw(); // once it has a place, so that the token that is asked about is in sight
  return () => { off(); unsaved(); dog.stop(); root.remove(); };
}
export default { render };
