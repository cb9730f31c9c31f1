// Client of the service: models, defaults, streamed answers, and errors in plain words.

const KEY = "api-key"; // in sessionStorage: this tab only, gone when it is closed

export const key = {
  get: () => stored(() => sessionStorage.getItem(KEY)) ?? "",
  set: (text) => stored(() => (text ? sessionStorage.setItem(KEY, text) : sessionStorage.removeItem(KEY))),
};

function stored(act) {
  try {
    return act();
  } catch {
    return null; // storage is disabled
  }
}

/** An error with a message for the reader. status: of HTTP, 0 without a response. */
export class ServiceError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

/** The model names of the three modes from /v1/models, and the maximum tokens of a session. */
export async function models() {
  const { data } = await (await request("v1/models")).json();
  const names = new Set(data.map((card) => card.id));
  const guided = data.find((card) => names.has(`${card.id}/target`) && names.has(`${card.id}/guider`));
  if (!guided) throw new ServiceError("This service lists no guided model beside its target and its guider.");
  return { target: `${guided.id}/target`, guider: `${guided.id}/guider`, guided: guided.id, longest: guided.max_model_len };
}

/** The service's own defaults for the settings, and its examples. */
export async function defaults() {
  return (await request("playground/defaults.json")).json();
}

/** Stream one answer: calls `take` with each chunk and its milliseconds since the request. Throws ServiceError, or
 *  AbortError after `signal`. */
export async function stream(body, signal, take) {
  const began = performance.now();
  const response = await request("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  try {
    for await (const event of events(response.body)) {
      if (event === "[DONE]") return;
      const chunk = JSON.parse(event);
      if (chunk.error) throw new ServiceError(`The answer broke off: ${sentence(chunk.error.message)}`, 200);
      take(chunk, performance.now() - began);
    }
  } catch (error) {
    throw error instanceof ServiceError || error.name === "AbortError" ? error : new ServiceError("The connection was cut off.");
  }
  throw new ServiceError("The connection was cut off before the answer was complete.");
}

async function request(path, options = {}) {
  const headers = { ...options.headers };
  if (key.get()) headers.Authorization = `Bearer ${key.get()}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServiceError("The service cannot be reached. Is it still running?");
  }
  if (!response.ok) throw new ServiceError(await reason(response), response.status);
  return response;
}

async function reason(response) {
  const body = await response.json().catch(() => ({}));
  const detail = sentence(body.error?.message);
  const wait = Number.parseInt(response.headers.get("Retry-After") ?? "", 10);
  const again = Number.isFinite(wait) ? `Try again in ${wait} ${wait === 1 ? "second" : "seconds"}.` : "Try again in a moment.";
  switch (response.status) {
    case 401:
      return key.get() ? "The service does not accept this API key." : "The service asks for an API key.";
    case 403:
      return `This API key may not do that. ${detail}`;
    case 413:
      return `The question is too long. ${detail}`;
    case 429:
      return `The service is busy. ${again}`;
    case 503:
      return `A part of the service is away. ${detail} ${again}`;
    case 504:
      return `The answer took too long. ${detail}`;
    default:
      return response.status < 500 ? `The service refused: ${detail}` : `Something went wrong in the service. ${detail}`;
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
      const lines = part.split(/\r?\n/).filter((line) => line.startsWith("data:")); // skips comments such as keep-alives
      if (lines.length) yield lines.map((line) => line.slice(5).trimStart()).join("\n");
    }
  }
}
