// Stands in for the kernel on a page of its own: gives back what was stored.
(() => {
  const { state, answers } = JSON.parse(document.querySelector('script[type="application/json"]').textContent);
  const listeners = new Map();
  const tell = (event, ...values) => { for (const f of [...(listeners.get(event) || [])]) f(...values); };
  let changed = [];
  const missing = () => { state.status = "This page holds only a part; open the index in a notebook for the rest."; tell("change:status"); };
  const model = {
    get: (name) => state[name],
    set: (name, value) => { if (state[name] !== value) { state[name] = value; changed.push(name); } },
    save_changes() {
      const names = changed;
      changed = [];
      for (const name of names) {
        const found = answers[name]?.[String(state[name])];
        if (answers[name] && found === undefined) missing();
        else if (found !== undefined) { Object.assign(state, found); for (const key of Object.keys(found)) tell(`change:${key}`); }
        tell(`change:${name}`);
      }
    },
    on: (events, f) => { for (const e of events.split(" ")) listeners.set(e, [...(listeners.get(e) || []), f]); },
    off: (events, f) => { for (const e of events.split(" ")) listeners.set(e, (listeners.get(e) || []).filter((g) => g !== f)); },
    send(message) {
      const found = answers[message.op]?.[String(message.start ?? message.key ?? "")];
      if (found === undefined) missing();
      else tell("msg:custom", { ...message, ...found }, []);
    },
  };
  const main = document.querySelector("main");
  // What would ask a kernel is switched off; what works says so: "yes", or the answer that it needs, as "selected:12".
  const works = (e) => {
    const [name, value] = (e.dataset.offline || "").split(":");
    return name === "yes" || (value !== undefined && answers[name]?.[value] !== undefined);
  };
  const quiet = () => { for (const e of main.querySelectorAll("button, input, select, textarea")) if (!e.disabled && !works(e)) e.disabled = true; };
  const go = () => {
    const feature = +location.hash.slice(1);
    if (location.hash && answers.selected?.[feature]) { model.set("selected", feature); model.save_changes(); }
  };
  Promise.resolve(render({ model, el: main })).then(() => {
    quiet();
    new MutationObserver(quiet).observe(main, { childList: true, subtree: true });
    addEventListener("hashchange", go);
    go();
  });
})();
