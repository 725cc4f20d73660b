"use strict";
const info = JSON.parse(document.getElementById("info").textContent);
const $ = (id) => document.getElementById(id);
const MARKS = { right: ["✓", "same person"], wrong: ["✗", "another person"], distractor: ["✗", "distractor"], junk: ["–", "junk, does not count"] };
const uploads = [];  // images of this visit, so that the browser's Back finds them again
let current = null;  // what is searched: {row} or {upload}; null while picking
let running = null;  // the AbortController of the question being asked

const make = (tag, name, text) => {
  const node = document.createElement(tag);
  if (name) node.className = name;
  if (text !== undefined) node.textContent = text;
  return node;
};
const address = (path) => `image?path=${encodeURIComponent(path)}&v=${info.version}`;
const facts = (hit) => [hit.label, hit.camid >= 0 ? `cam ${hit.camid}` : ""].filter(Boolean).join(" · ");
const fileName = (path) => path.split("/").pop();

function picture(path) {
  const frame = make("span", "frame"), image = make("img");
  image.alt = "";
  image.loading = "lazy";
  image.onerror = () => { image.remove(); frame.classList.add("gone"); };
  image.src = address(path);
  frame.append(image);
  return frame;
}

function card(path, title, open) {
  const item = make("li"), button = make("button", "card");
  button.type = "button";
  button.title = title;
  button.append(picture(path));
  button.onclick = () => open({ path });
  item.append(button);
  return [item, button];
}

function result(hit) {
  const [item, button] = card(hit.path, `${hit.path}\nSearch for this one`, go);
  const frame = button.firstChild;
  button.classList.add(hit.verdict);
  button.dataset.path = hit.path;
  frame.append(make("span", "place", hit.position));
  const score = make("span", "score", "");
  score.append(make("span", hit.match === false ? "below" : "", hit.score.toFixed(3)));
  if (hit.match !== null) score.append(make("small", hit.match ? "match" : "below", hit.match ? "match" : "no match"));
  const bar = make("meter");
  bar.value = Math.max(0, hit.score);
  bar.setAttribute("aria-hidden", "true");
  button.append(score, bar, make("span", "facts", facts(hit)), make("span", "name", fileName(hit.path).replace(/\.\w+$/, "")));
  let label = `${hit.position}: score ${hit.score.toFixed(3)} ${facts(hit)}`;
  if (MARKS[hit.verdict]) {
    const [mark, meaning] = MARKS[hit.verdict], badge = make("span", "badge", mark);
    badge.title = meaning;
    frame.append(badge);
    label += `, ${meaning}`;
  }
  button.setAttribute("aria-label", `${label}. Search for this one`);
  return item;
}

function fail(message) {
  $("error").textContent = message;
  $("error").hidden = !message;
}

function go(query) {  // a new search, which Back undoes
  history.pushState(query, "");
  show(query);
}

async function show(query) {
  current = query;
  if (!query || (query.upload !== undefined && !uploads[query.upload])) return pick();  // uploads do not outlive a reload
  const file = uploads[query.upload];
  const preview = $("preview");
  if (preview.src.startsWith("blob:")) URL.revokeObjectURL(preview.src);
  preview.classList.remove("gone");
  preview.src = file ? URL.createObjectURL(file) : address(query.path);
  $("facts").textContent = file ? file.name || "pasted image" : "";
  $("query").hidden = false;
  scrollTo(0, 0);
  await search(query, file);
}

async function search(query, file) {
  const wanted = new URLSearchParams({ topk: $("topk").value });
  for (const box of document.querySelectorAll("#cameras :checked")) wanted.append("camera", box.value);
  const body = new FormData();
  if (file) body.append("files", file);
  else wanted.set("path", query.path);
  const started = performance.now(), data = await ask(`search?${wanted}`, file ? { method: "POST", body } : {}, file);
  if (!data) return;
  const { query: known, hits } = data.rankings[0];
  if (known.path) $("facts").textContent = `${facts(known)} ${fileName(known.path)}`;
  $("title").textContent = "Results";
  $("status").textContent = `${hits.length} of ${info.images.toLocaleString("en")} images, ${(performance.now() - started).toFixed(0)} ms`
    + (data.threshold === null ? "" : `; a match scores above ${data.threshold.toFixed(3)}`);
  $("results").replaceChildren(...hits.map(result));
  fail(hits.length ? "" : "No image of the gallery is left by this filter.");
}

async function ask(url, options, file) {  // the server's answer; null where a later question has taken over, or with an error shown
  if (running) running.abort();
  const mine = running = new AbortController();
  document.body.classList.add("busy");
  $("status").textContent = "searching …";
  fail("");
  try {
    if (file && file.size > info.upload_limit) throw Error(`${file.name}: larger than ${info.upload_limit >> 20} MB`);
    const answer = await fetch(url, { ...options, signal: mine.signal });
    const data = await answer.json().catch(() => ({ error: `the server answered ${answer.status}` }));
    if (!answer.ok) throw Error(data.error);
    return mine === running ? data : null;
  } catch (error) {
    if (error.name === "AbortError" || mine !== running) return null;
    fail(error instanceof TypeError ? "The server does not answer; is it still running?" : error.message);
    $("status").textContent = "";
    $("title").textContent = "No results";
    $("results").replaceChildren();
    return null;
  } finally {
    if (mine === running) document.body.classList.remove("busy");
  }
}

async function pick() {  // some images of the gallery, to search with
  current = null;
  $("query").hidden = true;
  const data = await ask("sample", {});
  if (!data) return;
  $("title").textContent = "Choose a query";
  $("status").textContent = `from ${info.images.toLocaleString("en")} images of the gallery`;
  $("results").replaceChildren(...data.images.map((hit) => {
    const [item, button] = card(hit.path, `${hit.path}\nSearch for this one`, go);
    button.setAttribute("aria-label", `${fileName(hit.path)}. Search for this one`);
    return item;
  }));
}

function take(files) {
  const file = Array.from(files).find((one) => one.type.startsWith("image/")) || files[0];
  if (file) go({ upload: uploads.push(file) - 1 });
}

$("preview").onerror = () => $("preview").classList.add("gone");
$("about").textContent = `${info.images.toLocaleString("en")} images · ${info.model}`;
$("topk").max = info.topk_limit;
$("topk").value = Math.min(20, info.topk_limit);
for (const camera of info.cameras) {
  const chip = make("label", "", camera), box = make("input");
  box.type = "checkbox";
  box.value = camera;
  chip.append(box);
  document.querySelector(".chips").append(chip);
}
$("cameras").hidden = info.cameras.length < 2;

const again = () => { if (current && $("topk").reportValidity()) search(current, uploads[current.upload]); };
$("topk").onchange = again;
$("cameras").onchange = again;
$("pick").onclick = () => { if (current) history.pushState(null, ""); pick(); };
$("file").onchange = () => { take($("file").files); $("file").value = ""; };
addEventListener("paste", (event) => { if (event.clipboardData.files.length) take(event.clipboardData.files); });
addEventListener("dragover", (event) => { event.preventDefault(); document.body.classList.add("over"); });
addEventListener("dragleave", () => document.body.classList.remove("over"));
addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("over");
  take(event.dataTransfer.files);
});
addEventListener("popstate", (event) => show(event.state));
show(history.state);
