// The panel with details of one token; opened by mouse, touch or keyboard.

import { visible } from "./tokens.js";

const LEAVE_MS = 150; // time for the mouse to move from a token to its panel
const GAP = 8; // px between a token and its panel

const narrow = matchMedia("(max-width: 700px)"); // as in style.css

const MODELS = [
  ["target", "Target alone"],
  ["guider", "Guider alone"],
  ["guided", "Guided"],
];

export class Inspector {
  #tokens = new Map(); // by element: token and position, from 1
  #at = null; // the element whose panel is open
  #pinned = false; // opened by click or keyboard: stays open when the mouse leaves
  #leaving = 0;

  /** panel: element of the panel. spoken: live region for screen readers. */
  constructor(panel, spoken) {
    this.panel = panel;
    this.spoken = spoken;
    panel.addEventListener("pointerenter", () => clearTimeout(this.#leaving));
    panel.addEventListener("pointerleave", () => this.#leave());
    document.addEventListener("keydown", (event) => {
      if (event.key !== "Escape" || !this.#at) return;
      event.preventDefault(); // closes only this panel
      this.hide();
    });
    document.addEventListener("pointerdown", (event) => {
      if (!this.#tokens.has(event.target) && !panel.contains(event.target)) this.hide();
    });
    addEventListener("scroll", () => this.#at && this.#put(), { passive: true });
    addEventListener("resize", () => this.hide());
  }

  /** Make the tokens inside this element inspectable; arrow keys move between them. */
  watch(area, name) {
    area.addEventListener("pointerover", (event) => {
      if (event.pointerType === "mouse" && this.#tokens.has(event.target) && !this.#pinned) this.#show(event.target);
    });
    area.addEventListener("pointerout", () => this.#leave());
    area.addEventListener("click", (event) => {
      if (!this.#tokens.has(event.target)) return;
      if (this.#pinned && this.#at === event.target) return this.hide();
      this.#pin(event.target);
    });
    area.addEventListener("keydown", (event) => this.#walk(area, event));
    area.addEventListener("focus", () => area.matches(":focus-visible") && this.#step(area, area.querySelector(".last-seen, .token")));
    area.addEventListener("blur", () => this.hide());
    area.setAttribute("role", "group");
    area.setAttribute(
      "aria-label",
      `${name}, token by token. Left and right: the token before and after. Up and down: the one that guidance changed before and after.`,
    );
  }

  register(element, token, place) {
    this.#tokens.set(element, { token, place });
    element.parentElement.tabIndex = 0;
  }

  clear() {
    this.hide();
    for (const element of this.#tokens.keys()) element.parentElement?.removeAttribute("tabindex");
    this.#tokens.clear();
  }

  hide() {
    clearTimeout(this.#leaving);
    this.#at?.classList.remove("seen");
    this.#at = null;
    this.#pinned = false;
    this.panel.hidden = true;
  }

  #leave() {
    clearTimeout(this.#leaving);
    if (!this.#pinned) this.#leaving = setTimeout(() => this.hide(), LEAVE_MS);
  }

  #walk(area, event) {
    const all = [...area.querySelectorAll(".token")];
    const at = all.indexOf(area.querySelector(".last-seen"));
    const changed = (element) => element.classList.contains("changed");
    const to = {
      ArrowRight: () => all[at + 1],
      ArrowLeft: () => all[at - 1],
      ArrowDown: () => all.slice(at + 1).find(changed),
      ArrowUp: () => all.slice(0, Math.max(at, 0)).findLast(changed),
      Home: () => all[0],
      End: () => all.at(-1),
    }[event.key];
    if (!to) return;
    event.preventDefault();
    this.#step(area, to());
  }

  #step(area, element) {
    if (!element) return;
    area.querySelector(".last-seen")?.classList.remove("last-seen");
    element.classList.add("last-seen");
    this.#pin(element);
    const { token, place } = this.#tokens.get(element);
    this.spoken.textContent = `Token ${place}, ${quoted(token.text)}. ${verdict(token).join(" ")}`;
  }

  #pin(element) {
    element.scrollIntoView({ block: "nearest" });
    this.#show(element);
    this.#pinned = true;
    const hidden = element.getBoundingClientRect().bottom + GAP - this.panel.getBoundingClientRect().top;
    if (narrow.matches && hidden > 0) scrollBy({ top: hidden }); // the panel at the bottom would cover the token
  }

  #show(element) {
    clearTimeout(this.#leaving);
    if (this.#at === element) return;
    this.hide();
    this.#at = element;
    element.classList.add("seen");
    this.panel.replaceChildren(...panelOf(this.#tokens.get(element)));
    this.panel.hidden = false;
    this.#put();
  }

  /** Place the panel below the token, or above it if there is no room; narrow screens show it at the bottom (style.css). */
  #put() {
    const lines = this.#at.getClientRects();
    const token = lines[0] ?? this.#at.getBoundingClientRect();
    const { offsetWidth: width, offsetHeight: height } = this.panel;
    const left = Math.max(GAP, Math.min(token.left, document.documentElement.clientWidth - width - GAP));
    const below = token.bottom + GAP;
    const top = below + height > innerHeight && token.top - GAP - height > 0 ? token.top - GAP - height : below;
    this.panel.style.left = `${left}px`;
    this.panel.style.top = `${top}px`;
  }
}

function panelOf({ token, place }) {
  const head = make("p", "of");
  const facts = [`token ${place}`, `α ${token.alpha.toFixed(2)}`];
  if (token.drafted) facts.push("drafted ahead");
  head.append(make("code", "", visible(token.text) || "end of text"), make("span", "facts", facts.join(" · ")));
  const sentences = verdict(token).map((text, at) => make("p", at ? "verdict more" : "verdict", text));
  const lists = MODELS.filter(([name]) => token[name]?.length).map(([name, title]) => listOf(title, token[name], token.id));
  const models = make("div", "models");
  models.append(...lists);
  return lists.length ? [head, ...sentences, models] : [head, ...sentences];
}

function listOf(title, candidates, chosen) {
  const list = make("ol");
  for (const { id, text, probability } of candidates) {
    const item = make("li", id === chosen ? "chosen" : "");
    const bar = make("span", "bar");
    bar.style.setProperty("--share", probability);
    item.append(bar, make("code", "", visible(text) || "end of text"), make("span", "share", percent(probability)));
    if (id === chosen) item.append(make("span", "unseen", "(chosen)"));
    list.append(item);
  }
  const group = make("section");
  group.append(make("h3", "", title), list);
  return group;
}

/** One or two sentences about the effect of guidance. */
function verdict(token) {
  if (token.shift === null && token.probability === null) return ["Forced: no model chose this token."];
  if (!token.alpha) return ["Not guided: the target's own choice."];
  const own = token.target?.[0];
  const sentences = ["The target alone prefers this token too."];
  if (token.changed) sentences[0] = "The target alone prefers another token.";
  if (token.changed && own) sentences[0] = `The target alone prefers ${quoted(own.text)} (${percent(own.probability)}).`;
  if (typeof token.shift === "number") sentences.push(moved(token.shift));
  return sentences;
}

function moved(shift) {
  const times = Math.exp(Math.abs(shift));
  const nats = `${shift < 0 ? "−" : "+"}${Math.abs(shift).toFixed(2)} nats`;
  if (times < 1.05) return `Guidance hardly moved it (${nats}).`;
  const factor = times > 1000 ? "more than 1,000" : times >= 10 ? times.toFixed(0) : times.toFixed(1);
  return `Guidance made it ${factor} times ${shift < 0 ? "less likely" : "likelier"} (${nats}).`;
}

function percent(probability) {
  if (probability > 0 && probability < 0.001) return "< 0.1 %";
  return `${(100 * probability).toFixed(probability >= 0.0995 ? 0 : 1)} %`;
}

function quoted(text) {
  return text ? `“${text.trim() || visible(text)}”` : "to end here";
}

function make(tag, name = "", text = "") {
  const element = document.createElement(tag);
  if (name) element.className = name;
  if (text) element.textContent = text;
  return element;
}
