// The page: which conversation is open, its columns, the panels around them and the keyboard.

import { listModels, useKey } from "./api.js";
import { Column } from "./column.js";
import { exportJson, exportMarkdown, fromFile, showList } from "./conversations.js";
import { $, node } from "./dom.js";
import { watch } from "./engine.js";
import { buildSettings, settingsOf, showSettings } from "./settings.js";
import * as store from "./store.js";
import { newThread, path } from "./tree.js";

const MOST_COLUMNS = 4;
const PANELS = ["conversations", "settings", "engine"];
const THEMES = ["auto", "light", "dark"];
const preferences = store.preferences();

const deleted = new WeakSet(); // an answer that is stopped must not bring its conversation back

let models = [];
let conversations = [];
let conversation = null;
let columns = [];
let tab = 0; // the column that a narrow screen shows

const prefer = (changes) => store.savePreferences(Object.assign(preferences, changes));
const isRunning = () => columns.some((column) => column.running);

showTheme();
start();

async function start() {
  buildSettings((system, sampling) => {
    Object.assign(conversation, { system, sampling });
    prefer({ system, sampling });
    save(conversation);
  });
  $("toggle-tokens").setAttribute("aria-pressed", String(preferences.tokens));
  conversations = await store.allConversations().catch(() => []);
  open(conversations.find(({ id }) => id === preferences.current) ?? fresh());
  listen();
  await showModels();
}

async function showModels() {
  try {
    models = (await listModels()).filter(({ kind }) => (kind ?? "generate") === "generate").map(({ id }) => id);
    notice(models.length ? "" : "This server has no model to chat with.");
  } catch (error) {
    notice(`The models could not be listed: ${error.message}`);
    failed(error);
  }
  for (const column of columns) {
    if (!column.thread.model || (!models.includes(column.thread.model) && column.thread.first === -1))
      column.thread.model = models[0] ?? "";
    column.render();
  }
  showChrome();
}

// conversations

function fresh() {
  const wanted = preferences.models.filter((name) => models.includes(name) || models.length === 0);
  return store.newConversation((wanted.length ? wanted : [models[0] ?? ""]).map(newThread), preferences);
}

function open(next) {
  for (const column of columns) column.stop();
  conversation = next;
  tab = 0;
  columns = conversation.threads.map(newColumn);
  $("columns").replaceChildren(...columns.map(({ element }) => element));
  for (const column of columns) column.render();
  showSettings(conversation);
  prefer({ current: conversation.id });
  notice("");
  showChrome();
}

function newColumn(thread) {
  const owner = conversation;
  return new Column(thread, {
    models: () => models,
    wantsTokens: () => preferences.tokens,
    ask: () => {
      const settings = settingsOf(owner);
      if (!settings) {
        showPanel("settings");
        $("settings-form").querySelector(":invalid").focus();
        notice("A setting cannot be sent as it stands.");
      }
      return settings && { system: owner.system, settings, wantsTokens: preferences.tokens };
    },
    changed: () => {
      owner.updated = Date.now();
      save(owner);
      if (owner !== conversation) return;
      prefer({ models: columns.map((column) => column.thread.model) });
      showChrome();
    },
    failed,
    send,
    edit: editEverywhere,
    close: closeColumn,
  });
}

async function save(which) {
  if (deleted.has(which) || which.threads.every(({ nodes }) => nodes.length === 0)) return;
  if (!conversations.includes(which)) conversations.unshift(which);
  try {
    await store.saveConversation(which);
  } catch {
    notice("This browser does not keep the conversation: its storage is full or forbidden. Export it to a file.");
  }
}

const listActions = {
  open: (chosen) => {
    open(chosen);
    if (isNarrow()) showPanel(null);
  },
  rename: (renamed, title) => {
    renamed.title = title;
    save(renamed);
    showChrome();
  },
  remove: async (removed) => {
    deleted.add(removed);
    conversations = conversations.filter((each) => each !== removed);
    if (removed === conversation) open(fresh());
    showChrome();
    await store.deleteConversation(removed.id).catch(() => notice("This browser could not delete the conversation."));
  },
};

async function importFile(file) {
  try {
    const imported = await fromFile(file);
    open(imported);
    await save(imported);
    showChrome();
  } catch (error) {
    notice(error.message);
  }
}

