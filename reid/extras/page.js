"use strict";
const $ = (id) => document.getElementById(id);
const info = JSON.parse($("info").textContent);
const MARKS = { right: ["✓", "same person, by its label"], wrong: ["✗", "another person"], distractor: ["✗", "distractor, of no query"],
  junk: ["–", "junk, does not count"] };
const SETTINGS = ["topk", "first_frame", "last_frame"], SWITCHES = ["rerank", "group"];
const wide = matchMedia("(min-width: 721px)");
const uploads = [];  // files of this visit, so that the browser's Back finds them again
let queries = [];  // what is searched: {path}, or {upload}, a place in `uploads`
let answers = [];  // of each query: {query, hits} or {error}
let threshold = info.threshold;
let running = null;  // the AbortController of the search
let pairs = new Map(JSON.parse(sessionStorage.getItem("pairs") || "[]"));  // what was judged: {[query, path]: same}

const make = (tag, properties = {}, ...children) => {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
};
const button = (text, key, onclick, className = "plain") => {
  const node = make("button", { type: "button", className, textContent: text, onclick });
  node.dataset.key = key;
  return node;
};
const address = (path) => `image?path=${encodeURIComponent(path)}&v=${info.version}`;
const nameOf = (query) => query.path || uploads[query.upload].name;
const pictureOf = (query) => query.path ? address(query.path) : uploads[query.upload].url ||= URL.createObjectURL(uploads[query.upload].file);
const fileName = (path) => path.split("/").pop();
const facts = (image) => [image.label, image.camid >= 0 ? `cam ${image.camid}` : ""].filter(Boolean).join(" · ");
const isMatch = (hit) => threshold === null || $("rerank").checked ? null : hit.score > threshold;
const matchText = (hit) => ({ true: "match", false: "no match" })[isMatch(hit)] ?? "";
const count = (number, one, many = `${one}s`) => `${number.toLocaleString("en")} ${number === 1 ? one : many}`;

// Settings and queries in the address

function settings() {  // of a search, as the API takes them
  const wanted = new URLSearchParams();
  for (const id of SETTINGS) if ($(id).value) wanted.set(id, $(id).value);
  for (const box of document.querySelectorAll("#cameras :checked")) wanted.append("camera", box.value);
  if ($("rerank").checked) wanted.set("rerank", "true");
  return wanted;
}

function remember(method) {  // pushState or replaceState
  const all = settings();
  if ($("group").checked) all.set("group", "true");
  if (threshold !== info.threshold) all.set("threshold", threshold);
  for (const query of queries) if (query.path) all.append("path", query.path);
  history[method]({ queries }, "", `?${all}`);
}

function restore(state) {
  const all = new URLSearchParams(location.search);
  for (const id of SETTINGS) $(id).value = all.get(id) ?? (id === "topk" ? Math.min(20, info.topk_limit) : "");
  for (const id of SWITCHES) $(id).checked = all.has(id);
  for (const box of document.querySelectorAll("#cameras input")) box.checked = all.getAll("camera").includes(box.value);
  threshold = all.has("threshold") ? Number(all.get("threshold")) : info.threshold;
  const known = state?.queries?.every((query) => query.path || uploads[query.upload]);  // uploads do not outlive a reload
  queries = known ? state.queries : all.getAll("path").map((path) => ({ path }));
  showThreshold();
  queries.length ? search() : pick();
}

function go(wanted) {  // a new search, which Back undoes
  queries = wanted;
  remember("pushState");
  scrollTo(0, 0);
  search();
}

// Search

async function ask(url, options) {  // the answer; {error} where there is none, or the server refuses
  const answer = await fetch(url, options).catch(() => null);
  return answer ? answer.json().catch(() => ({ error: `the server answered ${answer.status}` }))
    : { error: "The server does not answer; is it still running?" };
}

