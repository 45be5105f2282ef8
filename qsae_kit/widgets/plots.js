const LIBRARY = Symbol.for("qsae_kit.plotly");

/** plotly.js: of the page where it is there, else from the kernel, once. */
function library(model) {
  if (globalThis.Plotly?.react) return Promise.resolve(globalThis.Plotly);
  if (!globalThis[LIBRARY]) {
    globalThis[LIBRARY] = new Promise((resolve, reject) => {
      const arrived = async (message, buffers) => {
        if (message.op !== "library") return;
        model.off("msg:custom", arrived);
        try {
          const b = buffers[0], bytes = new Uint8Array(b.buffer, b.byteOffset, b.byteLength);
          const code = await new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
          const module = { exports: {} };
          new Function("module", "exports", "define", code)(module, module.exports, undefined); // the library's own text, from this package
          resolve(module.exports);
        } catch (error) { delete globalThis[LIBRARY]; reject(error); }
      };
      model.on("msg:custom", arrived);
      model.send({ op: "library" });
    });
  }
  return globalThis[LIBRARY];
}

/** The page's colours, where a figure leaves them open. */
function themed(layout, root) {
  const style = getComputedStyle(root), color = style.color;
  const grid = "rgba(127,127,127,0.3)", axes = {};
  for (const key of Object.keys(layout)) if (/^[xy]axis\d*$/.test(key)) axes[key] = { ...layout[key], gridcolor: grid, zerolinecolor: grid, linecolor: grid };
  return { ...layout, ...axes, template: undefined, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { ...layout.font, color }, autosize: true, width: undefined };
}

async function render({ model, el }) {
  const root = make("div", "qsae qsae-plots");
  el.append(root);
  const dog = watchdog(root), bar = make("div", "bar"), holder = make("div"), status = make("div", "status", "", { role: "status" });
  root.append(bar, holder, status);
  const controls = typeof makeControls === "function" ? makeControls(model, bar, dog) : () => {};
  let gone = false, plots = [], running = Promise.resolve();
  dog.asked();
  const Plotly = await library(model);
  dog.answered();
  async function draw() {
    const figures = model.get("figures").map((text) => JSON.parse(text));
    while (plots.length > figures.length) { const p = plots.pop(); Plotly.purge(p); p.remove(); }
    for (let i = 0; i < figures.length && !gone; i++) {
      let plot = plots[i];
      const fresh = !plot;
      if (fresh) { plot = make("div", "qsae-plot"); holder.append(plot); plots.push(plot); }
      await Plotly.react(plot, figures[i].data, themed(figures[i].layout, root), { responsive: true, displaylogo: false });
      if (fresh) plot.on("plotly_click", (e) => model.send({ op: "click", figure: i, trace: e.points[0].curveNumber, point: e.points[0].pointNumber }));
    }
    controls();
    root.dataset.drawn = (+root.dataset.drawn || 0) + 1;
  }
  const redraw = () => { dog.answered(); running = running.then(draw); };
  const off = listen(model, root, { "change:figures": redraw, "change:status": () => { dog.answered(); status.textContent = model.get("status"); controls(); },
    "change:selected": controls, "change:running": () => { dog.answered(); controls(); } });
  status.textContent = model.get("status");
  redraw();
  return () => { gone = true; off(); dog.stop(); for (const p of plots) Plotly.purge(p); root.remove(); };
}
export default { render };
