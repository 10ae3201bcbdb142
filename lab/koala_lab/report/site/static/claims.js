// The filter above the table of all claims. What is chosen stands in the address, so that a view can be passed on.
"use strict";
(function () {
  const rows = [...document.querySelectorAll("#claims-table tbody tr")];
  const form = document.getElementById("claims-filter");
  const count = document.getElementById("claims-count");
  const names = { paper: "paper", verdict: "verdict", scale: "scale", source: "who says so", notebook: "notebook" };

  for (const [key, label] of Object.entries(names)) {
    const select = document.createElement("select");
    select.name = key;
    select.append(new Option("all", ""));
    for (const value of new Set(rows.map((row) => row.dataset[key]))) select.append(new Option(value, value));
    const around = document.createElement("label");
    around.append(label, select);
    form.append(around);
  }
  const text = document.createElement("input");
  text.name = "text";
  text.type = "search";
  const around = document.createElement("label");
  around.append("words", text);
  form.append(around);
  form.hidden = false;

  function wanted() {
    return new URLSearchParams([...new FormData(form)].filter(([, value]) => value));
  }

  function show() {
    const chosen = wanted();
    const words = (chosen.get("text") || "").toLowerCase().split(/\s+/);
    let shown = 0;
    for (const row of rows) {
      const fits = Object.keys(names).every((key) => !chosen.get(key) || row.dataset[key] === chosen.get(key));
      const said = row.textContent.toLowerCase();
      row.hidden = !(fits && words.every((word) => said.includes(word)));
      shown += !row.hidden;
    }
    count.textContent = `${shown} of ${rows.length} rows, one per claim and scale`;
  }

  function fromAddress() {
    const chosen = new URLSearchParams(location.hash.slice(1));
    for (const field of form.elements) field.value = chosen.get(field.name) || "";
    show();
  }

  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("input", () => {
    history.replaceState(null, "", "#" + wanted());
    show();
  });
  addEventListener("hashchange", fromAddress);
  fromAddress();
})();
