// An answer as its tokens, coloured by probability. Pointing at one, or going there with the arrow keys, shows what else
// could have stood there; choosing an alternative begins a branch from that place.

import { button, node } from "./dom.js";

let popover = null; // the one that is open, with the token that it belongs to

// The tokens in one row; `choose(position, alternative)` is called for a chosen alternative.
export function showTokens(target, tokens, choose) {
  const known = target.querySelectorAll(":scope > .token");
  if (known.length === 0 || known.length > tokens.length) target.replaceChildren();
  const from = known.length > tokens.length ? 0 : known.length;
  tokens.slice(from).forEach((token, i) => target.append(tokenElement(token, from + i, choose)));
  if (known.length === 0 && target.firstChild) target.firstChild.tabIndex = 0;
}

function tokenElement(token, position, choose) {
  const element = node("span", token.text ? "token" : "token silent", token.text);
  element.tabIndex = -1; // one stop for the whole answer; the arrow keys go on from there
  element.setAttribute("role", "button");
  element.setAttribute("aria-haspopup", "menu");
  element.setAttribute("aria-label", `${visible(token)}, ${percent(token.logprob)}`);
  element.style.setProperty("--doubt", (1 - Math.exp(token.logprob)).toFixed(3));
  const open = () => show(element, token, (alternative) => choose(position, alternative));
  element.addEventListener("pointerenter", ({ pointerType }) => pointerType === "mouse" && open());
  element.addEventListener("focus", open);
  element.addEventListener("click", open);
  element.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: "previousElementSibling", ArrowRight: "nextElementSibling" }[event.key];
    if (step && element[step]) {
      element.tabIndex = -1;
      element[step].tabIndex = 0;
      element[step].focus();
    } else if (["ArrowDown", "Enter", " "].includes(event.key)) {
      open();
      popover.querySelector("button:enabled")?.focus();
    } else if (event.key === "Escape") hide();
    else return;
    event.preventDefault();
    event.stopPropagation();
  });
  return element;
}

function show(element, token, choose) {
  if (popover?.token === element) return;
  hide();
  popover = node("div", "alternatives", ...token.top.map((alternative) => row(alternative, token, choose)));
  if (!token.top.some((alternative) => isSame(alternative, token))) popover.append(row(token, token, choose));
  popover.token = element;
  popover.setAttribute("role", "menu");
  popover.setAttribute("aria-label", `Alternatives to ${visible(token)}`);
  popover.addEventListener("keydown", (event) => move(event, element));
  popover.addEventListener("focusout", ({ relatedTarget }) => {
    if (relatedTarget && !popover?.contains(relatedTarget) && relatedTarget !== element) hide();
  });
  document.querySelector("main").append(popover);
  element.classList.add("open");
  place(element);
}

function row(alternative, token, choose) {
  const bar = node("span", "share");
  bar.style.setProperty("--share", Math.exp(alternative.logprob).toFixed(4));
  const element = button("", () => {
    hide();
    choose(alternative);
  });
  element.append(
    node("span", "spelling", visible(alternative)),
    bar,
    node("span", "figure", percent(alternative.logprob)),
    node("span", "figure faint", alternative.logprob.toFixed(3)),
  );
  element.className = "alternative";
  element.disabled = isSame(alternative, token);
  element.setAttribute("role", "menuitem");
  element.title = element.disabled ? "The token that stands here" : "Go on from this token instead";
  return element;
}

const isSame = (a, b) => (a.id === undefined || b.id === undefined ? a.text === b.text : a.id === b.id);

function move(event, element) {
  const rows = [...popover.querySelectorAll("button:enabled")];
  const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  if (step) rows.at((rows.indexOf(document.activeElement) + step) % rows.length)?.focus();
  else if (event.key === "Escape") {
    element.focus();
    hide();
  } else return;
  event.preventDefault();
  event.stopPropagation();
}

// Below the token, or above it where there is no room, and never over the edge.
function place(element) {
  const token = element.getClientRects()[0] ?? element.getBoundingClientRect();
  const { width, height } = popover.getBoundingClientRect();
  const below = token.bottom + 4 + height < innerHeight;
  popover.style.left = `${Math.max(8, Math.min(token.left, innerWidth - width - 8))}px`;
  popover.style.top = `${below ? token.bottom + 4 : Math.max(8, token.top - height - 4)}px`;
}

export function hide() {
  popover?.token.classList.remove("open");
  popover?.remove();
  popover = null;
}

addEventListener("resize", hide);
document.addEventListener("scroll", () => popover && place(popover.token), true);
document.addEventListener("pointerover", ({ target }) => {
  // Leaving both the token and its popover closes it, unless the keyboard opened it.
  if (!popover || popover.contains(target) || popover.token.contains(target)) return;
  if (document.activeElement !== popover.token && !popover.contains(document.activeElement)) hideSoon(popover);
});
document.addEventListener("pointerdown", ({ target }) => {
  if (popover && !popover.contains(target) && target !== popover.token) hide();
});

// The pointer may cross a gap between the two.
function hideSoon(which) {
  setTimeout(() => {
    if (popover === which && !popover.matches(":hover") && !popover.token.matches(":hover")) hide();
  }, 250);
}

const percent = (logprob) => `${(100 * Math.exp(logprob)).toFixed(logprob > -6.9 ? 1 : 3)}%`;

// A token for the eye: spaces and line ends are shown, and so are bytes that are no character by themselves.
function visible({ text, bytes }) {
  if (text.includes("\ufffd") && bytes)
    return bytes.map((byte) => `<${byte.toString(16).toUpperCase().padStart(2, "0")}>`).join("");
  return text.replace(/ /g, "\u2423").replace(/\n/g, "\u21b5").replace(/\t/g, "\u21e5") || "(nothing)";
}