function send(url, query, signal, fields = {}) {  // an uploaded query
  const body = new FormData(), { file, name } = uploads[query.upload];
  if (file.size > info.upload_limit) return { error: `${name}: larger than ${info.upload_limit >> 20} MB` };
  for (const [field, value] of Object.entries(fields)) body.append(field, value);
  body.append("files", file, name);
  return ask(url, { method: "POST", body, signal });
}

async function answerOf(query, wanted, signal) {
  const data = await (query.path ? ask(`search?${wanted}&path=${encodeURIComponent(query.path)}`, { signal })
    : send(`search?${wanted}`, query, signal));
  return data.error ? data : data.rankings[0];
}

async function whileBusy(title, work) {  // the result of the work; undefined where a later question has taken over
  running?.abort();
  const mine = running = new AbortController();
  document.body.classList.add("busy");
  $("status").textContent = `${title} …`;
  const found = await work(mine.signal);
  if (mine === running) document.body.classList.remove("busy");
  return mine === running ? found : undefined;
}

async function search() {
  const started = performance.now(), wanted = settings();
  const found = await whileBusy("searching", (signal) => Promise.all(queries.map((query) => answerOf(query, wanted, signal))));
  if (!found) return;
  answers = found;
  $("title").textContent = "Results";
  $("status").textContent = `${count(queries.length, "query", "queries")} in ${count(info.images, "image")}, `
    + `${(performance.now() - started).toFixed(0)} ms`;
  render();
}

async function pick() {  // some images of the gallery, to search with
  queries = answers = [];
  const found = await whileBusy("choosing", (signal) => ask("sample", { signal }));
  if (!found) return;
  $("title").textContent = "Choose a query";
  $("status").textContent = `from ${count(info.images, "image")} of the gallery, or drop images of your own`;
  const cards = (found.images || []).map((image) => make("li", { className: "card" }, picture(image, image.path, () => go([{ path: image.path }])),
    make("span", { className: "name", textContent: fileName(image.path) })));
  keepFocus(() => $("rows").replaceChildren(make("section", { className: "row open" },
    found.error ? errorLine(found.error) : make("ol", { className: "grid" }, ...cards))));
  $("save").hidden = true;
  $("legend").replaceChildren();
}

// What is shown

const errorLine = (text) => make("p", { className: "error", role: "alert", textContent: text });

function keepFocus(change) {  // on the control that takes the place of the focused one, or else on the title
  const inside = $("rows").contains(document.activeElement), key = document.activeElement?.dataset.key;
  change();
  if (inside) (Array.from($("rows").querySelectorAll("[data-key]")).find((one) => one.dataset.key === key) || $("title")).focus();
}

function picture(image, key, onclick, source = image.path && address(image.path)) {
  const frame = button("", key, onclick, "frame"), shown = make("img", { alt: "", loading: "lazy", src: source || "" });
  Object.assign(frame, { title: image.path, ariaLabel: `${facts(image)} ${fileName(image.path)}` });
  shown.onerror = () => { shown.remove(); frame.classList.add("gone"); };
  frame.append(shown);
  return frame;
}

function judgement(query, hit, key) {
  const pair = JSON.stringify([nameOf(query), hit.path]);
  return make("span", { className: "judge" }, ...[[true, "Same"], [false, "Not"]].map(([same, text]) => {
    const node = button(text, `${key} ${text}`, () => judge(pair, same), "");
    Object.assign(node, { title: `${same ? "Same" : "Not the same"} person: keep this pair`, ariaPressed: pairs.get(pair) === same });
    Object.assign(node.dataset, { same, pair });
    return node;
  }));
}

function judge(pair, same) {
  if (pairs.get(pair) === same) pairs.delete(pair);
  else pairs.set(pair, same);
  sessionStorage.setItem("pairs", JSON.stringify([...pairs]));
  for (const node of document.querySelectorAll("[data-pair]")) {
    if (node.dataset.pair === pair) node.ariaPressed = String(pairs.get(pair)) === node.dataset.same;
  }
  showPairs();
}

