// What outlives a reload: the conversation and the settings, in this browser only.

const KEY = "gristmill.chat.1";

const fresh = () => ({
  model: null,
  system: "",
  temperature: 0.7,
  maxTokens: 512,
  messages: [], // {role, content, facts?}
});

export function load() {
  const state = fresh();
  try {
    const saved = JSON.parse(localStorage.getItem(KEY)) ?? {};
    if (typeof saved.model === "string") state.model = saved.model;
    if (typeof saved.system === "string") state.system = saved.system;
    if (saved.temperature >= 0 && saved.temperature <= 2) state.temperature = saved.temperature;
    if (saved.maxTokens === null || saved.maxTokens >= 1) state.maxTokens = saved.maxTokens;
    if (Array.isArray(saved.messages)) state.messages = saved.messages.filter(isMessage);
  } catch {
    // Broken or forbidden storage: start afresh.
  }
  return state;
}

export function save(state) {
  try {
    localStorage.setItem(KEY, JSON.stringify(state));
  } catch {
    // Full or forbidden storage: the conversation lasts as long as the page.
  }
}

function isMessage(message) {
  return ["user", "assistant"].includes(message?.role) && typeof message.content === "string";
}
