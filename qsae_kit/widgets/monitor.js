/** Start and Stop. */
function makeControls(model, bar, dog) {
  const start = make("button", "", "Start", { type: "button" }), stop = make("button", "", "Stop", { type: "button" });
  start.onclick = () => { dog.asked(); model.send({ op: "start" }); };
  stop.onclick = () => { dog.asked(); stop.disabled = true; model.send({ op: "stop" }); };
  bar.append(start, stop);
  const set = () => { start.disabled = model.get("running"); stop.disabled = !model.get("running"); };
  set();
  return set;
}
