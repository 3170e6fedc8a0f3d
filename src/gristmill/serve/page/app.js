// The chat page. Model output and user input reach the document as text nodes only, never as HTML.

import { listModels, streamChat } from "./api.js";
import { load, save } from "./store.js";

const $ = (id) => document.getElementById(id);
const state = load();
let running = null; // AbortController of the answer in progress

start();

async function start() {
  $("system").value = state.system;
  $("temperature").value = state.temperature;
  $("max-tokens").value = state.maxTokens ?? "";
  showTemperature();
  listen();
  render();
  try {
    showModels(await listModels());
  } catch (error) {
    showFailure(`The models could not be listed: ${error.message}`);
  }
}

function listen() {
  $("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    send($("input").value);
  });
  $("input").addEventListener("keydown", (event) => {
    // While an input method composes, Enter belongs to it.
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      send($("input").value);
    }
  });
  $("input").addEventListener("input", fitInput);
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") running?.abort();
  });
  $("stop").addEventListener("click", () => running?.abort());
  $("new").addEventListener("click", newChat);
  $("toggle-settings").addEventListener("click", () => {
    const open = $("settings").hidden;
    $("settings").hidden = !open;
    $("toggle-settings").setAttribute("aria-expanded", String(open));
  });
  $("system").addEventListener("input", () => update({ system: $("system").value }));
  $("temperature").addEventListener("input", () => {
    update({ temperature: Number($("temperature").value) });
    showTemperature();
  });
  $("max-tokens").addEventListener("input", () => {
    const { value, validity } = $("max-tokens");
    if (validity.valid) update({ maxTokens: value === "" ? null : Number(value) });
  });
  $("model").addEventListener("change", () => {
    update({ model: $("model").value });
    $("empty-model").textContent = state.model;
  });
  for (const starter of document.querySelectorAll(".starter")) {
    starter.addEventListener("click", () => send(starter.textContent));
  }
  addEventListener("pagehide", () => save(state));
}

function update(changes) {
  Object.assign(state, changes);
  save(state);
}

function showTemperature() {
  $("temperature-value").textContent = state.temperature.toFixed(2);
}

function showModels(models) {
  const names = models.map((model) => model.id);
  $("model").replaceChildren(...names.map((name) => new Option(name, name)));
  if (!names.includes(state.model)) state.model = names[0];
  $("model").value = state.model;
  $("empty-model").textContent = state.model;
}

function newChat() {
  running?.abort();
  update({ messages: [] });
  render();
  $("input").focus();
}

function send(text) {
  if (running || text.trim() === "") return;
  state.messages.push({ role: "user", content: text.trim() });
  $("input").value = "";
  fitInput();
  answer();
}

function regenerate() {
  if (running) return;
  if (state.messages.at(-1)?.role === "assistant") state.messages.pop();
  answer();
}

async function answer() {
  const messages = state.messages; // a new chat meanwhile has a list of its own
  const reply = { role: "assistant", content: "", facts: "" };
  const request = {
    model: state.model,
    messages: [
      ...(state.system.trim() ? [{ role: "system", content: state.system }] : []),
      ...messages.map(({ role, content }) => ({ role, content })),
    ],
    temperature: state.temperature,
    ...(state.maxTokens === null ? {} : { max_completion_tokens: state.maxTokens }),
  };
  running = new AbortController();
  const { signal } = running;
  render();
  const view = showMessage(reply);
  view.element.classList.add("streaming");
  scrollDown();
  let failure = null;
  try {
    await receive(streamChat(request, signal), reply, view);
  } catch (error) {
    if (signal.aborted) reply.facts = "stopped";
    else failure = error.message;
  }
  running = null;
  if (reply.content !== "") messages.push(reply);
  else if (!signal.aborted) failure ??= "The answer is empty.";
  save(state);
  render(state.messages === messages ? failure : null);
}

async function receive(chunks, reply, view) {
  let first = null;
  let last = null;
  let reason = "";
  for await (const chunk of chunks) {
    const choice = chunk.choices[0];
    if (choice?.delta.content) {
      last = performance.now();
      first ??= last;
      reply.content += choice.delta.content;
      const following = isAtEnd();
      view.text.appendData(choice.delta.content);
      if (following) scrollDown();
    }
    reason = choice?.finish_reason ?? reason;
    if (chunk.usage) reply.facts = facts(chunk.usage, last - first, reason);
  }
}

// The first token's time is the prompt's, so the rate is that of the tokens after it.
function facts({ prompt_tokens, completion_tokens }, milliseconds, reason) {
  const parts = [`${completion_tokens} tokens`];
  if (completion_tokens > 1 && milliseconds > 0) {
    parts.push(`${((completion_tokens - 1) / (milliseconds / 1000)).toFixed(1)} tokens/s`);
  }
  parts.push(`prompt ${prompt_tokens}`);
  if (reason === "length") parts.push("cut at the token limit");
  return parts.join(" \u00b7 ");
}

function render(failure = null) {
  $("messages").replaceChildren();
  for (const message of state.messages) showMessage(message);
  $("empty").hidden = state.messages.length > 0;
  $("send").hidden = running !== null;
  $("stop").hidden = running === null;
  if (failure) showFailure(failure);
  if (!running && state.messages.length > 0) showActions();
  scrollDown();
}

function showMessage(message) {
  const element = node("article", `message ${message.role}`);
  const body = node("div", "text");
  const text = document.createTextNode(message.content);
  body.append(text);
  element.append(body);
  if (message.facts) element.append(under(node("span", "facts", message.facts)));
  $("messages").append(element);
  return { element, text };
}

function showActions() {
  const last = state.messages.at(-1);
  if (last.role === "user") {
    const row = under(button("Try again", regenerate), button("Edit", edit));
    row.classList.add("user");
    $("messages").append(row);
    return;
  }
  const answer = [...$("messages").querySelectorAll(".message")].at(-1);
  const row = answer.querySelector(".under") ?? answer.appendChild(under());
  row.append(button("Regenerate", regenerate));
  if (navigator.clipboard) row.append(button("Copy", () => navigator.clipboard.writeText(last.content)));
}

// Takes an unanswered message back: one that the server refuses would otherwise be refused with every later one.
function edit() {
  if (running) return;
  $("input").value = state.messages.pop().content;
  save(state);
  render();
  fitInput();
  $("input").focus();
}

function showFailure(message) {
  const element = node("p", "failure", message);
  element.setAttribute("role", "alert");
  $("messages").append(element);
}

function under(...children) {
  const row = node("div", "under");
  row.append(...children);
  return row;
}

function button(label, action) {
  const element = node("button", "quiet", label);
  element.type = "button";
  element.addEventListener("click", action);
  return element;
}

function node(tag, className, text = "") {
  const element = document.createElement(tag);
  element.className = className;
  element.textContent = text;
  return element;
}

function fitInput() {
  $("input").style.height = "auto";
  $("input").style.height = `${$("input").scrollHeight}px`;
}

function isAtEnd() {
  const { scrollHeight, scrollTop, clientHeight } = $("scroller");
  return scrollHeight - scrollTop - clientHeight < 60;
}

function scrollDown() {
  $("scroller").scrollTop = $("scroller").scrollHeight;
}
