// Matches explained tokens with the text that is streamed beside them.

const OPEN = "<think>";
const CLOSE = "</think>";
const STRONG = 4; // nats of shift for full shade
const LOST = 400; // characters of unmatched text after which they are shown without a token

/** Shade of a token, 0 to 1. Without a shift it only depends on whether guidance changed the token. */
export function shade(token) {
  if (typeof token.shift === "number") return Math.min(1, Math.abs(token.shift) / STRONG) ** 0.6;
  return token.changed ? 0.8 : 0;
}

/** A text with its white space made visible. */
export function visible(text) {
  return text.replace(/ /g, "␣").replace(/\n/g, "↵").replace(/\t/g, "⇥");
}

/** Separates thinking from answer if a service sends both as content, marked by <think> and </think>. */
export class ThinkingSplitter {
  #state = "undecided";
  #held = "";

  /** The displayable part of more content: pairs of "thinking" or "answer" and a text. */
  content(text) {
    this.#held += text;
    const shown = [];
    if (this.#state === "undecided") {
      const start = this.#held.trimStart();
      if (start.startsWith(OPEN)) {
        this.#state = "thinking";
        this.#held = start.slice(OPEN.length);
      } else if (!OPEN.startsWith(start)) {
        this.#state = "answer";
      }
    }
    if (this.#state === "thinking") {
      const end = this.#held.indexOf(CLOSE);
      const length = end < 0 ? this.#held.length - tail(this.#held) : end;
      shown.push(["thinking", this.#held.slice(0, length)]);
      this.#held = this.#held.slice(end < 0 ? length : end + CLOSE.length);
      if (end >= 0) this.#state = "answer";
    }
    if (this.#state === "answer") shown.push(["answer", this.flush()]);
    return shown.filter(([, part]) => part);
  }

  /** The text held back, at the end of the answer. */
  flush() {
    const rest = this.#held;
    this.#held = "";
    return rest;
  }
}

function tail(text) {
  for (let length = Math.min(CLOSE.length - 1, text.length); length > 0; length--) {
    if (CLOSE.startsWith(text.slice(-length))) return length;
  }
  return 0;
}

/**
 * Assigns each token its text. Thinking marks and ends of text have a token but no text; a character made of several
 * tokens appears only with the last one; text may arrive later than its tokens.
 *
 * place(part, text, token): a piece of "thinking" or "answer"; text is "" for a token without text, token is null for
 * text without a token.
 */
export class Placer {
  #texts = []; // [part, text] not yet placed
  #tokens = [];
  #part = null;

  constructor(place) {
    this.place = place;
  }

  add(texts, tokens) {
    this.#texts.push(...texts.filter(([, text]) => text));
    this.#tokens.push(...tokens);
    this.#settle(false);
  }

  finish() {
    this.#settle(true);
    for (const token of this.#tokens.splice(0)) this.#put("", token);
  }

  #settle(final) {
    while (this.#tokens.length) {
      const rest = this.#texts.map(([, text]) => text).join("");
      const { text } = this.#tokens[0];
      if (text && rest.startsWith(text)) {
        this.#take(text.length, this.#tokens.shift());
        continue;
      }
      const awaited = text.startsWith(rest) && !final; // the text of this token is still held back
      const next = this.#tokens.findIndex((token, at) => at > 0 && token.text && rest.includes(token.text));
      if (awaited || next < 0) {
        if (final || rest.length > LOST) this.#take(Infinity, null);
        return;
      }
      const [first, ...others] = this.#tokens.splice(0, next);
      const length = rest.indexOf(this.#tokens[0].text);
      if (length) this.#take(length, first);
      else this.#put("", first);
      for (const other of others) this.#put("", other);
    }
    this.#take(Infinity, null);
  }

  #take(length, token) {
    while (length > 0 && this.#texts.length) {
      const [part, text] = this.#texts[0];
      this.#part = part;
      this.#put(text.slice(0, length), token);
      if (text.length > length) this.#texts[0] = [part, text.slice(length)];
      else this.#texts.shift();
      length -= text.length;
    }
  }

  #put(text, token) {
    this.place(this.#part ?? this.#texts[0]?.[0] ?? "answer", text, token);
  }
}
