// One message on the page: its reasoning, its text or tokens, its calls of tools, and what can be done with it.

import { button, node } from "./dom.js";
import { copyButton, showMarkdown } from "./markdown.js";
import { showTokens } from "./tokens.js";

// What was built for a message stays with it, so that a long conversation is not built anew at each change.
const built = new WeakMap(); // message -> {asTokens, body, reasoning}

// Builds the message. `view.refresh()` shows what has changed in `message` since.
// `actions` has edit, regenerate, step, branch (from a token) and giveResult; `place` is {index, count} among its branches.
export function showMessage(message, { place, actions, tokens, streaming = false, editable = true }) {
  const asTokens =
    tokens && message.role === "assistant" && (message.tokens !== undefined || (streaming && message.content === ""));
  if (built.get(message)?.asTokens !== asTokens) {
    const [body, reasoning] = [node("div", asTokens ? "text as-tokens" : "text"), reasoningView()];
    built.set(message, { asTokens, body, reasoning });
  }
  const { body, reasoning } = built.get(message);
  const speaker = { user: "You", assistant: message.model ?? "Model", tool: "Tool result" }[message.role];
  const element = node("article", `message ${message.role}`, node("h2", "visually-hidden", speaker), body);
  const calls = node("div", "calls");
  body.after(calls);

  function refresh() {
    if (message.reasoning) {
      reasoning.show(message.reasoning, streaming && message.content === "");
      if (reasoning.element.parentElement !== element) element.prepend(reasoning.element);
    }
    if (message.role !== "assistant") body.textContent = message.content;
    else if (asTokens) showTokens(body, message.tokens ?? [], actions.branch);
    else showMarkdown(body, message.content);
    body.hidden = message.content === "" && !streaming && !asTokens;
    calls.replaceChildren(
      ...(message.toolCalls ?? []).filter(Boolean).map((call) => callView(call, streaming ? null : actions)),
    );
  }

  refresh();
  if (streaming) {
    element.classList.add("streaming");
    element.setAttribute("aria-busy", "true");
  } else {
    if (message.failure) element.append(node("p", "failure", message.failure));
    element.append(under(message, { place, actions, tokens, editable }, () => edit(element, body, message, actions)));
  }
  return { element, refresh };
}

function reasoningView() {
  const summary = node("summary");
  const text = node("div", "text");
  const element = node("details", "reasoning", summary, text);
  return {
    element,
    show(reasoning, thinking) {
      summary.textContent = thinking ? "Thinking\u2026" : "Reasoning";
      showMarkdown(text, reasoning);
    },
  };
}

function callView({ id, name, text }, actions) {
  const view = node(
    "section",
    "tool-call",
    node("h3", "", "Calls ", node("code", "", name)),
    node("dl", "", ...argumentsOf(text)),
  );
  if (!actions?.giveResult) return view;
  const field = node("textarea");
  field.rows = 1;
  field.placeholder = "What the tool answers";
  field.setAttribute("aria-label", `Result of ${name}`);
  view.append(
    node(
      "div",
      "row",
      field,
      button("Send result", () => actions.giveResult(id, field.value), "quiet"),
    ),
  );
  return view;
}

function argumentsOf(text) {
  try {
    const values = JSON.parse(text);
    const spell = (value) => (typeof value === "string" ? value : JSON.stringify(value, null, 2));
    return Object.entries(values).flatMap(([name, value]) => [node("dt", "", name), node("dd", "", spell(value))]);
  } catch {
    return [node("dd", "", text)]; // not all of it has come
  }
}

function under(message, { place, actions, tokens, editable }, startEdit) {
  const row = node("div", "under");
  if (place.count > 1) {
    const shown = node("span", "place", `${place.index + 1}/${place.count}`);
    const [back, on] = [button("\u2039", () => actions.step(-1)), button("\u203a", () => actions.step(1))];
    back.setAttribute("aria-label", "Earlier branch");
    on.setAttribute("aria-label", "Later branch");
    back.disabled = place.index === 0;
    on.disabled = place.index === place.count - 1;
    row.append(node("span", "branches", back, shown, on));
  }
  if (editable && message.role === "user") row.append(button("Edit", startEdit));
  if (editable && message.role === "assistant") row.append(button("Regenerate", actions.regenerate));
  if (editable && message.role !== "assistant" && actions.answer) row.append(button("Try again", actions.answer));
  if (navigator.clipboard && message.content) row.append(copyButton("Copy message", () => message.content));
  if (message.facts) row.append(node("span", "facts", message.facts));
  if (tokens && message.role === "assistant" && !message.tokens) {
    row.append(node("span", "facts", "no probabilities were kept; regenerate to get them"));
  }
  return row;
}

// The message becomes a text box in its place.
function edit(element, body, message, actions) {
  const field = node("textarea");
  field.value = message.content;
  field.rows = Math.min(12, message.content.split("\n").length + 1);
  field.setAttribute("aria-label", "Edited message");
  const send = () => field.value.trim() && actions.edit(field.value.trim());
  const row = node("div", "row", button("Cancel", actions.cancel), button("Send", send, "primary"));
  const form = node("div", "edit", field, row);
  field.addEventListener("keydown", (event) => {
    if (event.isComposing) return;
    if (event.key === "Enter" && !event.shiftKey) send();
    else if (event.key === "Escape") actions.cancel();
    else return;
    event.preventDefault();
    event.stopPropagation();
  });
  element.classList.add("editing");
  body.replaceWith(form);
  element.querySelector(".under").remove();
  field.focus();
}
