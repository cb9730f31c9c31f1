// Prepares the playground for recordings: their questions only, and a note of what was recorded.

import "./app.js";
import { named, recording, recordings, showAtOnce } from "./service.js";

const $ = (id) => document.getElementById(id);

function make(tag, { text = "", children = [], ...properties } = {}) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(text, ...children);
  return element;
}

/** What was recorded: models, settings, date and command. */
function note() {
  const { title, about, models, settings, date, command, cores } = recording;
  const machine = cores ? ` on ${cores} CPU ${cores === 1 ? "core" : "cores"}` : "";
  const facts = [
    `Target: ${models.target}; guider: ${models.guider}; guider base: ${models.guider_base}.`,
    `α ${settings.alpha}, warm-up ${settings.warmup_tokens} tokens, temperature ${settings.temperature}, at most`,
    `${settings.max_tokens} tokens, seed ${settings.seed}. Recorded${machine} on ${date} by`,
  ];
  const paragraphs = [
    make("p", { children: [make("strong", { text: "Recorded answers: nothing is computed here." }), ` ${title}. ${about}`] }),
    make("p", {
      className: "facts",
      children: [facts.join(" ") + " ", make("code", { text: command }), ". The numbers above an answer are those of the recording."],
    }),
  ];
  const links = recordings.map(({ name, title }) => {
    const link = make("a", { href: `#${name}`, text: title });
    if (name === recording.name) link.ariaCurrent = "page";
    return make("li", { children: [link] });
  });
  const choice = make("nav", { ariaLabel: "Recordings", children: [make("ul", { children: links })] });
  return make("section", { id: "recorded", ariaLabel: "Recording", children: links.length > 1 ? [choice, ...paragraphs] : paragraphs });
}

$("form").before(note());
addEventListener("hashchange", () => named(location.hash) && location.reload());

$("key").hidden = true;
const settings = document.querySelector(".settings"); // the note has them
settings.hidden = settings.disabled = true; // disabled: not validated
document.querySelector("label[for=prompt]").textContent = "Recorded question";
$("prompt").readOnly = true;
$("prompt").value = recording.questions[0].question;
const gold = make("p", { id: "gold" });
$("prompt").after(gold);
function showGold() {
  const shown = recording.questions.find(({ question }) => question === $("prompt").value);
  gold.replaceChildren("The right answer: ", make("strong", { text: shown.gold }));
}
showGold();
const [enter, , , escape] = $("keys").querySelectorAll("kbd");
$("keys").replaceChildren(enter, " plays the answers, ", escape, " stops");
$("ask").textContent = "Play";
$("examples").ariaLabel = "Questions";
$("examples").addEventListener("click", ({ target }) => {
  if (!target.closest("button")) return;
  showGold();
  $("form").requestSubmit();
  if ($("columns").getBoundingClientRect().top > innerHeight / 2) $("columns").scrollIntoView(); // a small screen
});

const atOnce = make("button", { type: "button", id: "at-once", className: "plain", text: "Show at once" });
atOnce.addEventListener("click", () => {
  showAtOnce();
  $("prompt").focus();
});
$("stop").after(atOnce);