const showPairs = () => Object.assign($("pairs"), { textContent: `Pairs (${pairs.size})`, disabled: !pairs.size });

function card(query, place, hit) {
  const key = `${place} ${hit.path}`, frame = picture(hit, key, () => enlarge(place, hit.position - 1));
  const item = make("li", { className: `card ${hit.verdict}` }, frame);
  frame.append(make("span", { className: "place", textContent: hit.position }));
  frame.ariaLabel = `${hit.position}: score ${hit.score.toFixed(3)} ${frame.ariaLabel}`;
  if (MARKS[hit.verdict]) {
    const [mark, meaning] = MARKS[hit.verdict];
    frame.append(make("span", { className: "badge", textContent: mark, title: meaning }));
    frame.ariaLabel += `, ${meaning}`;
  }
  const judged = judgement(query, hit, key);
  judged.append(button("Find", `${key} search`, () => go([{ path: hit.path }]), "go"));
  judged.lastChild.title = "Search for this one";
  item.append(make("span", { className: "score" }, make("span", { textContent: hit.score.toFixed(3) }), make("small")),
    make("meter", { value: Math.max(0, hit.score), ariaHidden: "true" }), make("span", { className: "facts", textContent: facts(hit), title: facts(hit) }),
    make("span", { className: "name", textContent: fileName(hit.path), title: hit.path }), judged);
  Object.assign(item.dataset, { path: hit.path, score: hit.score });
  return Object.assign(item, { hit });
}

function groups(cards) {  // by person, in the order of their best images; images without a label last
  const found = [...Map.groupBy(cards, (one) => one.hit.label)].sort(([a], [b]) => (a === "") - (b === ""));
  return found.map(([label, own]) => make("section", { className: "group" },
    make("h3", { textContent: `${label || "without a label"} · ${count(own.length, "image")}` }), make("ol", { className: "grid" }, ...own)));
}

function row(query, place) {
  const answer = answers[place], known = answer.query?.path ? answer.query : { path: nameOf(query), label: "", camid: -1 };
  const own = make("div", { className: "query" }, picture(known, `${place} query`, () => query.path ? enlarge(place, 0) : draw(place), pictureOf(query)),
    make("b", { textContent: facts(known) || "Query" }), make("span", { className: "name", textContent: fileName(nameOf(query)), title: nameOf(query) }),
    make("span", { className: "faint matches" }));
  const tools = make("div", { className: "tools" });
  if (!query.path) tools.append(button("Draw boxes", `${place} boxes`, () => draw(place)));
  if (queries.length > 1) tools.append(button("Remove", `${place} remove`, () => go(queries.filter((one) => one !== query))));
  if (info.writable && !query.path) tools.append(enrolment(query, place));
  own.append(tools);
  const cards = (answer.hits || []).map((hit) => card(query, place, hit));
  const results = make("div", { className: "results" });
  if (answer.error) results.append(errorLine(answer.error));
  else if (!cards.length) results.append(errorLine("No image of the gallery is left by these filters."));
  else results.append(...$("group").checked ? groups(cards) : [make("ol", { className: "grid" }, ...cards)]);
  return make("section", { className: "row" }, own, results);
}

function render() {
  keepFocus(() => $("rows").replaceChildren(...queries.map(row)));
  $("rows").classList.toggle("many", queries.length > 1 && !$("group").checked);
  const shown = new Set(answers.flatMap((answer) => answer.hits || []).map((hit) => hit.verdict));
  $("legend").replaceChildren(...Object.entries(MARKS).filter(([name]) => shown.has(name)).map(([name, [mark, meaning]]) =>
    make("li", {}, make("span", { className: `badge ${name}`, textContent: mark, ariaHidden: "true" }), meaning)));
  $("save").hidden = !shown.size;
  showThreshold();
}

