"use strict";
// One JSON object (see omnidata/inspect/html_report.py) becomes the page. Text of the dataset only ever enters the
// document as text nodes, so nothing in a corpus can become markup or code.
const data = JSON.parse(document.getElementById("data").textContent);
const { summary, samples, rejects } = data;
const find = (id) => document.getElementById(id);
const whole = (n) => Math.round(n).toLocaleString("en");
const short = (n) => (Number.isInteger(n) || n >= 100 ? whole(n) : n.toFixed(1));
const percent = (n) => `${(100 * n).toFixed(n > 0 && n < 0.1 ? 1 : 0)} %`;
const plural = (n, word) => `${whole(n)} ${word}${n === 1 ? "" : "s"}`;

function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in element && !name.startsWith("aria")) element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

// --- overview ----------------------------------------------------------------------------------------------

function drawHead() {
  const name = summary.dataset + (summary.split ? ` (${summary.split})` : "") + (summary.where ? ` where ${summary.where}` : "");
  document.title = `${name}: dataset report`;
  find("title").textContent = name;
  const splits = Object.entries(summary.splits).map(([split, n]) => `${split} ${whole(n)}`).join(", ");
  find("subtitle").textContent =
    `${splits} · image policy ${summary.image_policy}, ${summary.model}'s pictures · ` +
    `schema ${summary.schema_version} · tokenizer ${summary.tokenizer_fingerprint.slice(0, 12) || "unknown"}`;
}

function drawTotals() {
  const totals = [
    ["Samples", whole(summary.num_samples), `of ${plural(summary.num_records, "record")}`],
    ["Images", whole(summary.num_images), `${short(summary.images_per_sample.mean)} a sample`],
    ["Tokens", whole(summary.num_tokens), `${short(summary.tokens_per_sample.mean)} a sample`],
    ["Supervised", percent(summary.supervised_share), `${plural(summary.num_supervised, "token")}`],
    ["Rejected", whole(summary.num_rejects), `${percent(summary.num_rejects / Math.max(1, summary.num_records))} of the records`],
    ["Shards", whole(summary.num_shards), data.size],
  ];
  if (summary.num_truncated) totals.push(["Truncated", whole(summary.num_truncated), "lost turns to the length limit"]);
  find("totals").append(...totals.map(([name, value, note]) =>
    make("div", {}, make("dt", { textContent: name }), make("dd", { textContent: value }, make("small", { textContent: note })))));
}

function svg(tag, attributes, text) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== undefined) element.textContent = text;
  return element;
}

function drawChart(title, distribution, show) {
  const bins = distribution.histogram;
  const label = (bin) => (bin.first === bin.last ? show(bin.first) : `${show(bin.first)} – ${show(bin.last)}`);
  const [width, height, base] = [300, 120, 100];
  const top = Math.max(1, ...bins.map((bin) => bin.count));
  const step = width / Math.max(1, bins.length);
  const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `Histogram of ${title}` });
  bins.forEach((bin, i) => {
    const tall = bin.count ? Math.max(2, (bin.count / top) * (base - 6)) : 0;
    const gap = Math.min(2, step * 0.15);
    const bar = svg("rect", { x: i * step + gap / 2, y: base - tall, width: step - gap, height: tall, rx: 1.5 });
    bar.append(svg("title", {}, `${label(bin)}: ${whole(bin.count)}`));
    picture.append(bar);
  });
  picture.append(svg("line", { x1: 0, x2: width, y1: base + 0.5, y2: base + 0.5 }));
  if (bins.length) {
    picture.append(svg("text", { x: 0, y: height - 5 }, show(bins[0].first)));
    if (bins.length > 1) picture.append(svg("text", { x: width, y: height - 5, "text-anchor": "end" }, show(bins.at(-1).last)));
  }
  const numbers = ["min", "median", "p95", "max"].map((name) => `${name} ${show(distribution[name])}`).join(" · ");
  const rows = bins.map((bin) => make("tr", {}, make("td", { textContent: label(bin) }), make("td", { textContent: whole(bin.count) })));
  return make("figure", {}, make("figcaption", { textContent: title }, make("span", { textContent: numbers })), picture,
    make("details", {}, make("summary", { textContent: "As a table" }), make("table", {}, make("tbody", {}, ...rows))));
}

