// A thread is what one model and the user said, as a tree: an edit or a new answer is a branch, and none is lost.
//
// It is plain data: {model, first, nodes}. A node is {role, content, parent, next, ...}: `parent` is the index of the
// message before it (-1 at the beginning), `next` that of the one shown after it (-1 at the end). A parent stands before
// its children in `nodes`, so that no path is a circle.

export const newThread = (model) => ({ model, first: -1, nodes: [] });

// The indices of the messages on show, in order.
export function path({ first, nodes }) {
  const indices = [];
  for (let index = first; index !== -1; index = nodes[index].next) indices.push(index);
  return indices;
}

export function append(thread, parent, message) {
  thread.nodes.push({ ...message, parent, next: -1 });
  choose(thread, thread.nodes.length - 1);
  return thread.nodes.length - 1;
}

// Undoes the last `append`; `shown` is the branch that was on show there before, or -1.
export function takeBack(thread, shown) {
  const { parent } = thread.nodes.pop();
  if (parent === -1) thread.first = shown;
  else thread.nodes[parent].next = shown;
}

export function choose(thread, index) {
  const { parent } = thread.nodes[index];
  if (parent === -1) thread.first = index;
  else thread.nodes[parent].next = index;
}

// The message on show after this one (-1: the first of all), or -1.
export const shownAfter = (thread, parent) => (parent === -1 ? thread.first : thread.nodes[parent].next);

// All messages at this place, oldest first, as indices.
export function siblings({ nodes }, index) {
  return nodes.flatMap((other, i) => (other.parent === nodes[index].parent ? [i] : []));
}

// The conversation up to and with this message (-1: nothing), as the interface takes it.
export function messages({ nodes }, index) {
  const said = [];
  for (let i = index; i !== -1; i = nodes[i].parent) said.unshift(asMessage(nodes[i]));
  return said;
}

function asMessage({ role, content, toolCalls, toolCallId }) {
  if (role === "tool") return { role, content, tool_call_id: toolCallId };
  if (!toolCalls?.length) return { role, content };
  const calls = toolCalls.map(({ id, name, text }) => ({ id, type: "function", function: { name, arguments: text } }));
  return { role, content: content || null, tool_calls: calls };
}

// Whether this is a thread, with nothing in it that the page would stumble over.
export function isThread(value) {
  const { model, first, nodes } = value ?? {};
  if (typeof model !== "string" || !Array.isArray(nodes)) return false;
  const follows = (parent, next) => next === -1 || nodes[next]?.parent === parent;
  return follows(-1, first) && nodes.every((node, i) => isNode(node, i) && follows(i, node.next));
}

function isNode(node, index) {
  const isText = (value) => value === undefined || typeof value === "string";
  return (
    ["user", "assistant", "tool"].includes(node?.role) &&
    typeof node.content === "string" &&
    Number.isInteger(node.parent) &&
    node.parent >= -1 &&
    node.parent < index &&
    Number.isInteger(node.next) &&
    [node.model, node.reasoning, node.facts, node.failure, node.toolCallId].every(isText) &&
    (node.toolCalls ?? []).every?.((call) => [call?.id, call?.name, call?.text].every((x) => typeof x === "string")) &&
    (node.tokens ?? []).every?.((token) => isToken(token) && Array.isArray(token.top) && token.top.every(isToken))
  );
}

function isToken(token) {
  const { text, logprob, id = 0, bytes } = token ?? {};
  return (
    typeof text === "string" &&
    Number.isFinite(logprob) &&
    Number.isInteger(id) &&
    (bytes ?? []).every?.(Number.isInteger)
  );
}
