// Colours code by what all common languages share: comments, strings, numbers, names of calls and a list of keywords.

import { node } from "./dom.js";

const WORDS = new Set(
  (
    "abstract and any as assert async await bool boolean break case catch char class const continue def default del " +
    "delete do double elif else enum except export extends extern false False final finally float fn for from func " +
    "function global go if impl implements import in int interface is lambda let long match mod mut namespace new nil " +
    "None nonlocal not null or package pass private protected pub public raise return self static string struct super " +
    "switch then this throw trait true True try type typedef typeof union unsafe use using var virtual void where while with yield " +
    "done echo esac fi local SELECT FROM WHERE JOIN ON GROUP BY ORDER INSERT INTO VALUES UPDATE SET CREATE TABLE LIMIT"
  ).split(" "),
);

const HASH = "#.*";
const SLASHES = "\\/\\/.*|\\/\\*[^]*?(?:\\*\\/|$)";
const COMMENTS = {
  hash: HASH,
  slashes: SLASHES,
  dashes: `--.*|${SLASHES}`,
  markup: "<!--[^]*?(?:-->|$)",
  none: "(?!)",
};
const LANGUAGES = {
  slashes:
    "c cpp c++ cs csharp css cuda dart go java javascript js jsx kotlin php rs rust scala swift ts tsx typescript",
  dashes: "haskell lua sql",
  markup: "html svg xml",
  none: "diff json",
};
const PROSE = ["markdown", "md", "text", "txt"];

const familyOf = (language) =>
  Object.keys(LANGUAGES).find((family) => LANGUAGES[family].split(" ").includes(language)) ?? "hash";

const rules = Object.fromEntries(
  Object.entries(COMMENTS).map(([family, comment]) => [
    family,
    new RegExp(
      `(?<comment>${comment})` +
        "|(?<string>\"\"\"[^]*?(?:\"\"\"|$)|'''[^]*?(?:'''|$)|\"(?:\\\\.|[^\"\\\\\\n])*\"?|'(?:\\\\.|[^'\\\\\\n])*'|`(?:\\\\.|[^`\\\\])*`)" +
        "|(?<number>\\b(?:0[xXbBoO][\\da-fA-F_]+|\\d[\\d_]*(?:\\.\\d+)?(?:[eE][+-]?\\d+)?)\\b)" +
        "|(?<word>[A-Za-z_$][\\w$]*)",
      "g",
    ),
  ]),
);

// Text and span nodes that together spell `text`.
export function highlighted(text, language) {
  if (text.length > 50_000 || PROSE.includes(language)) return [text];
  const pieces = [];
  let end = 0;
  for (const match of text.matchAll(rules[familyOf(language.toLowerCase())])) {
    const kind = kindOf(match, text);
    if (!kind) continue;
    pieces.push(text.slice(end, match.index), node("span", kind, match[0]));
    end = match.index + match[0].length;
  }
  return [...pieces, text.slice(end)];
}

function kindOf({ 0: matched, groups, index }, text) {
  if (groups.word === undefined) return ["comment", "string", "number"].find((kind) => groups[kind] !== undefined);
  if (WORDS.has(matched)) return "keyword";
  return text[index + matched.length] === "(" ? "call" : null;
}
