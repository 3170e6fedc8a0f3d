// The server's interface. Every failure is an ApiError with words for the reader; `status` is 0 when no answer came.

const KEY = "gristmill.key";

export class ApiError extends Error {
  constructor(message, status = 0, retryAfter = null) {
    super(message);
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

export function useKey(key) {
  sessionStorage.setItem(KEY, key);
}

export const listModels = async () => (await json("/v1/models")).data;
export const engineState = async () => (await json("/v1/engine")).engines;
export const tokenize = (body, signal) => json("/tokenize", body, signal);

export const streamChat = (body, signal) => stream("/v1/chat/completions", body, signal);
export const streamCompletion = (body, signal) => stream("/v1/completions", body, signal);

async function json(path, body = null, signal = null) {
  return (await ask(path, body, signal)).json();
}

// Yields the chunks of a streamed answer. An error on the way, and an end before the end mark, are errors here too.
async function* stream(path, body, signal) {
  const response = await ask(path, { ...body, stream: true, stream_options: { include_usage: true } }, signal);
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError(chunk.error.message);
    yield chunk;
  }
  throw new ApiError("The connection ended before the answer did.");
}

// The data of each server-sent event. A chunk of bytes may end anywhere, also inside a character.
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read().catch((error) => {
      throw error.name === "AbortError" ? error : new ApiError("The connection broke before the answer ended.");
    });
    if (done) return;
    const pieces = (rest + value).split("\n\n");
    rest = pieces.pop();
    for (const piece of pieces) {
      if (piece.startsWith("data: ")) yield piece.slice("data: ".length);
    }
  }
}

async function ask(path, body, signal) {
  const headers = {};
  const key = sessionStorage.getItem(KEY);
  if (key) headers.authorization = `Bearer ${key}`;
  if (body) headers["content-type"] = "application/json";
  const options = { method: body ? "POST" : "GET", headers, signal, body: body && JSON.stringify(body) };
  const response = await fetch(path, options).catch((error) => {
    throw error.name === "AbortError" ? error : new ApiError("The server cannot be reached.");
  });
  if (!response.ok) throw await errorOf(response);
  return response;
}

async function errorOf(response) {
  const body = await response.json().catch(() => null);
  const said = body?.error?.message ?? `The server answered ${response.status}.`;
  const seconds = Number(response.headers.get("retry-after")) || null;
  const wait = seconds ? ` Try again in ${seconds} s.` : "";
  const lead = { 429: "Too many requests: ", 503: "The server is not ready: " }[response.status] ?? "";
  return new ApiError(`${lead}${said}${wait}`, response.status, seconds);
}