// columns

function compare() {
  if (isRunning() || columns.length >= MOST_COLUMNS) return;
  const used = columns.map(({ thread }) => thread.model);
  const thread = structuredClone(columns[0].thread);
  thread.model = models.find((name) => !used.includes(name)) ?? models[0] ?? "";
  conversation.threads.push(thread);
  columns.push(newColumn(thread));
  $("columns").append(columns.at(-1).element);
  tab = columns.length - 1;
  columns.at(-1).render();
  columns.at(-1).page.changed();
}

function closeColumn(column) {
  column.stop();
  conversation.threads.splice(conversation.threads.indexOf(column.thread), 1);
  columns = columns.filter((each) => each !== column);
  column.element.remove();
  tab = 0;
  columns[0].page.changed();
}

function send(text) {
  if (isRunning() || text.trim() === "" || !columns[0].page.ask()) return;
  if (!columns.every(({ thread }) => thread.model)) return notice("There is no model to answer yet.");
  notice("");
  for (const column of columns) column.send(text.trim());
  $("input").value = "";
  fitInput();
}

// An edit holds for all columns in which the same words stand at the same place.
function editEverywhere(column, place, text) {
  if (isRunning() || !column.page.ask()) return;
  const said = (each) => each.thread.nodes[path(each.thread)[place]];
  const { role, content } = said(column);
  for (const each of columns) if (said(each)?.role === role && said(each).content === content) each.edit(place, text);
}

// what stands around the columns

function showChrome() {
  $("title").textContent = store.titleOf(conversation);
  document.title = conversation.threads.some(({ nodes }) => nodes.length)
    ? `${store.titleOf(conversation)} - Gristmill`
    : "Gristmill";
  $("send").hidden = isRunning();
  $("stop").hidden = !isRunning();
  $("compare").disabled = isRunning() || columns.length >= MOST_COLUMNS;
  $("columns").classList.toggle("several", columns.length > 1);
  showTabs();
  conversations.sort((a, b) => b.updated - a.updated);
  showList(conversations, conversation, listActions);
}

function showTabs() {
  const tabs = columns.map((column, i) => {
    const element = node("button", "", column.thread.model || "Model");
    element.type = "button";
    element.setAttribute("role", "tab");
    element.setAttribute("aria-selected", String(i === tab));
    element.setAttribute("aria-controls", column.element.id);
    element.tabIndex = i === tab ? 0 : -1;
    element.addEventListener("click", () => showTab(i));
    column.element.classList.toggle("current", i === tab);
    return element;
  });
  $("tabs").replaceChildren(...tabs);
  $("tabs").hidden = columns.length < 2;
}

function showTab(i) {
  tab = (i + columns.length) % columns.length;
  showTabs();
  $("tabs").children[tab].focus();
}

function notice(text) {
  $("notice").textContent = text;
  $("notice").hidden = text === "";
}

function failed(error) {
  if (error.status !== 401 || $("key-dialog").open) return;
  $("key-reason").textContent = error.message;
  $("key-dialog").showModal();
}

const isNarrow = () => matchMedia("(max-width: 60rem)").matches;

// One panel on the right at a time; a narrow screen has room for one at all.
function showPanel(name) {
  for (const panel of PANELS) {
    const stays = panel === "conversations" && !isNarrow() && name !== null && name !== panel && !$(panel).hidden;
    setPanel(panel, panel === name || stays);
  }
  $(name ?? "input")
    .querySelector?.("input, textarea, button")
    ?.focus();
}

function setPanel(panel, on) {
  const was = !$(panel).hidden;
  $(panel).hidden = !on;
  $(`toggle-${panel}`).setAttribute("aria-expanded", String(on));
  if (panel === "engine" && was !== on) watch(on);
}

function togglePanel(panel) {
  if ($(panel).hidden) showPanel(panel);
  else {
    setPanel(panel, false);
    $(`toggle-${panel}`).focus();
  }
}

function showTheme() {
  document.documentElement.dataset.theme = preferences.theme;
  const words = { auto: "as the system", light: "light", dark: "dark" }[preferences.theme];
  $("theme").setAttribute("aria-label", `Colours: ${words}`);
  $("theme").title = `Colours: ${words} (d)`;
}