function showThreshold() {  // of the slider, on it and on every result
  const off = $("rerank").checked;
  $("threshold").disabled = off;
  $("threshold").value = threshold ?? 0.5;
  $("limit").textContent = off ? "not of re-ranked scores" : threshold === null ? "not measured" : threshold.toFixed(3);
  for (const section of $("rows").children) {
    let matches = 0;
    for (const item of section.querySelectorAll("[data-score]")) {
      item.dataset.match = isMatch(item.hit);
      item.querySelector("small").textContent = matchText(item.hit);
      matches += isMatch(item.hit) === true;
    }
    const text = section.querySelector(".matches");
    if (text) text.textContent = threshold === null || off ? "" : matches ? count(matches, "match", "matches") : "no match";
  }
}

// Enlarged

let large = null;  // [place of the query, place of the hit]

function enlarge(place, i) {
  const hit = answers[place].hits?.[i];
  if (!hit) return;
  large = [place, i];
  $("large_query").src = pictureOf(queries[place]);
  $("large_hit").src = address(hit.path);
  $("large_facts").textContent = [`${hit.position}.`, hit.score.toFixed(3), matchText(hit),
    facts(hit), hit.frame >= 0 ? `frame ${hit.frame}` : "", hit.path].filter(Boolean).join("  ");
  Object.assign($("erase"), { hidden: !info.writable || !hit.name, textContent: `Erase ${hit.name}`, onclick: () => erase(hit.name) });
  $("large_judge").replaceChildren(...judgement(queries[place], hit, "large").children);
  $("before").disabled = i === 0;
  $("after").disabled = i === answers[place].hits.length - 1;
  if (!$("large").open) $("large").showModal();
}

$("before").onclick = () => enlarge(large[0], large[1] - 1);
$("after").onclick = () => enlarge(large[0], large[1] + 1);
$("close").onclick = () => $("large").close();
$("large_search").onclick = () => { $("large").close(); go([{ path: answers[large[0]].hits[large[1]].path }]); };
$("large").onkeydown = (event) => ({ ArrowLeft: $("before"), ArrowRight: $("after") })[event.key]?.click();

// People, with --writable

async function showGallery() {  // its size, and the names that --writable has to choose from
  Object.assign($("about"), { textContent: `${count(info.images, "image")} · ${info.model}`, title: info.model });
  const { people } = info.writable ? await ask("people") : {};
  $("names").replaceChildren(...(people || []).map(({ name }) => make("option", { value: name })));
}

async function afterChange({ error, change, images }) {
  if (error) return $("rows").prepend(errorLine(error));
  info.images = images;
  showGallery();
  await (queries.length ? search() : pick());
  $("status").textContent = change;
}

function enrolment(query, place) {
  const name = make("input", { required: true, maxLength: 100, placeholder: "Name", ariaLabel: "Name of this person" });
  name.setAttribute("list", "names");
  name.dataset.key = `${place} name`;
  return make("form", { className: "tools", onsubmit: async (event) => {
    event.preventDefault();
    afterChange(await send("people", query, undefined, { name: name.value }));
  } }, name, make("button", { className: "plain", textContent: "Enrol", title: "Keep this image in the gallery under this name" }));
}

async function erase(name) {
  if (!confirm(`Erase all images of ${name} from the gallery? This cannot be undone.`)) return;
  $("large").close();
  afterChange(await ask(`people/${encodeURIComponent(name)}`, { method: "DELETE" }));
}

// Boxes of a frame