function drawColumn(column) {
  const about = `${plural(column.num_distinct, "value")}` + (column.num_missing ? ` · ${whole(column.num_missing)} samples without` : "");
  if (column.distribution) {
    const figure = drawChart(column.name, column.distribution, short);
    figure.querySelector("figcaption span").textContent += ` · ${about}`;
    return figure;
  }
  const rows = column.values.map((v) => make("tr", {}, make("td", { textContent: v.value }), make("td", { textContent: whole(v.count) })));
  if (column.num_distinct > rows.length) rows.push(make("tr", {}, make("td", { textContent: `… and ${whole(column.num_distinct - rows.length)} more` }), make("td")));
  return make("figure", {}, make("figcaption", { textContent: column.name }, make("span", { textContent: about })),
    make("table", {}, make("tbody", {}, ...rows)));
}

function drawOverview() {
  drawHead();
  drawTotals();
  find("charts").append(
    drawChart("Tokens a sample", summary.tokens_per_sample, short),
    drawChart("Supervised share", summary.supervised_per_sample, percent),
    drawChart("Images a sample", summary.images_per_sample, short),
    drawChart("Tokens an image", summary.tokens_per_image, short),
    drawChart("Longer side of an image, px", summary.longer_side, short),
    ...summary.columns.map(drawColumn));
  const head = ["Source", "Samples", "Tokens", "Supervised", "Images", "Rejected"];
  find("sources").append(
    make("thead", {}, make("tr", {}, ...head.map((name) => make("th", { scope: "col", textContent: name })))),
    make("tbody", {}, ...summary.sources.map((s) => make("tr", {}, ...[
      s.source, whole(s.num_samples), whole(s.num_tokens), percent(s.num_supervised / Math.max(1, s.num_tokens)),
      whole(s.num_images), whole(s.num_rejects)].map((cell) => make("td", { textContent: cell }))))));
  find("cost").append(...facts(data.cost));
}

const facts = (pairs) => pairs.flatMap(([name, value]) => [make("dt", { textContent: name }), make("dd", { textContent: value })]);

// --- gallery -----------------------------------------------------------------------------------------------

const textOf = (sample) => sample.runs.map((run) => run.pieces.map((piece) => piece[0]).join("")).join("");
const area = (sample) => Math.max(0, ...sample.sizes.map(([w, h]) => w * h));
const orders = {
  "as stored": (a, b) => a.position - b.position,
  "longest first": (a, b) => b.tokens - a.tokens,
  "shortest first": (a, b) => a.tokens - b.tokens,
  "least supervised first": (a, b) => a.supervised / a.tokens - b.supervised / b.tokens,
  "largest image first": (a, b) => area(b) - area(a),
};
let shown = []; // the samples that the filter lets through, in order
let sorted = []; // all of them, in order
let sortedBy = null;

function drawCard(sample) {
  const thumbs = sample.thumbs.map((thumb) => make("img", { src: thumb, alt: "", loading: "lazy", decoding: "async" }));
  const picture = make("span", { className: "thumb" }, ...(thumbs.length ? thumbs.slice(0, 3) : [make("span", { className: "none", textContent: "text only" })]));
  if (sample.sizes.length) {
    const size = sample.sizes[0].join("×");
    picture.append(make("span", { className: "badge", textContent: sample.sizes.length > 1 ? `${size} +${sample.sizes.length - 1}` : size }));
  }
  const meter = make("span", { className: "meter", "aria-hidden": "true" }, make("i"));
  meter.firstChild.style.width = percent(sample.supervised / sample.tokens).replace(" ", "");
  const meta = `#${sample.position} · ${plural(sample.tokens, "token")}, ${percent(sample.supervised / sample.tokens)} supervised · ${sample.split}`;
  const body = make("span", { className: "card-body" }, make("span", { className: "card-text", textContent: sample.snippet }),
    meter, make("span", { className: "card-meta", textContent: meta }));
  const card = make("button", { type: "button", className: "card", onclick: () => openSample(sample) }, picture, body);
  sample.item = make("li", {}, card);
  return sample.item;
}

