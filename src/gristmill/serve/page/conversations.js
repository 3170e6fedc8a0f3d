// The list of saved conversations, and their way out and in as files.

import { $, button, download, node } from "./dom.js";
import { isConversation, newConversation, titleOf } from "./store.js";
import { path } from "./tree.js";

const FORMAT = "gristmill.conversation.1";

// `actions` has open(conversation), rename(conversation, title) and remove(conversation).
export function showList(conversations, current, actions) {
  const items = conversations.map((conversation) => item(conversation, conversation.id === current.id, actions));
  $("conversation-list").replaceChildren(...(items.length ? items : [node("li", "faint", "Nothing saved yet.")]));
}

function item(conversation, isCurrent, actions) {
  const title = titleOf(conversation);
  const open = button(title, () => actions.open(conversation), "conversation");
  if (isCurrent) open.setAttribute("aria-current", "true");
  const rename = button("Rename", () => startRename(element, conversation, actions));
  const remove = button("Delete", () =>
    remove.textContent === "Delete" ? askFirst(remove) : actions.remove(conversation),
  );
  rename.setAttribute("aria-label", `Rename ${title}`);
  remove.setAttribute("aria-label", `Delete ${title}`);
  const element = node("li", isCurrent ? "current" : "", open, node("span", "row", rename, remove));
  return element;
}

function askFirst(remove) {
  remove.textContent = "Really?";
  remove.setAttribute("aria-label", remove.getAttribute("aria-label").replace("Delete", "Really delete"));
  remove.addEventListener("blur", () => {
    remove.textContent = "Delete";
    remove.setAttribute("aria-label", remove.getAttribute("aria-label").replace("Really delete", "Delete"));
  });
}

function startRename(element, conversation, actions) {
  const field = node("input");
  field.value = titleOf(conversation);
  field.maxLength = 200;
  field.setAttribute("aria-label", "Title");
  let done = false;
  const end = (title) => {
    if (!done) actions.rename(conversation, title);
    done = true;
  };
  field.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.isComposing) end(field.value.trim());
    else if (event.key === "Escape") end(conversation.title);
    else return;
    event.stopPropagation();
  });
  field.addEventListener("blur", () => end(field.value.trim()));
  element.replaceChildren(field);
  field.select();
}

export function exportJson(conversation) {
  download(
    fileName(conversation, "json"),
    "application/json",
    JSON.stringify({ format: FORMAT, ...conversation }, null, 2),
  );
}

export function exportMarkdown(conversation) {
  download(fileName(conversation, "md"), "text/markdown", asMarkdown(conversation));
}

// The branches on show, a part for each model.
export function asMarkdown(conversation) {
  const lines = [`# ${titleOf(conversation)}`];
  if (conversation.system.trim()) lines.push(`**System:** ${conversation.system}`);
  for (const thread of conversation.threads) {
    if (conversation.threads.length > 1) lines.push(`## ${thread.model}`);
    for (const index of path(thread)) {
      const { role, model, content, reasoning, toolCalls = [] } = thread.nodes[index];
      lines.push(`**${{ user: "You", tool: "Tool" }[role] ?? model ?? "Model"}:**`);
      if (reasoning) lines.push(reasoning.trim().replace(/^/gm, "> "));
      if (content) lines.push(content);
      for (const { name, text } of toolCalls) lines.push(`\`${name}(${text})\``);
    }
  }
  return `${lines.join("\n\n")}\n`;
}

const fileName = (conversation, suffix) =>
  `${titleOf(conversation)
    .replace(/[^\p{L}\p{N}]+/gu, "-")
    .slice(0, 60)}.${suffix}`;

// A conversation from an exported file, as a new one. Throws an Error that says what is wrong.
export async function fromFile(file) {
  let value;
  try {
    value = JSON.parse(await file.text());
  } catch {
    throw new Error(`${file.name} is not JSON.`);
  }
  if (value?.format !== FORMAT || !isConversation(value))
    throw new Error(`${file.name} is not a conversation that this page exported.`);
  const { title, system, sampling, threads } = value;
  return { ...newConversation(threads, { system, sampling }), title };
}
