// The settings of a conversation. What is left empty is not sent: then the server's defaults hold.

import { $, button, node } from "./dom.js";

const NUMBERS = [
  ["temperature", "Temperature", 0, 2, 0.05, "0 to 2", "0 takes the most probable token"],
  ["top_p", "Top p", 0.01, 1, 0.01, "0.01 to 1", "Sample from the smallest set of this probability"],
  ["top_k", "Top k", 0, "", 1, "all", "Sample from the k most probable"],
  ["min_p", "Min p", 0, 1, 0.01, "0 to 1", "Drop tokens below this share of the most probable one"],
  ["max_completion_tokens", "Max tokens", 1, "", 1, "what fits", "Most tokens to generate"],
  ["seed", "Seed", "", "", 1, "random", "Makes sampling repeatable"],
  ["presence_penalty", "Presence penalty", -2, 2, 0.1, "-2 to 2", "For tokens generated before"],
  ["frequency_penalty", "Frequency penalty", -2, 2, 0.1, "-2 to 2", "For each time a token was generated"],
  ["repetition_penalty", "Repetition penalty", 0.05, "", 0.05, "1", "Above 1: less of prompt and answer again"],
].map(([name, label, min, max, step, hint, title]) => ({ name, label, min, max, step, hint, title }));
const TEXTS = [
  { name: "stop", label: "Stop strings", hint: "one a line, 4 at most", check: stopStrings },
  { name: "tools", label: "Tools", hint: 'JSON: [{"type": "function", "function": {"name": ...}}]', check: toolList },
];

// Builds the form; `changed(system, sampling)` is called with the texts of all fields that are not empty.
export function buildSettings(changed) {
  const form = $("settings-form");
  const system = field("textarea", { name: "system", label: "System prompt", hint: "The model's own, if it has one" });
  const grid = node("div", "grid", ...NUMBERS.map((each) => field("input", each)));
  const reset = button("Use the server's defaults", () => {
    for (const { name } of [...NUMBERS, ...TEXTS]) form.elements[name].value = "";
    form.dispatchEvent(new Event("input"));
  });
  form.append(
    system,
    grid,
    ...TEXTS.map((each) => field("textarea", each)),
    node("p", "small", "Empty fields are not sent."),
    reset,
  );
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("input", () => {
    for (const { name, check } of TEXTS)
      form.elements[name].setCustomValidity(problemOf(check, form.elements[name].value));
    const fields = [...NUMBERS, ...TEXTS].map(({ name }) => [name, form.elements[name].value]);
    changed(
      system.querySelector("textarea").value,
      Object.fromEntries(fields.filter(([, text]) => text.trim() !== "")),
    );
    showProblems(form);
  });
}

export function showSettings({ system, sampling }) {
  const form = $("settings-form");
  form.elements.system.value = system;
  for (const { name } of [...NUMBERS, ...TEXTS]) form.elements[name].value = sampling[name] ?? "";
  for (const { name, check } of TEXTS)
    form.elements[name].setCustomValidity(problemOf(check, form.elements[name].value));
  showProblems(form);
}

// The sampling fields of a request, or null where one cannot be sent as it stands.
export function settingsOf({ sampling }) {
  if (!$("settings-form").checkValidity()) return null;
  const numbers = NUMBERS.filter(({ name }) => name in sampling).map(({ name }) => [name, Number(sampling[name])]);
  const texts = TEXTS.filter(({ name }) => name in sampling).map(({ name, check }) => [name, check(sampling[name])]);
  return Object.fromEntries([...numbers, ...texts]);
}

function field(tag, { name, label, hint, title = "", min, max, step }) {
  const control = node(tag);
  control.name = name;
  control.id = `set-${name}`;
  control.placeholder = hint;
  if (tag === "textarea") control.rows = name === "system" ? 3 : 2;
  else Object.assign(control, { type: "number", min, max, step, title });
  const problem = node("span", "problem");
  problem.id = `problem-${name}`;
  control.setAttribute("aria-describedby", problem.id);
  return node("label", tag === "textarea" ? "wide" : "", label, control, problem);
}

function showProblems(form) {
  for (const control of form.elements) {
    if (!control.name) continue;
    control.setAttribute("aria-invalid", String(!control.validity.valid));
    $(`problem-${control.name}`).textContent = control.validationMessage;
  }
}

function problemOf(check, text) {
  try {
    if (text.trim() !== "") check(text);
    return "";
  } catch (error) {
    return error.message;
  }
}

function stopStrings(text) {
  const strings = text.split("\n").filter((line) => line !== "");
  if (strings.length > 4) throw new Error("4 at most");
  return strings;
}

function toolList(text) {
  const tools = JSON.parse(text);
  if (!Array.isArray(tools) || tools.length === 0) throw new Error("a JSON list of tools");
  return tools;
}
