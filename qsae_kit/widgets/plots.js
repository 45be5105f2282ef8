const HEIGHT = 450; // of a figure that does not say its own, in pixels
const LIBRARY = Symbol.for("qsae_kit.plotly");

/** plotly.js: of the page where it is there, else what came with the widget, once: a kernel that runs a cell gives no
 *  answers. */
function library(model) {
  if (globalThis.Plotly?.react) return Promise.resolve(globalThis.Plotly);
  globalThis[LIBRARY] ||= unpacked(model.get("_library")).catch((error) => { delete globalThis[LIBRARY]; throw error; });
  return globalThis[LIBRARY];
}
async function unpacked(given) {
  const bytes = new Uint8Array(given.buffer, given.byteOffset, given.byteLength);
  const code = await new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
  const module = { exports: {} };
  new Function("module", "exports", "define", code)(module, module.exports, undefined); // the library's own text, from this package
  return module.exports;
}

/** The page's colours, where a figure leaves them open. */
function themed(layout, root) {
  const style = getComputedStyle(root), color = style.color;
  const grid = "rgba(127,127,127,0.3)", axes = {};
  for (const key of Object.keys(layout)) if (/^[xy]axis\d*$/.test(key)) axes[key] = { ...layout[key], gridcolor: grid, zerolinecolor: grid, linecolor: grid };
  return { ...layout, ...axes, template: undefined, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { ...layout.font, color },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: "rgba(127,127,127,0.7)", activecolor: color }, autosize: false };
}

const WIDTH = 700; // of a figure in a page that is not laid out, in pixels
const NARROWEST = 240; // below it the axes have no room, and plotly.js fails
const widthOf = (plot) => Math.max(plot.clientWidth || WIDTH, NARROWEST);

async function render({ model, el }) {
  const root = rootOf(el, "qsae-plots");
  const dog = watchdog(root, model), bar = make("div", "bar"), holder = make("div"), status = make("div", "status", "", { role: "status" });
  root.append(bar, holder, status);
  const controls = typeof makeControls === "function" ? makeControls(model, bar, dog) : () => {};
  let gone = false, plots = [], running = Promise.resolve();
  // plotly.js measures and resizes by itself in the middle of another drawing: here one thing is done after the other
  const failed = (error) => { status.textContent = `The figure could not be drawn (${error.message}); run the cell again.`; };
  const next = (step) => { running = running.then(step).catch(failed); };
  status.textContent = model.get("status");
  controls();
  async function draw() {
    const Plotly = await library(model);
    const figures = model.get("figures").map((text) => JSON.parse(text));
    while (plots.length > figures.length) { const p = plots.pop(); Plotly.purge(p); p.remove(); }
    for (let i = 0; i < figures.length && !gone; i++) {
      let plot = plots[i];
      const fresh = !plot;
      if (fresh) { plot = make("div", "qsae-plot"); holder.append(plot); plots.push(plot); }
      plot.style.height = `${figures[i].layout.height || HEIGHT}px`; // an element without one collapses when it is resized
      const layout = { ...themed(figures[i].layout, root), width: widthOf(plot), height: parseFloat(plot.style.height) };
      await Plotly.react(plot, figures[i].data, layout, { displaylogo: false });
      if (fresh) plot.on("plotly_click", (e) => model.send({ op: "click", figure: i, trace: e.points[0].curveNumber, point: e.points[0].pointNumber }));
    }
    controls();
    root.dataset.drawn = (+root.dataset.drawn || 0) + 1;
  }
  let waits = false;
  async function fit() {
    waits = false;
    const Plotly = await library(model);
    for (const plot of plots) if (!gone && plot.clientWidth && plot.layout.width !== widthOf(plot)) await Plotly.relayout(plot, { width: widthOf(plot) });
  }
  const redraw = () => { dog.answered(); next(draw); };
  const unsaved = saver(model, root, dog), off = listen(model, root, { "change:figures": redraw, "change:status": () => { dog.answered(); status.textContent = model.get("status"); controls(); },
    "msg:custom": () => dog.answered(), "change:selected": controls, "change:running": () => { dog.answered(); controls(); } });
  redraw();
  const size = new ResizeObserver(() => { if (!waits) { waits = true; next(fit); } });
  size.observe(holder);
  // JupyterLab's theme, and the system's
  const theme = new MutationObserver(redraw), system = matchMedia("(prefers-color-scheme: dark)");
  theme.observe(document.body, { attributeFilter: ["data-jp-theme-name", "data-jp-theme-light"] });
  system.addEventListener("change", redraw);
  return () => {
    gone = true; off(); unsaved(); size.disconnect(); theme.disconnect(); system.removeEventListener("change", redraw); dog.stop();
    next(async () => { const Plotly = await library(model); plots.forEach(Plotly.purge); });
    root.remove();
  };
}
export default { render };
