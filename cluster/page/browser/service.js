// Client of recordings: the same functions as those of router/playground/service.js, without a service.
// cluster/page/recording.py describes what it reads.

const TOKEN_MS = 40; // 25 tokens a second can be read along
const CHANGED = 1, DRAFTED = 2; // flags of a token

const still = matchMedia("(prefers-reduced-motion: reduce)");

export const recordings = JSON.parse(document.getElementById("recordings").textContent);
/** The recording that the address names after its #, or the first. */
export const recording = named(location.hash) ?? recordings[0];

export function named(hash) {
  return recordings.find(({ name }) => hash === `#${name}`);
}

export const key = { get: () => "", set: () => {} }; // nothing asks for one

export class ServiceError extends Error {
  status = 0;
}

export async function models() {
  return { ...recording.served, longest: recording.longest };
}

export async function defaults() {
  return { ...recording.settings, examples: recording.questions.map(({ question }) => question) };
}

let playing = null; // signal of the answers that play, all at the same time
let hurried = null; // signal of those whose rest is shown at once

/** Play one answer, a token at a time: calls `take` with each chunk and the milliseconds that the service took for it. */
export async function stream({ model, messages }, signal, take) {
  const found = recording.questions.find(({ question }) => question === messages[0].content);
  const kind = Object.keys(recording.served).find((mode) => recording.served[mode] === model);
  if (!found) throw new ServiceError("This question was not recorded. Choose one of those below.");
  playing = signal;
  for (const [chunk, ms] of chunks(found.answers[kind])) {
    if (hurried !== signal && !still.matches) await new Promise((resolve) => setTimeout(resolve, TOKEN_MS));
    signal.throwIfAborted();
    take(chunk, ms);
  }
}

/** Show the rest of the answers that play. */
export function showAtOnce() {
  hurried = playing;
}

/** The chunks of an answer with one token each, as the service would send them. */
function* chunks({ chunks, finish_reason, usage }) {
  for (const [ms, reasoning, content, tokens] of chunks) {
    const rest = { reasoning, content };
    const explained = tokens.map(token);
    const last = explained.pop();
    for (const each of explained) yield [chunk(beginning(rest, each.text), [each]), ms];
    yield [chunk(rest, last ? [last] : []), ms];
  }
  const { completion_tokens, changed_tokens, ...speculation } = usage;
  yield [{ ...chunk({}, [], finish_reason), usage: { completion_tokens, guidance: { changed_tokens }, speculation } }];
}

function chunk(delta, tokens, finish_reason = null) {
  return { choices: [{ delta, finish_reason, guidance: { tokens } }] };
}

/** Cuts the text of a token off the texts of its chunk. What does not begin with it is left for the chunk's last token. */
function beginning(rest, text) {
  const part = rest.reasoning ? "reasoning" : "content";
  if (!text || !rest[part].startsWith(text)) return {};
  rest[part] = rest[part].slice(text.length);
  return { [part]: text };
}

/** An explained token, as the API has it. */
function token([entry, alpha, flags, shift = null, probability = null, target = [], guider = [], guided = []]) {
  const [id, text] = recording.vocabulary[entry];
  const models = { target: candidates(target), guider: candidates(guider), guided: candidates(guided) };
  return { id, text, alpha, changed: !!(flags & CHANGED), drafted: !!(flags & DRAFTED), shift, probability, ...models };
}

function candidates(packed) {
  const listed = [];
  for (let at = 0; at < packed.length; at += 2) {
    const [id, text] = recording.vocabulary[packed[at]];
    listed.push({ id, text, probability: packed[at + 1] });
  }
  return listed;
}
