// The service as this page asks it: models, defaults, streamed answers, and errors in plain words.

const KEY = "api-key"; // in sessionStorage: this tab only, gone when it is closed

export const key = {
  get: () => stored(() => sessionStorage.getItem(KEY)) ?? "",
  set: (text) => stored(() => (text ? sessionStorage.setItem(KEY, text) : sessionStorage.removeItem(KEY))),
};

function stored(act) {
  try {
    return act();
  } catch {
    return null; // storage is switched off
  }
}

/** What went wrong, in words for the reader. status: of HTTP, 0 where no answer came. */
export class Trouble extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

/** The names of the three modes as /v1/models lists them, and the tokens that a session may have. */
export async function models() {
  const { data } = await (await asked("v1/models")).json();
  const names = new Set(data.map((card) => card.id));
  const guided = data.find((card) => names.has(`${card.id}/target`) && names.has(`${card.id}/guider`));
  if (!guided) throw new Trouble("This service lists no guided model beside its target and its guider.");
  return { target: `${guided.id}/target`, guider: `${guided.id}/guider`, guided: guided.id, longest: guided.max_model_len };
}

/** The service's own defaults for the settings, and its examples. */
export async function defaults() {
  return (await asked("playground/defaults.json")).json();
}

/** Stream one answer: `take` gets each chunk. Throws Trouble, or AbortError after `signal`. */
export async function stream(body, signal, take) {
  const response = await asked("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  try {
    for await (const event of events(response.body)) {
      if (event === "[DONE]") return;
      const chunk = JSON.parse(event);
      if (chunk.error) throw new Trouble(`The answer broke off: ${sentence(chunk.error.message)}`, 200);
      take(chunk);
    }
  } catch (error) {
    throw error instanceof Trouble || error.name === "AbortError" ? error : new Trouble("The connection was cut off.");
  }
  throw new Trouble("The connection was cut off before the answer was complete.");
}

async function asked(path, options = {}) {
  const headers = { ...options.headers };
  if (key.get()) headers.Authorization = `Bearer ${key.get()}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Trouble("The service cannot be reached. Is it still running?");
  }
  if (!response.ok) throw new Trouble(await reason(response), response.status);
  return response;
}

async function reason(response) {
  const body = await response.json().catch(() => ({}));
  const said = sentence(body.error?.message);
  const wait = Number.parseInt(response.headers.get("Retry-After") ?? "", 10);
  const again = Number.isFinite(wait) ? `Try again in ${wait} ${wait === 1 ? "second" : "seconds"}.` : "Try again in a moment.";
  switch (response.status) {
    case 401:
      return key.get() ? "The service does not accept this API key." : "The service asks for an API key.";
    case 403:
      return `This API key may not do that. ${said}`;
    case 413:
      return `The question is too long. ${said}`;
    case 429:
      return `The service is busy. ${again}`;
    case 503:
      return `A part of the service is away. ${said} ${again}`;
    case 504:
      return `The answer took too long. ${said}`;
    default:
      return response.status < 500 ? `The service refused: ${said}` : `Something went wrong in the service. ${said}`;
  }
}

function sentence(text) {
  if (!text) return "";
  return text[0].toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? "" : ".");
}

/** The data of each server-sent event. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (held + value).split(/\r?\n\r?\n/);
    held = parts.pop();
    for (const part of parts) {
      const lines = part.split(/\r?\n/).filter((line) => line.startsWith("data:")); // a comment keeps a stream open
      if (lines.length) yield lines.map((line) => line.slice(5).trimStart()).join("\n");
    }
  }
}