function prepare(sample) {
  const text = textOf(sample);
  const said = sample.runs.filter((run) => run.supervised && run.kind === "text").map((run) => run.pieces.map((piece) => piece[0]).join("")).join(" … ");
  sample.snippet = said.trim().slice(0, 300) || text.slice(0, 300);
  sample.haystack = [text, sample.key, sample.id, sample.source, sample.locator, ...sample.kept.map((pair) => pair[1])].join("\n").toLowerCase();
}

function options(select, pairs) {
  select.append(...pairs.map(([value, text]) => make("option", { value, textContent: text })));
}

function drawGallery() {
  samples.forEach(prepare);
  find("gallery").append(...samples.map(drawCard));
  const distinct = (name) => [...new Set(samples.map((sample) => sample[name]))].map((value) => [value, value]);
  options(find("split"), [["", "all"], ...distinct("split")]);
  options(find("source"), [["", "all"], ...distinct("source")]);
  options(find("images"), [["", "any"], ["0", "none"], ["1", "one"], ["2", "two or more"]]);
  options(find("order"), Object.keys(orders).map((name) => [name, name]));
  find("filters").addEventListener("input", filter);
  find("filters").addEventListener("submit", (event) => event.preventDefault());
  filter();
}

function sortGallery(order) {
  if (order === sortedBy) return; // moving a thousand cards is the slow part
  sorted = [...samples].sort(orders[order]);
  sortedBy = order;
  find("gallery").append(...sorted.map((sample) => sample.item));
}

function filter() {
  const words = find("query").value.toLowerCase().split(/\s+/).filter(Boolean);
  const [split, source, images] = ["split", "source", "images"].map((id) => find(id).value);
  const fits = (sample) =>
    words.every((word) => sample.haystack.includes(word)) && (!split || sample.split === split) &&
    (!source || sample.source === source) && (!images || Math.min(2, sample.sizes.length) === Number(images));
  sortGallery(find("order").value);
  shown = sorted.filter(fits);
  const keep = new Set(shown);
  for (const sample of samples) {
    const hide = !keep.has(sample);
    if (sample.item.hidden !== hide) sample.item.hidden = hide;
  }
  const all = samples.length < summary.num_samples ? `; the report holds ${whole(samples.length)} of the dataset's ${whole(summary.num_samples)}` : "";
  find("count").textContent = `${whole(shown.length)} of ${plural(samples.length, "sample")} shown${all}`;
}

// --- one sample --------------------------------------------------------------------------------------------

let current = null;

function drawRun(run, sample) {
  const names = ["run", run.supervised && "sup", run.kind === "special" && "special"].filter(Boolean).join(" ");
  if (run.kind === "image") {
    const size = sample.sizes[run.image];
    return make("span", { className: "chip", textContent: `image ${run.image + 1} · ${size ? size.join("×") : "missing"}${sample.parts[run.image] ? ` · ${sample.parts[run.image]}` : ""} · ${plural(run.num_tokens, "token")}` });
  }
  const pieces = run.pieces.map(([text, ids]) => {
    const shownIds = [ids].flat().join(" ");
    const piece = make("span", { className: "piece", title: `id ${shownIds}`, textContent: text });
    piece.dataset.ids = shownIds;
    return piece;
  });
  return make("span", { className: names }, ...pieces);
}

function openSample(sample) {
  current = sample;
  find("viewer-title").textContent = `#${sample.position} ${sample.key}`;
  find("facts").replaceChildren(...facts([
    ["record", sample.id], ["from", `${sample.source}, ${sample.locator}`], ["split", sample.split],
    ...sample.kept,
    ["tokens", `${whole(sample.tokens)}, ${whole(sample.supervised)} supervised (${percent(sample.supervised / sample.tokens)})`]]));
  find("pictures").replaceChildren(...sample.thumbs.map((thumb, i) => make("figure", {},
    make("img", { src: thumb, alt: `Image ${i + 1} of the sample` }),
    make("figcaption", { textContent: `image ${i + 1}: ${sample.sizes[i].join("×")} px${sample.parts[i] ? `, ${sample.parts[i]}` : ""}` }))));
  find("text").replaceChildren(...sample.runs.map((run) => drawRun(run, sample)));
  const at = shown.indexOf(sample);
  find("previous").disabled = at <= 0;
  find("next").disabled = at < 0 || at >= shown.length - 1;
  if (!find("viewer").open) find("viewer").showModal();
  find("viewer").scrollTop = 0;
}

