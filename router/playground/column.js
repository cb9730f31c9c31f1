// One of the three answers side by side.

import { Placer, ThinkingSplitter, shade, visible } from "./tokens.js";

const SVG = "http://www.w3.org/2000/svg";
const SHOWN_MS = 200; // between two updates of the numbers
const FEWEST_BARS = 48; // minimum width of the strip, in tokens

const KINDS = {
  target: { title: "Target alone", about: "The large model as it is. Nobody trained it to reason." },
  guider: { title: "Guider alone", about: "The small model that was trained to reason. It knows less." },
  guided: { title: "Guided", about: "The large model, its logits shifted by what the training changed in the small one." },
};

export class Column {
  /** kind: of KINDS. inspector: shows the tokens of the guided answer. */
  constructor(kind, template, inspector) {
    const root = template.content.firstElementChild.cloneNode(true);
    this.kind = kind;
    this.root = root;
    this.title = KINDS[kind].title;
    this.parts = Object.fromEntries(
      ["state", "model", "about", "numbers", "strip", "thinking", "length", "answer", "trouble", "legend"].map((name) => [
        name,
        root.querySelector(name === "trouble" ? ".column > .trouble" : `.${name}`),
      ]),
    );
    this.parts.thought = root.querySelector(".thinking .text");
    root.dataset.kind = kind;
    const heading = root.querySelector("h2");
    heading.textContent = this.title;
    heading.id = `heading-${kind}`;
    root.setAttribute("aria-labelledby", heading.id);
    this.parts.about.textContent = KINDS[kind].about;
    if (kind === "guided") {
      this.inspector = inspector;
      inspector.watch(this.parts.thought, "Thinking");
      inspector.watch(this.parts.answer, "Answer");
    }
  }

  set model(name) {
    this.parts.model.textContent = name;
  }

  /** The announcement for screen readers after the end. */
  get announcement() {
    return `${this.title}: ${this.parts.trouble.textContent || this.parts.answer.textContent || "no answer"}`;
  }

  begin() {
    const { parts } = this;
    for (const text of [parts.thought, parts.answer]) text.replaceChildren();
    for (const part of [parts.about, parts.thinking, parts.trouble, parts.legend, parts.strip]) part.hidden = true;
    parts.strip.firstChild.replaceChildren();
    this.inspector?.clear();
    this.tokens = [];
    this.thought = new ThinkingSplitter();
    this.placer = new Placer((part, text, token) => this.#place(part, text, token));
    this.counts = { tokens: 0, thinking: 0, changed: 0, drafted: 0, reasoned: false };
    this.usage = this.reason = null;
    this.first = this.last = null; // milliseconds from the request to tokens
    this.root.setAttribute("aria-busy", "true");
    this.#say("waiting");
    this.#number(true);
  }

  /** Process one chunk of the stream. ms: since the request. */
  take(chunk, ms) {
    if (chunk.usage) this.usage = chunk.usage;
    for (const choice of chunk.choices ?? []) {
      const { reasoning, content } = choice.delta ?? {};
      const texts = [];
      if (reasoning) texts.push(["thinking", reasoning]);
      if (content) texts.push(...(reasoning || this.counts.reasoned ? [["answer", content]] : this.thought.content(content)));
      if (reasoning) this.counts.reasoned = true;
      const tokens = choice.guidance?.tokens ?? [];
      if (tokens.length || content || reasoning) {
        this.last = ms;
        this.first ??= ms;
      }
      this.counts.tokens += tokens.length;
      this.placer.add(texts, tokens);
      if (choice.finish_reason) this.reason = choice.finish_reason;
    }
    if (this.first !== null) this.#say(this.parts.thinking.hidden || this.parts.answer.firstChild ? "answering" : "thinking");
    this.#number(false);
  }

  /** End of the stream. how: "done", "stopped" or "failed". trouble: error message for the reader. */
  end(how, trouble = "") {
    const rest = this.thought.flush();
    this.placer.add(rest ? [["answer", rest]] : [], []);
    this.placer.finish();
    this.parts.trouble.textContent = trouble;
    this.parts.trouble.hidden = !trouble;
    this.root.setAttribute("aria-busy", "false");
    this.#say(how === "done" && this.reason === "length" ? "cut at its longest" : how);
    this.#number(true);
  }

  #say(state) {
    this.parts.state.textContent = state;
    this.root.dataset.state = state;
  }

