// Asks the server for an answer and fills the node with it as it comes.

import { ApiError, streamChat, streamCompletion, tokenize } from "./api.js";
import { messages } from "./tree.js";

const ALTERNATIVES = 5;

// Answers `thread` up to its message `parent`. `ask` is {system, settings, wantsTokens}; `changed` is called at each chunk.
export async function chat(thread, parent, answer, ask, signal, changed) {
  const body = { model: answer.model, messages: withSystem(ask.system, messages(thread, parent)), ...ask.settings };
  if (ask.wantsTokens) Object.assign(body, { logprobs: true, top_logprobs: ALTERNATIVES });
  await drain(streamChat(body, signal), answer, changed, (choice) => {
    const { content, reasoning_content: reasoning, tool_calls: calls = [] } = choice.delta;
    answer.content += content ?? "";
    if (reasoning) answer.reasoning = (answer.reasoning ?? "") + reasoning;
    for (const call of calls) addCall((answer.toolCalls ??= []), call);
    const tokens = choice.logprobs?.content ?? [];
    if (tokens.length) (answer.tokens ??= []).push(...tokens.map(fromChat));
    return Boolean(content || reasoning || calls.length);
  });
}

// Goes on from `answer.tokens`, exactly: the prompt is sent as token ids, so that no text is tokenised twice.
export async function goOn(thread, parent, answer, ask, signal, changed) {
  const { tools, max_completion_tokens: most, ...settings } = ask.settings;
  const conversation = { model: answer.model, messages: withSystem(ask.system, messages(thread, parent)) };
  const prompt = await tokenize({ ...conversation, ...(tools && { tools }), add_generation_prompt: true }, signal);
  const ids = [...prompt.tokens, ...answer.tokens.map(({ id }) => id)];
  const room = Math.min(most ? most - answer.tokens.length : Infinity, prompt.max_model_len - ids.length);
  if (room < 1) {
    answer.facts = "cut at the token limit";
    return;
  }
  const body = { model: answer.model, prompt: ids, ...settings, max_tokens: room, logprobs: ALTERNATIVES };
  const thinks = answer.reasoning !== undefined;
  let text = spelled(answer.tokens);
  await drain(streamCompletion(body, signal), answer, changed, (choice) => {
    text += choice.text;
    Object.assign(answer, unfolded(text, thinks));
    answer.tokens.push(...fromCompletion(choice.logprobs));
    return choice.text !== "";
  });
}

// The token that a text alone is, if it is one: what a plain completion tells of alternatives is only their text.
export async function tokenId(model, text) {
  const { tokens } = await tokenize({ model, prompt: text, add_special_tokens: false });
  if (tokens.length !== 1) throw new ApiError(`"${text}" is not one token by itself, so its id is not known here.`);
  return tokens[0];
}

async function drain(chunks, answer, changed, take) {
  let [first, last, reason, usage] = [null, null, "", null];
  for await (const chunk of chunks) {
    const choice = chunk.choices[0];
    if (choice && take(choice)) {
      last = performance.now();
      first ??= last;
    }
    reason = choice?.finish_reason ?? reason;
    usage = chunk.usage ?? usage;
    changed();
  }
  if (usage) answer.facts = facts(usage, last - first, reason);
}

// The first token's time is the prompt's, so the rate is that of the tokens after it.
function facts(
  { prompt_tokens: prompt, completion_tokens: count, prompt_tokens_details: details },
  milliseconds,
  reason,
) {
  const parts = [`${count} tokens`];
  if (count > 1 && milliseconds > 0) parts.push(`${((count - 1) / (milliseconds / 1000)).toFixed(1)} tokens/s`);
  const cached = details?.cached_tokens ? `, ${details.cached_tokens} cached` : "";
  parts.push(`prompt ${prompt}${cached}`);
  if (reason === "length") parts.push("cut at the token limit");
  else if (!["stop", "tool_calls", ""].includes(reason)) parts.push(`ended by ${reason.replace("_", " ")}`);
  return parts.join(" \u00b7 ");
}

const withSystem = (system, said) => [...(system.trim() ? [{ role: "system", content: system }] : []), ...said];

function addCall(calls, { index, id, function: part }) {
  const call = (calls[index] ??= { id: "", name: "", text: "" });
  call.id += id ?? "";
  call.name += part?.name ?? "";
  call.text += part?.arguments ?? "";
}

const entry = ({ token, token_id: id, logprob, bytes }) => ({ text: token, id, logprob, bytes });
const fromChat = (token) => ({ ...entry(token), top: token.top_logprobs.map(entry) });

function fromCompletion(logprobs) {
  return (logprobs?.tokens ?? []).map((text, i) => {
    const id = logprobs.token_ids?.[i];
    const top = Object.entries(logprobs.top_logprobs?.[i] ?? {}).map(([other, logprob]) => ({
      text: other,
      logprob,
      ...(other === text && { id }),
    }));
    return { text, id, logprob: logprobs.token_logprobs[i], top: top.sort((a, b) => b.logprob - a.logprob) };
  });
}

// Plain text with a model's thinking in it, parted as a chat answer is. `thinks`: the prompt opened the thinking.
export function unfolded(text, thinks) {
  const [, opening, reasoning, closing, content] = /^(\s*<think>)?([^]*?)(<\/think>\s*|$)([^]*)$/.exec(text);
  return opening || (thinks && (closing || !text.includes("</think>"))) ? { reasoning, content } : { content: text };
}

// What tokens spell together. One token can be a part of a character, so bytes are joined before they are read.
export function spelled(tokens) {
  const encoder = new TextEncoder();
  const bytes = tokens.flatMap((token) => token.bytes ?? [...encoder.encode(token.text)]);
  return new TextDecoder().decode(new Uint8Array(bytes));
}