function drawBoxes({ file, name }, image) {  // the uploads that the boxes make; the whole image without one
  const boxes = [], stage = $("stage");
  const show = () => {
    stage.replaceChildren($("frame"), ...boxes.map(({ x, y, w, h }) => make("div", { className: "box",
      style: `left: ${100 * x}%; top: ${100 * y}%; width: ${100 * w}%; height: ${100 * h}%` })));
    $("undo").disabled = !boxes.length;
    $("done").textContent = boxes.length ? `Search ${boxes.length === 1 ? "this box" : `${boxes.length} boxes`}` : "Search the whole image";
  };
  const place = (event) => {  // in the image, 0..1
    const area = $("frame").getBoundingClientRect();
    return [(event.clientX - area.left) / area.width, (event.clientY - area.top) / area.height].map((at) => Math.min(1, Math.max(0, at)));
  };
  let start = null;
  stage.onpointerdown = (event) => {
    start = place(event);
    stage.setPointerCapture(event.pointerId);
    boxes.push({ w: 0, h: 0 });
  };
  stage.onpointermove = (event) => {
    if (!start) return;
    const [x, y] = place(event), [left, top] = start;
    Object.assign(boxes.at(-1), { x: Math.min(x, left), y: Math.min(y, top), w: Math.abs(x - left), h: Math.abs(y - top) });
    show();
  };
  stage.onpointerup = () => {
    start = null;
    if (boxes.at(-1).w * image.naturalWidth < 8 || boxes.at(-1).h * image.naturalHeight < 8) boxes.pop();  // a click
    show();
  };
  $("undo").onclick = () => { boxes.pop(); show(); };
  $("frame").src = image.src;
  show();
  $("boxes").showModal();
  return new Promise((resolve) => {
    $("done").onclick = () => $("boxes").close("done");
    $("boxes").onclose = async () => {
      if ($("boxes").returnValue !== "done") return resolve(null);  // Escape
      $("boxes").returnValue = "";
      resolve(boxes.length ? await Promise.all(boxes.map((box) => cutOut(image, name, box))) : [{ file, name }]);
    };
  });
}

async function cutOut(image, name, { x, y, w, h }) {
  const [left, top] = [Math.round(x * image.naturalWidth), Math.round(y * image.naturalHeight)];
  const canvas = make("canvas", { width: Math.round(w * image.naturalWidth), height: Math.round(h * image.naturalHeight) });
  canvas.getContext("2d").drawImage(image, -left, -top);
  const file = await new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
  return { file, name: `${name}#${left},${top},${left + canvas.width},${top + canvas.height}.png` };
}

async function loaded(file) {  // the image, or null where this browser cannot show it
  const image = make("img", { src: URL.createObjectURL(file) });
  return image.decode().then(() => image, () => null);
}

async function draw(place) {  // boxes on an image that is a query already
  const upload = uploads[queries[place].upload], image = await loaded(upload.file);
  const drawn = image && await drawBoxes(upload, image);
  if (drawn) go(queries.flatMap((query, i) => i === place ? drawn.map((one) => ({ upload: uploads.push(one) - 1 })) : [query]));
}

async function take(files) {  // images wider than high are frames of a camera
  const taken = [];
  for (const file of files) {
    const upload = { file, name: file.name || "pasted image" }, image = await loaded(file);
    const drawn = image && image.naturalWidth > image.naturalHeight ? await drawBoxes(upload, image) : [upload];
    for (const one of drawn || []) taken.push({ upload: uploads.push(one) - 1 });
  }
  if (taken.length) go(taken);
}

// Save

function download(name, type, content) {
  const link = make("a", { download: name, href: URL.createObjectURL(content instanceof Blob ? content : new Blob([content], { type })) });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
}

const table = (rows) => rows.map((row) => row.map((cell) => {
  const text = String(cell ?? "");
  return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}).join(",")).join("\r\n") + "\r\n";

const found = () => queries.map((query, i) => ({ query: nameOf(query), hits: (answers[i].hits || []).map((hit) => ({ ...hit, match: isMatch(hit) })) }));