function nextTheme() {
  prefer({ theme: THEMES[(THEMES.indexOf(preferences.theme) + 1) % THEMES.length] });
  showTheme();
}

function toggleTokens() {
  prefer({ tokens: !preferences.tokens });
  $("toggle-tokens").setAttribute("aria-pressed", String(preferences.tokens));
  for (const column of columns) column.render();
}

function newChat() {
  open(fresh());
  if (isNarrow()) showPanel(null);
  $("input").focus();
}

function stop() {
  for (const column of columns) column.stop();
}

function fitInput() {
  $("input").style.height = "auto";
  $("input").style.height = `${$("input").scrollHeight}px`;
}

// keyboard and clicks

const SHORTCUTS = [
  ["/", "Go to the message box", () => $("input").focus()],
  ["n", "New chat", newChat],
  ["c", "Conversations", () => togglePanel("conversations")],
  ["s", "Settings", () => togglePanel("settings")],
  ["e", "Engine", () => togglePanel("engine")],
  ["m", "Add a model beside this one", compare],
  ["p", "Token probabilities", toggleTokens],
  ["d", "Light, dark, or as the system", nextTheme],
  ["?", "These shortcuts", () => $("shortcuts").showModal()],
];
const OTHER_KEYS = [
  ["Enter", "Send the message"],
  ["Shift+Enter", "Start a line"],
  ["Esc", "Stop the answer, or close what is open"],
  ["\u2190 \u2192", "Go from token to token"],
  ["\u2193", "Go into a token's alternatives"],
];

function onKey(event) {
  if (event.key === "Escape" && !document.querySelector("dialog[open]")) {
    if (isRunning()) stop();
    else PANELS.filter((panel) => $(panel).contains(document.activeElement)).forEach(togglePanel);
    return;
  }
  const isTyping = event.target.closest?.("input, textarea, select, dialog");
  if (isTyping || !preferences.singleKeys || event.ctrlKey || event.metaKey || event.altKey) return;
  const [, , action] = SHORTCUTS.find(([key]) => key === event.key) ?? [];
  if (!action) return;
  event.preventDefault();
  action();
}

function listen() {
  const clicks = {
    new: newChat,
    compare,
    "toggle-tokens": toggleTokens,
    theme: nextTheme,
    help: () => $("shortcuts").showModal(),
    stop,
    import: () => $("import-file").click(),
    "export-json": () => exportJson(conversation),
    "export-markdown": () => exportMarkdown(conversation),
    ...Object.fromEntries(PANELS.map((panel) => [`toggle-${panel}`, () => togglePanel(panel)])),
  };
  for (const [id, action] of Object.entries(clicks)) $(id).addEventListener("click", action);
  for (const closer of document.querySelectorAll(".close")) {
    const dialog = closer.closest("dialog");
    closer.addEventListener("click", () => (dialog ? dialog.close() : togglePanel(closer.closest("aside").id)));
  }
  $("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    send($("input").value);
  });
  $("input").addEventListener("keydown", (event) => {
    // While an input method composes, Enter belongs to it.
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    send($("input").value);
  });
  $("input").addEventListener("input", fitInput);
  $("tabs").addEventListener("keydown", ({ key }) => {
    if (key === "ArrowRight" || key === "ArrowLeft") showTab(tab + (key === "ArrowRight" ? 1 : -1));
  });
  $("import-file").addEventListener("change", async () => {
    const [file] = $("import-file").files;
    $("import-file").value = "";
    if (file) await importFile(file);
  });
  $("key-form").addEventListener("submit", async (event) => {
    event.preventDefault();
    useKey($("key").value.trim());
    $("key").value = "";
    $("key-dialog").close();
    await showModels();
  });
  const keys = [...OTHER_KEYS, ...SHORTCUTS].map(([key, label]) =>
    node("div", "", node("dt", "", node("kbd", "", key)), node("dd", "", label)),
  );
  $("shortcut-list").append(...keys);
  $("single-keys").checked = preferences.singleKeys;
  $("single-keys").addEventListener("change", () => prefer({ singleKeys: $("single-keys").checked }));
  document.addEventListener("keydown", onKey);
  addEventListener("pagehide", () => save(conversation));
}
