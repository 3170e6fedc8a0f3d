// What outlives a reload, in this browser only: conversations in IndexedDB, preferences in localStorage.

import { isThread } from "./tree.js";

const PREFERENCES = "gristmill.preferences";
let opened = null;

function database() {
  opened ??= new Promise((resolve, reject) => {
    const request = indexedDB.open("gristmill", 1);
    request.onupgradeneeded = () => request.result.createObjectStore("conversations", { keyPath: "id" });
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
  return opened;
}

async function run(mode, work) {
  const store = (await database()).transaction("conversations", mode).objectStore("conversations");
  const request = work(store);
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

// What an older or foreign page left there and cannot be shown is passed over.
export async function allConversations() {
  return (await run("readonly", (store) => store.getAll())).filter(isConversation);
}

export const saveConversation = (conversation) => run("readwrite", (store) => store.put(conversation));
export const deleteConversation = (id) => run("readwrite", (store) => store.delete(id));

export function newConversation(threads, { system = "", sampling = {} } = {}) {
  return {
    id: crypto.randomUUID?.() ?? `${Date.now()}-${Math.random()}`,
    title: "",
    updated: Date.now(),
    system,
    sampling,
    threads,
  };
}

export function isConversation(value) {
  const { id, title, system, sampling, updated, threads } = value ?? {};
  return (
    [id, title, system].every((text) => typeof text === "string") &&
    Number.isFinite(updated) &&
    sampling?.constructor === Object &&
    Object.values(sampling).every((text) => typeof text === "string") &&
    Array.isArray(threads) &&
    threads.length > 0 &&
    threads.every(isThread)
  );
}

// What a conversation is called: its given name, or its first words.
export function titleOf({ title, threads: [{ nodes }] }) {
  const first =
    nodes
      .find(({ role }) => role === "user")
      ?.content.trim()
      .replace(/\s+/g, " ") ?? "";
  return title || (first.length > 60 ? `${first.slice(0, 57)}...` : first) || "New chat";
}

export function preferences() {
  const fallback = { theme: "auto", singleKeys: true, tokens: false, models: [], system: "", sampling: {} };
  try {
    return { ...fallback, ...JSON.parse(localStorage.getItem(PREFERENCES)) };
  } catch {
    return fallback; // broken or forbidden storage
  }
}

export function savePreferences(values) {
  try {
    localStorage.setItem(PREFERENCES, JSON.stringify(values));
  } catch {
    // Full or forbidden storage: they last as long as the page.
  }
}