  #place(part, text, token) {
    const { parts } = this;
    const into = part === "thinking" ? parts.thought : parts.answer;
    if (part === "thinking") parts.thinking.hidden = false;
    const again = token && this.tokens.at(-1) === token; // its text continues in the other part
    if (token && !again) this.#count(part, token);
    const shown = text || token?.text; // a thinking mark, or what a stop text cut off, is shown by its name
    if (!this.inspector || !token) {
      into.append(text);
    } else if (shown) {
      const mark = document.createElement("span");
      mark.className = text ? "token" : "token mark";
      const inked = shown.trimStart() || shown;
      mark.textContent = text ? inked : visible(inked);
      into.append(shown.slice(0, shown.length - inked.length)); // no shade at the end of a line for a space
      mark.style.setProperty("--shade", shade(token).toFixed(3));
      mark.classList.toggle("changed", token.changed);
      into.append(mark);
      this.inspector.register(mark, token, this.tokens.length);
    }
  }

  #count(part, token) {
    this.tokens.push(token);
    if (part === "thinking") this.counts.thinking += 1;
    if (token.changed) this.counts.changed += 1;
    if (token.drafted) this.counts.drafted += 1;
    this.parts.length.textContent = tokens(this.counts.thinking);
    if (!this.inspector) return;
    const bar = document.createElementNS(SVG, "rect");
    const height = 0.06 + 0.94 * shade(token);
    const place = { x: this.tokens.length - 0.9, width: 0.8, y: 1 - height, height };
    for (const [name, value] of Object.entries(place)) bar.setAttribute(name, value);
    if (token.changed) bar.classList.add("changed");
    const bars = this.parts.strip.firstChild;
    bars.setAttribute("viewBox", `0 0 ${Math.max(FEWEST_BARS, this.tokens.length)} 1`);
    bars.append(bar);
    this.parts.strip.hidden = this.parts.legend.hidden = false;
  }

  /** Update the numbers above the answer: now, or if the last update is old enough. */
  #number(now) {
    if (!now && performance.now() - (this.numbered ?? 0) < SHOWN_MS) return;
    this.numbered = performance.now();
    const { counts, usage } = this;
    const generated = usage?.completion_tokens ?? counts.tokens;
    const took = (this.last - this.first) / 1000;
    const rows = [
      ["tokens", `${generated}`],
      ["tokens/s", took > 0 && generated > 1 ? ((generated - 1) / took).toFixed(generated / took < 10 ? 1 : 0) : "–"],
      ["to the first", this.first === null ? "–" : seconds(this.first)],
    ];
    if (this.inspector) {
      rows.push(["changed", `${usage?.guidance?.changed_tokens ?? counts.changed}`]);
      rows.push(["drafts kept", kept(usage?.speculation, counts.drafted)]);
    }
    this.parts.numbers.replaceChildren(...rows.map(row));
    this.parts.numbers.hidden = false;
  }
}

/** Share of accepted drafts; until the end, only the number of accepted ones is known. */
function kept(speculation, drafted) {
  if (!speculation) return drafted ? `${drafted}` : "–";
  const { drafted_tokens: all, acceptance } = speculation;
  return all ? `${Math.round(100 * acceptance)} % of ${all}` : "none made";
}

function row([name, value]) {
  const [group, term, number] = ["div", "dt", "dd"].map((tag) => document.createElement(tag));
  term.textContent = name;
  number.textContent = value;
  group.append(term, number);
  return group;
}

function tokens(count) {
  return `${count} ${count === 1 ? "token" : "tokens"}`;
}

function seconds(ms) {
  return ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(1)} s`;
}
