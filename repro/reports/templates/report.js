"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const several = data.names.length > 1;
  const make = (tag, name, ...inside) => {
    const made = document.createElement(tag);
    if (name) made.className = name;
    made.append(...inside);
    return made;
  };
  const svg = (tag, attributes, ...inside) => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    made.append(...inside);
    return made;
  };
  const colour = (run) => `run c${run % 6} d${run % 12}`;
  const count = (value) => value.toLocaleString("en");

  // Charts: an inner SVG of SIDE each way is stretched; texts and rules are placed outside of it by percentages.
  const SIDE = 10000, BANDS = 3, SMOOTHING = 0.9, ROOM = 0.04;
  const format = (value) => Math.abs(value) >= 1000 ? count(Math.round(value)) : String(Number(value.toPrecision(4)));
  const percent = (share) => `${(100 * share).toFixed(2)}%`;
  const ticks = (low, high) => {
    const raw = (high - low) / 5, power = 10 ** Math.floor(Math.log10(raw));
    const step = power * [1, 2, 2.5, 5, 10].find((factor) => factor * power >= raw * 0.999);
    const first = Math.ceil(low / step - 1e-9), last = Math.floor(high / step + 1e-9);
    return Array.from({ length: last - first + 1 }, (_, place) => (first + place) * step);
  };
  const logTicks = (low, high) => {  // of logarithms; what is less than a factor of 5 is nearly linear
    if (high - low < 0.7) return ticks(10 ** low, 10 ** high).map(Math.log10);
    const factors = high - low > 3 ? [1] : [1, 1.5, 2, 3, 5, 7];
    const powers = Array.from({ length: Math.ceil(high) - Math.floor(low) + 1 }, (_, place) => Math.floor(low) + place);
    return powers.flatMap((power) => factors.map((factor) => power + Math.log10(factor))).filter((y) => y >= low && y <= high);
  };
  const smoothed = (values) => {  // the exponential mean, without a bias towards 0
    let sum = 0, weight = 0;
    return values.map((value) => {
      [sum, weight] = [SMOOTHING * sum + (1 - SMOOTHING) * value, SMOOTHING * weight + 1 - SMOOTHING];
      return sum / weight;
    });
  };
  const nearest = (places, x) => places.reduce((best, place, i) => Math.abs(place - x) < Math.abs(places[best] - x) ? i : best, 0);
  const boxes = [...document.querySelectorAll("[data-toggle]")];

  data.charts.forEach((chart) => {
    const figure = document.getElementById(`chart-${chart.key}`), whole = [0, chart.last], { wanted } = chart;
    const steps = [...new Set(chart.lines.flatMap((line) => line.x))].sort((a, b) => a - b);
    const axes = svg("g", { class: "axes" }), cursor = svg("line", { class: "cursor", y2: "100%" }), brush = svg("rect", { class: "brush", height: "100%" });
    const inner = svg("svg", { class: "inner", viewBox: `0 0 ${SIDE} ${SIDE}`, preserveAspectRatio: "none" });
    const named = { role: "img", "aria-labelledby": `${chart.key}-title`, "aria-describedby": `${chart.key}-summary` };
    const plot = svg("svg", { class: "plot", ...named }, axes, inner, brush, cursor);
    const frame = make("div", "frame", plot), reading = make("p", "reading"), tools = make("p", "tools");
    for (const [name, value] of [["tabindex", 0], ["role", "group"], ["aria-labelledby", `${chart.key}-title`]]) frame.setAttribute(name, value);
    reading.setAttribute("aria-live", "polite");
    figure.querySelector(".summary").classList.add("hidden");
    figure.append(frame, reading, tools);
    let view = whole, log = false, smooth = false, at = steps.length - 1, pressed = null;
    const across = (x) => (x - view[0]) / (view[1] - view[0]);
    const shown = () => chart.lines.filter((line) => boxes[line.number].checked);

    const draw = () => {
      const lines = shown().map((line) => ({ ...line, y: smooth ? smoothed(line.y) : line.y }));
      const isRanged = (line) => line.low.length && (line === wanted || line.dotted || lines.length <= BANDS);
      const scale = log ? Math.log10 : (value) => value;
      const seen = [...lines, ...(wanted ? [wanted] : [])].flatMap((line) => line.x.flatMap((x, i) =>
        x < view[0] || x > view[1] ? [] : isRanged(line) ? [line.y[i], line.low[i], line.high[i]] : [line.y[i]]));
      const usable = seen.filter((value) => value !== null && (!log || value > 0)).map(scale);
      const ends = usable.length ? [Math.min(...usable), Math.max(...usable)] : [0, 1];
      const room = (ends[1] - ends[0]) * ROOM || Math.abs(ends[1]) * ROOM || ROOM;
      // A quantity that is never negative is not given negative room.
      const low = ends[0] < 0 || log ? ends[0] - room : Math.max(ends[0] - room, 0), high = ends[1] + room;
      const up = (y) => (y - low) / (high - low);
      const X = (x) => Math.round(SIDE * across(x));
      // What is open, or not positive on a logarithmic scale, ends where the axis does.
      const Y = (y, open) => Math.round(SIDE * (1 - (y === null ? open : log && y <= 0 ? 0 : Math.min(Math.max(up(scale(y)), -9), 9))));
      const path = (line, values) => values.map((y, i) => `${X(line.x[i])} ${Y(y)}`);
      const dots = (line) => path(line, line.y).filter((_, i) => line.y[i] !== null).map((point) => `M${point}h0`).join("");
      const bars = (line) => line.x.map((x, i) => `M${X(x)} ${Y(line.low[i], 0)}V${Y(line.high[i], 1)}`).join("");
      const group = (name, run, width, parts) => svg("g", { class: name, "data-run": run, "stroke-width": width }, ...parts.map(([kind, d]) => svg("path", { class: kind, d })));
      // What is wanted of one evaluation is a zone over the whole plot, what is wanted of steps a bar at each.
      const isZone = wanted && wanted.x.length === 1 && chart.key.startsWith("eval_");
      const zone = isZone ? ["zone", `M0 ${Y(wanted.low[0], 0)}H${SIDE}V${Y(wanted.high[0], 1)}H0Z`] : wanted && ["reach", bars(wanted)];
      const rings = wanted ? [group("wanted", "wanted", 1, [zone, ["ring", dots(wanted)], ["hole", dots(wanted)]])] : [];
      // The first lines are the widest, so that those on top of them do not hide them.
      inner.replaceChildren(...rings, ...lines.map((line, place) => group(colour(line.number), line.number, 1.75 + 1.5 * Math.min(lines.length - 1 - place, 3), [
        ...(!isRanged(line) ? [] : line.dotted ? [["range", bars(line)]]
          : [["band", `M${path(line, line.high).join("L")}L${path(line, line.low).reverse().join("L")}Z`]]),
        ["line", `M${path(line, line.y).join("L")}`],
        ...(line.dotted || line.x.length === 1 ? [["dots", dots(line)]] : []),
      ])));
      const label = (x, y, dx, dy, name, words) => svg("text", { x, y, dx, dy, class: name }, words);
      axes.replaceChildren(
        ...(log ? logTicks(low, high) : ticks(low, high)).flatMap((value) => {
          const y = percent(1 - up(value));
          return [svg("line", { x2: "100%", y1: y, y2: y }), label(0, y, -8, "0.32em", "", format(log ? 10 ** value : value))];
        }),
        ...ticks(...view).filter(Number.isInteger).map((x) => label(percent(across(x)), "100%", 0, "1.6em", "x", count(x))),
        label(0, 0, -8, "-0.9em", "unit", chart.unit), label("100%", "100%", 0, "2.9em", "", "step"));
      frame.classList.toggle("zoomed", view !== whole);
    };
    boxes.forEach((box) => box.addEventListener("change", draw));

    const show = () => {
      const x = steps[at];
      for (const end of ["x1", "x2"]) cursor.setAttribute(end, percent(across(x)));
      cursor.classList.toggle("on", x >= view[0] && x <= view[1]);
      const values = shown().map((line) => {
        const i = nearest(line.x, x);
        return `${line.name} ${line.y[i]}` + (line.x[i] === x ? "" : ` (step ${line.x[i]})`);
      });
      const i = wanted ? wanted.x.indexOf(x) : -1;
      if (i >= 0) values.push(`wanted ${[wanted.low[i] ?? "any", wanted.high[i] ?? "any"].join(" to ")}`);
      reading.textContent = `step ${count(x)}: ${values.join(", ")}`;
    };
    const zoom = (middle, width) => {
      const start = Math.min(Math.max(middle - width / 2, 0), chart.last - width);
      view = width < chart.last ? [start, start + Math.max(width, 2)] : whole;
      draw();
    };
    const mark = (a, b) => {
      brush.setAttribute("x", percent(Math.min(across(a), across(b))));
      brush.setAttribute("width", percent(Math.abs(across(a) - across(b))));
    };
    const leave = () => { cursor.classList.remove("on"); reading.textContent = ""; pressed = null; mark(0, 0); };
    const stepOf = (event) => {
      const box = plot.getBoundingClientRect();
      return view[0] + Math.min(Math.max((event.clientX - box.left) / box.width, 0), 1) * (view[1] - view[0]);
    };
    const on = (name, act) => frame.addEventListener(name, act);
    on("pointerdown", (event) => { pressed = stepOf(event); });
    on("pointermove", (event) => {
      at = nearest(steps, stepOf(event));
      if (pressed !== null) mark(pressed, stepOf(event));
      show();
    });
    on("pointerup", (event) => {
      const from = pressed ?? stepOf(event), to = stepOf(event);
      if (Math.abs(across(to) - across(from)) > 0.02) zoom((from + to) / 2, Math.abs(to - from));
      leave();
    });
    ["pointerleave", "blur"].forEach((name) => on(name, leave));
    on("keydown", (event) => {
      const width = view[1] - view[0], moves = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: steps.length - 1, "+": at, "-": at };
      if (!(event.key in moves)) return;
      event.preventDefault();
      at = Math.min(Math.max(moves[event.key], 0), steps.length - 1);
      const factor = { "+": 0.5, "-": 2 }[event.key] ?? 1;
      if (factor !== 1 || steps[at] < view[0] || steps[at] > view[1]) zoom(steps[at], width * factor);
      show();
    });

    const button = (words, label, act) => {
      const made = Object.assign(make("button", "", words), { type: "button", ariaLabel: `${label}: ${chart.title}` });
      made.addEventListener("click", () => act(made));
      tools.append(made, " ");
    };
    const toggle = (made, isOn) => { made.setAttribute("aria-pressed", isOn); draw(); };
    const all = chart.lines.flatMap((line) => line.y).filter((value) => value > 0);
    if (Math.max(...all) > 5 * Math.min(...all)) button("log", "logarithmic", (made) => toggle(made, log = !log));
    if (steps.length > 20) button("smooth", "smooth", (made) => toggle(made, smooth = !smooth));
    button("whole", "show the whole", () => zoom(0, chart.last));
    button("CSV", "save values as CSV", () => {
      const columns = chart.lines.flatMap((line) => ["", " low", " high"].map((end, i) => [line.name + end, line.x, [line.y, line.low, line.high][i]]))
        .filter(([, , values]) => values.length);
      // A spreadsheet would compute what begins like a formula.
      const head = columns.map(([name]) => `"${name.replace(/^[=+@-]/, "'$&").replaceAll('"', '""')}"`);
      const rows = steps.map((step) => [step, ...columns.map(([, x, values]) => values[x.indexOf(step)] ?? "")]);
      const text = new Blob([[["step", ...head], ...rows, ""].join("\n")], { type: "text/csv" });
      Object.assign(make("a"), { href: URL.createObjectURL(text), download: `${chart.key}.csv` }).click();
    });
    draw();
  });

  // Captions: all can be found, a page at a time; the elements are those of the template's cards.
  const form = document.querySelector(".search");
  if (form === null) return;
  form.hidden = false;
  const PAGE = 24;
  const [field, order, from, to, status, found, more] = ["search", "order", "from", "to", "count", "found", "more"].map((id) => document.getElementById(id));
  const items = data.items.map(([name, references, said, thumbnail, problem]) => {
    const given = said.filter(Boolean), score = given.reduce((sum, [, value]) => sum + value, 0) / given.length;
    const texts = [name, ...given.map(([pieces]) => pieces.join("")), ...references].join("\n").toLowerCase();
    return { name, references, said, thumbnail, problem, score, texts, drawn: Math.random() };
  });
  const text = (tag, name, words) => { const made = make(tag, name, words); made.dir = "auto"; return made; };
  const saidBy = (of, run) => {
    const entry = make("div", "said"), key = svg("svg", { class: `key ${colour(run)}`, viewBox: "0 0 48 8" }, svg("path", { class: "line", d: "M0 4L48 4" }));
    if (several) entry.append(make("p", "score", key, " ", make("bdi", "", data.names[run])));
    if (!of) return entry;
    const [pieces, score, , claims] = of, caption = text("p", "caption", pieces.join("") ? "" : "(empty)");
    caption.append(...pieces.map((piece, i) => i % 2 ? make("mark", "", piece) : piece));
    const told = claims.map(([kind, isTrue]) => make("span", isTrue ? "pass" : "fail", `${isTrue ? "✓" : "✗"}\u00a0${kind}`));
    entry.append(caption, make("p", "score", `${data.ranked_by} ${score.toFixed(1)}`), make("p", "claims", ...told));
    return entry;
  };
  const card = ({ name, references, said, thumbnail, problem }) => {
    const picture = thumbnail ? make("img") : make("span", "missing", problem || "no picture is known");
    if (thumbnail) Object.assign(picture, { src: thumbnail, alt: "" });
    const earlier = said.flatMap((of, run) => (of ? of[2] : []).map(([step, caption]) =>
      text("p", "earlier", `${several ? `${data.names[run]}, ` : ""}${step === null ? "first" : `step ${count(step)}`}: ${caption}`)));
    const details = make("details", "", make("summary", "", picture, make("bdi", "", name)), ...earlier);
    return make("article", "card", details, ...said.map(saidBy), make("ul", "", ...references.map((words) => text("li", "", words))));
  };
  const orders = {
    ...(several ? { "captions that differ first": () => 0 } : {}),
    "best first": (a, b) => b.score - a.score,
    "worst first": (a, b) => a.score - b.score,
    "by name": (a, b) => a.name < b.name ? -1 : 1,
    shuffled: (a, b) => a.drawn - b.drawn,
  };
  order.append(...Object.keys(orders).map((name) => make("option", "", name)));
  let hits = [];
  const add = () => {
    const next = found.childElementCount + PAGE;
    found.append(...hits.slice(found.childElementCount, next).map(card));
    more.hidden = next >= hits.length;
  };
  const search = () => {
    const words = field.value.toLowerCase().split(/\s+/).filter(Boolean), most = to.value === "" ? 100 : Number(to.value);
    hits = items.filter((item) => item.score >= Number(from.value) && item.score <= most && words.every((word) => item.texts.includes(word)));
    hits.sort(orders[order.value]);
    found.replaceChildren();
    add();
    status.textContent = hits.length ? `${count(hits.length)} of ${count(items.length)} images` : "No image matches.";
  };
  let waiting;
  form.addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(search, 120); });
  form.addEventListener("submit", (event) => { event.preventDefault(); search(); });
  more.addEventListener("click", add);
  search();
})();
