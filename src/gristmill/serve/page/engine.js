// The engine while it works: what runs, what waits, how full the cache is, and how fast tokens come.

import { engineState } from "./api.js";
import { $, node, svg } from "./dom.js";

const EVERY = 1000; // milliseconds
const KEPT = 60; // readings in the curve

let timer = null;
let cards = {}; // by model

export function watch(on) {
  clearTimeout(timer);
  timer = null;
  cards = {};
  $("engine-view").replaceChildren();
  if (on) poll();
}

async function poll() {
  const mine = (timer = setTimeout(poll, EVERY));
  try {
    const engines = await engineState();
    if (mine !== timer) return; // closed or overtaken meanwhile
    const now = performance.now();
    cards = Object.fromEntries(engines.map(({ model }) => [model, cards[model] ?? card(model)]));
    for (const state of engines) cards[state.model].show(state, now);
    $("engine-view").replaceChildren(...Object.values(cards).map(({ element }) => element));
  } catch (error) {
    if (mine === timer) $("engine-view").replaceChildren(node("p", "failure", error.message));
  }
}

function card(name) {
  const figures = node("dl", "figures");
  const line = svg("polyline", { fill: "none", "vector-effect": "non-scaling-stroke" });
  const curve = svg(
    "svg",
    { viewBox: `0 0 ${KEPT - 1} 30`, preserveAspectRatio: "none", class: "curve", role: "img" },
    line,
  );
  const [used, cached] = [node("span", "used"), node("span", "cached")];
  const blocks = node("div", "blocks", used, cached);
  blocks.setAttribute("role", "img");
  const legend = node("p", "small");
  const element = node("section", "card", node("h3", "", name), figures, curve, blocks, legend);
  const rates = [];
  let before = null;

  function show(state, now) {
    const seconds = before ? (now - before.now) / 1000 : null;
    const rate = (key) => (seconds ? Math.max(0, state[key] - before.state[key]) / seconds : 0);
    if (seconds) rates.push(rate("generated_tokens"));
    rates.splice(0, rates.length - KEPT);
    const rows = {
      Running: state.running,
      Waiting: state.waiting,
      "Tokens/s": rate("generated_tokens").toFixed(1),
      "Prompt tokens/s": rate("prompt_tokens").toFixed(1),
      "Cache hits": state.cache_hit_rate === null ? "none yet" : `${(100 * state.cache_hit_rate).toFixed(1)}%`,
    };
    figures.replaceChildren(
      ...Object.entries(rows).map(([label, value]) =>
        node("div", "", node("dt", "", label), node("dd", "", String(value))),
      ),
    );
    const top = Math.max(1, ...rates);
    line.setAttribute(
      "points",
      rates.map((each, i) => `${KEPT - rates.length + i},${29 - (28 * each) / top}`).join(" "),
    );
    curve.setAttribute("aria-label", `Tokens per second over the last minute, at most ${top.toFixed(0)}`);
    const total = state.blocks_used + state.blocks_cached + state.blocks_free || 1;
    used.style.width = `${(100 * state.blocks_used) / total}%`;
    cached.style.width = `${(100 * state.blocks_cached) / total}%`;
    legend.textContent = `Blocks: ${state.blocks_used} used, ${state.blocks_cached} cached, ${state.blocks_free} free`;
    blocks.setAttribute("aria-label", legend.textContent);
    before = { state, now };
  }
  return { element, show };
}