const SAVE = {
  json: () => download("results.json", "application/json", JSON.stringify({ threshold: $("rerank").checked ? null : threshold, rankings: found() }, null, 1)),
  csv: () => download("results.csv", "text/csv", table([["query", "position", "score", "match", "label", "camid", "frame", "path"],
    ...found().flatMap(({ query, hits }) => hits.map((hit) => [query, hit.position, hit.score, hit.match, hit.label, hit.camid, hit.frame, hit.path]))])),
  pairs: () => download("pairs.csv", "text/csv", table([["query", "path", "same"], ...[...pairs].map(([pair, same]) => [...JSON.parse(pair), Number(same)])])),
  png: savePicture,
};

async function savePicture() {  // a line for each query, with ten hits at most
  const [width, height, gap] = [128, 256, 16], lines = found(), most = Math.min(10, Math.max(...lines.map(({ hits }) => hits.length)));
  const canvas = make("canvas", { width: (width + gap) * (most + 1) + 2 * gap, height: (height + 64) * lines.length + gap });
  const paper = canvas.getContext("2d"), fill = (colour, ...area) => { paper.fillStyle = colour; paper.fillRect(...area); };
  fill("#fff", 0, 0, canvas.width, canvas.height);
  const tile = async (source, x, y, lines, colour) => {
    const image = make("img", { src: source });
    await image.decode().catch(() => null);
    fill(colour, x - 4, y - 4, width + 8, height + 8);
    fill("#e9ecef", x, y, width, height);
    const scale = Math.min(width / image.naturalWidth, height / image.naturalHeight) || 0;
    const [w, h] = [scale * image.naturalWidth, scale * image.naturalHeight];
    if (scale) paper.drawImage(image, x + (width - w) / 2, y + (height - h) / 2, w, h);
    paper.fillStyle = "#1f2328";
    paper.font = "14px system-ui, sans-serif";
    lines.forEach((line, i) => paper.fillText(line, x, y + height + 22 + 18 * i, width + gap - 4));
  };
  for (const [i, { query, hits }] of lines.entries()) {
    const y = gap + (height + 64) * i;
    await tile(pictureOf(queries[i]), gap, y, ["Query", fileName(query)], "#1f2328");
    for (const [j, hit] of hits.slice(0, most).entries()) {
      await tile(address(hit.path), 2 * gap + (width + gap) * (j + 1), y, [`${hit.position}. ${hit.score.toFixed(3)} ${matchText(hit)}`, facts(hit)],
        { right: "#009e73", wrong: "#d55e00" }[hit.verdict] || "#d8dee4");
    }
  }
  canvas.toBlob((blob) => download("results.png", "image/png", blob));
}

// Controls

document.querySelector(".chips").append(...info.cameras.map((camera) =>
  make("label", { textContent: camera }, make("input", { type: "checkbox", value: camera }))));
$("topk").max = info.topk_limit;
$("cameras").hidden = info.cameras.length < 2;
(wide.onchange = () => { $("settings").open = wide.matches; })();
showPairs();
showGallery();

const again = () => {
  if (!SETTINGS.every((id) => $(id).reportValidity())) return;
  remember("replaceState");
  if (queries.length) search();
};
for (const id of [...SETTINGS, "cameras", "rerank"]) $(id).onchange = again;
$("group").onchange = () => { remember("replaceState"); if (answers.length) render(); };
$("threshold").oninput = () => { threshold = Number($("threshold").value); showThreshold(); };
$("threshold").onchange = () => remember("replaceState");
$("pick").onclick = () => { queries = []; remember("pushState"); pick(); };
$("file").onchange = () => { const files = [...$("file").files]; $("file").value = ""; take(files); };
for (const node of document.querySelectorAll("[data-save]")) node.onclick = () => SAVE[node.dataset.save]();
addEventListener("paste", (event) => { if (event.clipboardData.files.length) take([...event.clipboardData.files]); });
for (const kind of ["dragover", "dragleave", "drop"]) addEventListener(kind, (event) => {
  event.preventDefault();
  document.body.classList.toggle("over", kind === "dragover");
});
addEventListener("drop", (event) => take([...event.dataTransfer.files]));
addEventListener("popstate", (event) => restore(event.state));
restore(history.state);
