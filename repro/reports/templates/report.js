"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const pageSize = 24;

  for (const box of document.querySelectorAll("[data-toggle]")) {
    box.addEventListener("change", () => {
      for (const line of document.querySelectorAll(`.inner [data-run="${box.dataset.toggle}"]`)) {
        line.toggleAttribute("hidden", !box.checked);
      }
    });
  }

  const isHidden = (number) => {
    const box = document.querySelector(`[data-toggle="${number}"]`);
    return box !== null && !box.checked;
  };
  const nearest = (places, x) => {
    let best = 0;
    places.forEach((place, i) => { if (Math.abs(place - x) < Math.abs(places[best] - x)) best = i; });
    return best;
  };

  data.charts.forEach((chart, index) => {
    const figure = document.getElementById(`chart-${index}`);
    const frame = figure.querySelector(".frame");
    const plot = figure.querySelector(".plot");
    const cursor = figure.querySelector(".cursor");
    const reading = figure.querySelector(".reading");
    const steps = [...new Set(chart.lines.flatMap((line) => line.x))].sort((a, b) => a - b);
    let at = steps.length - 1;
    const show = () => {
      const x = steps[at];
      const share = (100 * (x - chart.x[0])) / (chart.x[1] - chart.x[0]);
      cursor.setAttribute("x1", `${share}%`);
      cursor.setAttribute("x2", `${share}%`);
      cursor.classList.add("on");
      const values = chart.lines.filter((line) => !isHidden(line.number)).map((line) => {
        const i = nearest(line.x, x);
        return `${line.name} ${line.y[i]}` + (line.x[i] === x ? "" : ` (step ${line.x[i]})`);
      });
      for (const line of chart.published) {
        const i = line.x.indexOf(x);
        if (i >= 0) values.push(`${line.name} ${line.y[i]}`);
      }
      reading.textContent = `step ${x.toLocaleString("en")}: ${values.join(", ")}`;
    };
    const hide = () => { cursor.classList.remove("on"); reading.textContent = ""; };
    frame.addEventListener("pointermove", (event) => {
      const box = plot.getBoundingClientRect();
      const share = (event.clientX - box.left) / box.width;
      at = nearest(steps, chart.x[0] + share * (chart.x[1] - chart.x[0]));
      show();
    });
    frame.addEventListener("pointerleave", hide);
    frame.addEventListener("blur", hide);
    frame.addEventListener("keydown", (event) => {
      const moves = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: steps.length - 1 };
      if (!(event.key in moves)) return;
      event.preventDefault();
      at = Math.min(Math.max(moves[event.key], 0), steps.length - 1);
      show();
    });
  });

  const form = document.querySelector(".search");
  if (form === null) return;
  form.hidden = false;
  const [field, count, found, more] = ["search", "count", "found", "more"].map((id) => document.getElementById(id));
  const texts = data.items.map(([name, caption, references]) => [name, caption, ...references].join("\n").toLowerCase());
  let hits = [];
  let shown = 0;
  const make = (tag, name, text) => {
    const element = document.createElement(tag);
    if (name) element.className = name;
    if (text !== undefined) element.textContent = text;
    return element;
  };
  const card = ([name, caption, references, score, thumbnail]) => {
    const made = make("article", "card");
    if (thumbnail) {
      const image = make("img");
      image.src = thumbnail;
      image.alt = "";
      made.append(image);
    }
    const texts = [make("p", "caption", caption || "(empty)"), make("p", "score", `${score.toFixed(1)}  ${name}`), make("ul")];
    texts[0].dir = "auto";
    for (const reference of references) {
      const entry = make("li", "", reference);
      entry.dir = "auto";
      texts[2].append(entry);
    }
    made.append(...texts);
    return made;
  };
  const add = () => {
    found.append(...hits.slice(shown, shown + pageSize).map((i) => card(data.items[i])));
    shown = Math.min(shown + pageSize, hits.length);
    more.hidden = shown === hits.length;
  };
  const search = () => {
    const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
    hits = [];
    if (words.length) texts.forEach((text, i) => { if (words.every((word) => text.includes(word))) hits.push(i); });
    shown = 0;
    found.replaceChildren();
    add();
    count.textContent = words.length ? `${hits.length.toLocaleString("en")} of ${texts.length.toLocaleString("en")} images` : "";
  };
  let waiting;
  field.addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(search, 120); });
  form.addEventListener("submit", (event) => { event.preventDefault(); search(); });
  more.addEventListener("click", add);
})();
