// Small helpers to build the document. Text becomes text nodes, never markup.

export const $ = (id) => document.getElementById(id);

export function node(tag, className = "", ...children) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  element.append(...children.filter((child) => child !== null));
  return element;
}

export function button(label, action, className = "quiet") {
  const element = node("button", className, label);
  element.type = "button";
  element.addEventListener("click", action);
  return element;
}

export function icon(name, label, action, className = "icon") {
  const element = button("", action, className);
  const use = svg("use", { href: `#i-${name}` });
  element.append(svg("svg", {}, use));
  element.setAttribute("aria-label", label);
  element.title = label;
  return element;
}

export function svg(tag, attributes, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

export function download(name, type, text) {
  const link = node("a");
  link.href = URL.createObjectURL(new Blob([text], { type }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}
