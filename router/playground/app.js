// The page: reads the settings, requests all three modes at once, stops them, prompts for a key, changes the theme.

import { Column } from "./column.js";
import { Inspector } from "./inspector.js";
import { ServiceError, defaults, key, models, stream } from "./service.js";

const $ = (id) => document.getElementById(id);
const inspector = new Inspector($("inspector"), $("spoken"));
const columns = ["target", "guider", "guided"].map((kind) => new Column(kind, $("column"), inspector));
$("columns").append(...columns.map((column) => column.root));

let names = null; // model names by kind
let running = null; // AbortController of the running answers

async function start() {
  try {
    const [found, own] = await Promise.all([models(), defaults()]);
    const first = names === null;
    names = found;
    for (const column of columns) column.model = names[column.kind];
    if (first) applyDefaults(own);
    setTrouble("");
    return true;
  } catch (error) {
    showError(error);
    return false;
  }
}

function applyDefaults({ alpha, warmup_tokens, temperature, max_tokens, examples }) {
  slide("alpha", alpha);
  slide("warmup", warmup_tokens);
  $("temperature").value = temperature;
  $("max-tokens").max = names.longest;
  $("max-tokens").value = Math.min(max_tokens ?? $("max-tokens").value, names.longest);
  $("examples").replaceChildren(...examples.map(example));
}

function slide(id, value) {
  const slider = $(id);
  slider.max = Math.max(slider.max, value);
  slider.value = value;
  showValue(slider);
}

function showValue(slider) {
  const value = Number(slider.value);
  const text = slider.id === "alpha" ? value.toFixed(2) : `${value} ${value === 1 ? "token" : "tokens"}`;
  $(`${slider.id}-now`).value = text;
  slider.setAttribute("aria-valuetext", text);
}

function example(question) {
  const item = document.createElement("li");
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = question;
  button.addEventListener("click", () => {
    $("prompt").value = question;
    $("prompt").focus();
  });
  item.append(button);
  return item;
}

async function ask() {
  if (running || !$("form").reportValidity()) return;
  const own = new AbortController();
  running = own;
  busy(true);
  inspector.spoken.textContent = "Asking.";
  try {
    if (names === null && !(await start())) return;
    const settings = read();
    await Promise.all(columns.map((column) => answer(column, { ...settings, ...guidance(column.kind) }, own.signal)));
    inspector.spoken.textContent = own.signal.aborted ? "Stopped." : columns.map((column) => column.announcement).join("\n");
  } finally {
    running = null;
    busy(false);
  }
}

/** Request fields that all modes share. Draws a seed if none is set, so that the reader can repeat the request. */
function read() {
  const number = (id) => Number($(id).value);
  if ($("seed").value === "") $("seed").placeholder = crypto.getRandomValues(new Uint32Array(1))[0];
  return {
    messages: [{ role: "user", content: $("prompt").value.trim() }],
    temperature: number("temperature"),
    max_tokens: number("max-tokens"),
    seed: Number($("seed").value || $("seed").placeholder),
  };
}

function guidance(kind) {
  const strength = { alpha: Number($("alpha").value), warmup_tokens: Number($("warmup").value) };
  return { model: names[kind], guidance: { ...(kind === "guided" ? strength : {}), explain: true } };
}

async function answer(column, body, signal) {
  column.begin();
  try {
    await stream(body, signal, (chunk, ms) => column.take(chunk, ms));
    column.end("done");
  } catch (error) {
    if (error.name === "AbortError") return column.end("stopped");
    if (!(error instanceof ServiceError)) console.error(error);
    column.end("failed", error.message);
    if (error.status === 401) openKey(error.message);
  }
}

function stop() {
  if (!running) return;
  running.abort();
  $("prompt").focus();
}

function busy(is) {
  $("stop").hidden = !is;
  $("ask").setAttribute("aria-disabled", is);
}

function setTrouble(text) {
  $("trouble").textContent = text;
  $("trouble").hidden = !text;
}

function showError(error) {
  if (!(error instanceof ServiceError)) console.error(error);
  setTrouble(error.message);
  if (error.status === 401) openKey(error.message);
}

function openKey(why = "") {
  $("key-why").textContent = why;
  $("key-why").hidden = !why;
  $("key-text").value = key.get();
  if (!$("key-dialog").open) $("key-dialog").showModal();
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  ask();
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  ask();
});
$("stop").addEventListener("click", stop);
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !event.defaultPrevented && !$("key-dialog").open) stop();
});
for (const id of ["alpha", "warmup"]) $(id).addEventListener("input", (event) => showValue(event.target));

$("key").addEventListener("click", () => openKey());
$("key-cancel").addEventListener("click", () => $("key-dialog").close());
$("key-form").addEventListener("submit", () => {
  key.set($("key-text").value.trim());
  start();
});

const dark = matchMedia("(prefers-color-scheme: dark)");
function theme() {
  const now = document.documentElement.dataset.theme ?? (dark.matches ? "dark" : "light");
  $("theme").setAttribute("aria-pressed", now === "dark");
  return now;
}
$("theme").addEventListener("click", () => {
  document.documentElement.dataset.theme = theme() === "dark" ? "light" : "dark";
  try {
    localStorage.setItem("theme", theme());
  } catch {
    // without storage the choice lasts until the page is closed
  }
  theme();
});
dark.addEventListener("change", theme);
theme();
start();
