// The server's OpenAI interface: the models, and an answer as a stream of chunks.

export class ApiError extends Error {}

export async function listModels() {
  const response = await fetch("/v1/models");
  if (!response.ok) throw await errorOf(response);
  return (await response.json()).data;
}

// Yields the chunks of a streamed answer. Throws ApiError with the server's own words, also for an error on the way
// and for a stream that ends before its end mark.
export async function* streamChat(request, signal) {
  const response = await fetch("/v1/chat/completions", {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify({ ...request, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  if (!response.ok) throw await errorOf(response);
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
    const { value, done } = await reader.read();
    if (done) return;
    const pieces = (rest + value).split("\n\n");
    rest = pieces.pop();
    for (const piece of pieces) {
      if (piece.startsWith("data: ")) yield piece.slice("data: ".length);
    }
  }
}

async function errorOf(response) {
  const body = await response.json().catch(() => null);
  return new ApiError(body?.error?.message ?? `The server answered ${response.status}.`);
}
