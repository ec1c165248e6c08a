// What all modules use to make and fill nodes. Text goes into the page as text nodes, never as HTML.

export const $ = (selector, root = document) => root.querySelector(selector);

export function make(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children.filter((child) => child != null));
  return node;
}

export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `#i-${name}`);
  svg.append(use);
  return svg;
}

export const number = (value) => Math.round(value).toLocaleString("en");
export const rate = (value) => (value > 0 && value < 10 ? value.toFixed(1) : number(value));
export const count = (value, noun) => `${number(value)} ${noun}${value === 1 ? "" : "s"}`;

export function announce(words) {
  $("#announce").textContent = words;
}

export async function copyText(text, button) {
  const before = button.title || button.textContent;
  const told = (await navigator.clipboard?.writeText(text).then(() => true, () => false)) ? "Copied" : "Cannot copy";
  const tell = (words) => (button.title ? (button.title = words) : (button.textContent = words));
  tell(told);
  announce(told);
  button.classList.add("told");
  setTimeout(() => {
    tell(before);
    button.classList.remove("told");
  }, 1200);
}
