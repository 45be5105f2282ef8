/** A menu of sites: what a click on a mark does, for those without a mouse. */
function makeControls(model, bar, dog) {
  const label = make("label", "", "site "), menu = make("select");
  for (const name of model.get("sites")) { const o = make("option", "", visible(name)); o.value = name; menu.append(o); }
  label.append(menu);
  bar.append(label, make("span", "soft live", "or click a mark"));
  ownKeys(menu);
  menu.onchange = () => { model.set("selected", menu.value); dog.asked(); model.save_changes(); };
  return () => { menu.value = model.get("selected"); };
}
