// Markdown, code and maths as document nodes. The text of a model is never parsed as HTML: the lexer gives tokens, and
// every piece of text becomes a text node. Nothing is loaded from elsewhere: an image is shown as a link to it.

import { button, node } from "./dom.js";
import { highlighted } from "./highlight.js";
import { Marked } from "./vendor/marked/marked.esm.js";

const LONGEST = 200_000; // characters; longer texts, and those nested too deeply, are shown as they are

const maths = (name, level, begin, rule) => ({
  name,
  level,
  start: (source) => source.match(begin)?.index,
  tokenizer(source) {
    const match = rule.exec(source);
    if (match) return { type: "maths", raw: match[0], text: match.slice(1).find(Boolean), display: level === "block" };
  },
});

const lexer = new Marked({ gfm: true });
lexer.use({
  extensions: [
    maths("displayMaths", "block", /\$\$|\\\[/, /^(?:\$\$([^$]+?)\$\$|\\\[([^]+?)\\\])[ \t]*(?:\n|$)/),
    maths("maths", "inline", /\$|\\\(|\\\[/, /^(?:\$\$([^$\n]+?)\$\$|\\\(([^\n]+?)\\\)|\\\[([^\n]+?)\\\])/),
    // "costs $5 or $6" is no formula: inside the dollars stands no space at the ends, and no digit follows them
    maths("dollars", "inline", /\$/, /^\$(?![\s$])((?:\\.|[^$\n\\])*?(?:[^\s\\$]|\\.))\$(?![\d$])/),
  ],
});

// Shows `text` in `target`. Blocks that are as before stay in place, so that a growing answer does not flicker and a
// selection in it lasts.
export function showMarkdown(target, text) {
  if (target.markdown === text) return;
  target.markdown = text;
  let tokens;
  try {
    if (text.length > LONGEST) throw new RangeError("too long");
    tokens = lexer.lexer(text).filter(({ type }) => type !== "space" && type !== "def");
    const old = [...target.children];
    const kept = tokens.findIndex((token, i) => old[i]?.source !== token.raw || old[i]?.kind !== token.type);
    const from = kept === -1 ? tokens.length : kept;
    const fresh = tokens
      .slice(from)
      .map((token) => Object.assign(block(token), { source: token.raw, kind: token.type }));
    old.slice(from).forEach((element) => element.remove());
    target.append(...fresh);
  } catch {
    target.replaceChildren(node("pre", "plain", text));
  }
}

function block(token) {
  switch (token.type) {
    case "paragraph":
      return node("p", "", ...inline(token.tokens));
    case "heading": // the page has h1 and h2
      return node(`h${Math.min(token.depth + 2, 6)}`, "", ...inline(token.tokens));
    case "code":
      return code(token.text, token.lang);
    case "blockquote":
      return node("blockquote", "", ...token.tokens.filter(shown).map(block));
    case "list":
      return list(token);
    case "table":
      return table(token);
    case "hr":
      return node("hr");
    case "maths":
      return formula(token);
    case "text":
      return node("p", "", ...inline(token.tokens ?? [token]));
    default:
      return node("p", "", token.raw);
  }
}

const shown = ({ type }) => type !== "space" && type !== "def";

function inline(tokens) {
  return tokens.map((token) => {
    switch (token.type) {
      case "strong":
      case "em":
      case "del":
        return node(token.type, "", ...inline(token.tokens));
      case "codespan":
        return node("code", "", token.text);
      case "br":
        return node("br");
      case "link":
        return link(token.href, inline(token.tokens));
      case "image":
        return link(token.href, [`image: ${token.text || token.href}`]);
      case "maths":
        return formula(token);
      case "text":
        return token.tokens ? node("span", "", ...inline(token.tokens)) : withoutEntities(token.text);
      case "escape":
        return token.text;
      default:
        return token.raw;
    }
  });
}

const ENTITIES = { amp: "&", lt: "<", gt: ">", quot: '"', apos: "'", nbsp: "\u00a0" };
const withoutEntities = (text) => text.replace(/&(amp|lt|gt|quot|apos|nbsp);/g, (_, name) => ENTITIES[name]);

function link(address, children) {
  const url = URL.canParse(address) ? new URL(address) : null;
  if (!["http:", "https:", "mailto:"].includes(url?.protocol)) return node("span", "", ...children, ` (${address})`);
  const element = node("a", "", ...children);
  element.href = url.href;
  element.target = "_blank";
  element.rel = "noopener noreferrer";
  element.title = url.href;
  return element;
}

function list(token) {
  const element = node(token.ordered ? "ol" : "ul");
  if (token.ordered) element.start = token.start;
  for (const item of token.items) {
    const children = item.tokens.filter(shown).flatMap((child) => {
      if (child.type === "checkbox") return [];
      if (child.type === "text") return inline(child.tokens ?? [child]);
      return [block(child)];
    });
    if (item.task) {
      const box = node("input");
      Object.assign(box, { type: "checkbox", checked: item.checked, disabled: true });
      children.unshift(box, " ");
    }
    element.append(node("li", item.task ? "task" : "", ...children));
  }
  return element;
}

function table({ header, rows }) {
  const row = (cells, tag) =>
    node("tr", "", ...cells.map((cell) => node(tag, cell.align ?? "", ...inline(cell.tokens))));
  const body = node("tbody", "", ...rows.map((cells) => row(cells, "td")));
  const scroller = node("div", "wide", node("table", "", node("thead", "", row(header, "th")), body));
  scroller.tabIndex = 0;
  return scroller;
}

function code(text, language = "") {
  const name = language.match(/^[\w+#.-]{1,20}/)?.[0] ?? "";
  const pre = node("pre", "", node("code", "", ...highlighted(text, name)));
  pre.tabIndex = 0; // so that the keyboard can scroll it
  const bar = node("div", "code-bar", node("span", "", name || "code"));
  if (navigator.clipboard) bar.append(copyButton("Copy code", () => text));
  return node("div", "code", bar, pre);
}

export function copyButton(label, text) {
  const element = button("Copy", async () => {
    await navigator.clipboard.writeText(text());
    element.textContent = "Copied";
    setTimeout(() => (element.textContent = "Copy"), 1500);
  });
  element.setAttribute("aria-label", label);
  return element;
}

// Loaded with the first formula; until then, and for what it cannot read, its source stands there.
let katex = null;

function formula({ text, raw, display }) {
  const element = node(display ? "div" : "span", "maths", raw.trim());
  if (display) element.tabIndex = 0; // so that the keyboard can scroll it
  katex ??= loadKatex();
  katex
    .then(({ render }) =>
      render(text, element, { displayMode: display, throwOnError: false, trust: false, maxExpand: 200, maxSize: 20 }),
    )
    .catch(() => element.replaceChildren(raw.trim()));
  return element;
}

async function loadKatex() {
  const style = node("link");
  Object.assign(style, { rel: "stylesheet", href: "/static/vendor/katex/katex.min.css" });
  document.head.append(style);
  await import("./vendor/katex/katex.min.js"); // a classic script: it names itself on the window
  return window.katex;
}