function move(by) {
  const next = shown[shown.indexOf(current) + by];
  if (current && shown.includes(current) && next) openSample(next);
}

function watchViewer() {
  find("previous").onclick = () => move(-1);
  find("next").onclick = () => move(1);
  find("close").onclick = () => find("viewer").close();
  find("ids").onchange = () => find("text").classList.toggle("with-ids", find("ids").checked);
  find("viewer").addEventListener("keydown", (event) => {
    if (event.key === "ArrowLeft") move(-1);
    if (event.key === "ArrowRight") move(1);
  });
  find("viewer").addEventListener("click", (event) => { if (event.target === find("viewer")) find("viewer").close(); });
}

// --- extremes and rejects ----------------------------------------------------------------------------------

const edgeTitles = { longest: "Longest", shortest: "Shortest", least_supervised: "Least supervised", largest_image: "Largest image" };
const edgeValue = {
  longest: (s) => plural(s.tokens, "token"), shortest: (s) => plural(s.tokens, "token"),
  least_supervised: (s) => percent(s.supervised / s.tokens), largest_image: (s) => s.sizes.reduce((a, b) => (a[0] * a[1] >= b[0] * b[1] ? a : b)).join("×"),
};

function drawExtremes() {
  const at = new Map(samples.map((sample) => [sample.position, sample]));
  for (const [name, refs] of Object.entries(summary.extremes)) {
    const buttons = refs.map((ref) => at.get(ref.position)).filter(Boolean).map((sample) => make("button", { type: "button", onclick: () => openSample(sample) },
      make("span", { textContent: sample.snippet }), make("span", { textContent: edgeValue[name](sample) })));
    const none = make("p", { className: "muted", textContent: "none" });
    find("edges").append(make("div", { className: "panel" }, make("h3", { textContent: edgeTitles[name] }), make("div", { className: "edge" }, ...(buttons.length ? buttons : [none]))));
  }
}

function drawRejects() {
  const cards = rejects.map((reject) => {
    const card = make("article", { className: "reject" }, make("b", { textContent: reject.reason }),
      `${reject.source}, ${reject.locator}${reject.id ? ` (${reject.id})` : ""}`, make("div", { textContent: reject.detail }));
    if (reject.raw) card.append(make("details", {}, make("summary", { textContent: "Raw record" }), make("pre", { textContent: reject.raw })));
    card.dataset.reason = reject.reason;
    return card;
  });
  find("reject-list").append(...cards);
  const choose = (reason) => {
    let count = 0;
    for (const card of cards) { card.hidden = Boolean(reason) && card.dataset.reason !== reason; count += !card.hidden; }
    for (const button of find("reject-bar").children) button.setAttribute("aria-pressed", button.dataset.reason === reason);
    const all = rejects.length < summary.num_rejects ? `; the report holds ${whole(rejects.length)} of ${whole(summary.num_rejects)}` : "";
    find("reject-count").textContent = rejects.length ? `${whole(count)} of ${plural(rejects.length, "reject")} shown${all}` : "No record was rejected.";
  };
  const add = (reason, text, title) => {
    const button = make("button", { type: "button", textContent: text, title, onclick: () => choose(reason) });
    button.dataset.reason = reason;
    find("reject-bar").append(button);
  };
  if (rejects.length) add("", "all", "Every reason");
  for (const [reason, count] of Object.entries(summary.rejects)) add(reason, `${reason} ${whole(count)}`, data.reasons[reason] || "");
  choose("");
}

drawOverview();
drawGallery();
drawExtremes();
drawRejects();
watchViewer();
