// Markdown, as far as models use it.

import { copyText, make } from "./dom.js";

const INLINE = new RegExp(
  [
    "`([^`\\n]+)`",
    "\\*\\*(?=\\S)([^]+?)(?<=\\S)\\*\\*",
    "(?<![\\w*])\\*(?=[^\\s*])([^*\\n]+?)(?<=[^\\s*])\\*(?![\\w*])",
    "\\[([^\\]\\n]+)\\]\\((https?://[^\\s)]+)\\)",
    "(https?://[^\\s<>()]+[^\\s<>().,;:!?'\"])",
  ].join("|"),
  "g",
);

function inline(text) {
  const nodes = [];
  let from = 0;
  const link = (label, href) => make("a", { href, target: "_blank", rel: "noopener noreferrer" }, label);
  for (const found of text.matchAll(INLINE)) {
    const [all, code, strong, emphasis, label, target, address] = found;
    nodes.push(text.slice(from, found.index));
    from = found.index + all.length;
    if (code) nodes.push(make("code", {}, code));
    else if (strong) nodes.push(make("strong", {}, ...inline(strong)));
    else if (emphasis) nodes.push(make("em", {}, ...inline(emphasis)));
    else nodes.push(link(label ?? address, target ?? address));
  }
  nodes.push(text.slice(from));
  return nodes;
}

const FENCE = /^\s*(```+|~~~+)\s*([\w+#.-]*)/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;
const ROW = /^\s*\|.*\|\s*$/;
const KINDS = [
  ["heading", /^#{1,6}\s/],
  ["rule", /^\s*([-*_])(\s*\1){2,}\s*$/],
  ["quote", /^\s*>/],
  ["table", ROW],
  ["list", ITEM],
];
const kindOf = (line) => KINDS.find(([, pattern]) => pattern.test(line))?.[0] ?? (line.trim() ? "paragraph" : "blank");

/** The text's blocks: `{kind, source}`, the lines of each together. */
function blocks(text) {
  const found = [];
  let fence = null;
  let last = null;
  const open = (kind, line) => found.push((last = { kind, source: line }));
  for (const line of text.split("\n")) {
    if (fence) {
      last.source += `\n${line}`;
      if (line.trim().startsWith(fence) && !line.trim().slice(fence.length).trim()) fence = last = null;
      continue;
    }
    if ((fence = line.match(FENCE)?.[1] ?? null)) {
      open("code", line);
      continue;
    }
    const kind = kindOf(line);
    const goesOn =
      (last?.kind === "list" && (kind === "list" || (kind !== "blank" && /^\s{2,}/.test(line)))) ||
      (last?.kind === "table" && /^\s*\|/.test(line)); // a row that is still being written
    if (kind === "blank") last = null;
    else if (goesOn || (last?.kind === kind && !["heading", "rule"].includes(kind))) last.source += `\n${line}`;
    else open(kind, line);
  }
  return found;
}

function renderBlock({ kind, source }) {
  const lines = source.split("\n");
  switch (kind) {
    case "code": {
      const closed = lines.length > 1 && /^\s*(```+|~~~+)\s*$/.test(lines.at(-1));
      return codeBlock(lines.slice(1, closed ? -1 : undefined).join("\n"), lines[0].match(FENCE)[2]);
    }
    case "heading":
      return make(`h${Math.min(6, 2 + source.match(/^#+/)[0].length)}`, {}, ...inline(source.replace(/^#+\s+/, "")));
    case "rule":
      return make("hr");
    case "quote":
      return make("blockquote", {}, ...blocks(lines.map((line) => line.replace(/^\s*> ?/, "")).join("\n")).map(renderBlock));
    case "table":
      return table(lines);
    case "list":
      return list(lines);
    default:
      return make("p", {}, ...inline(source));
  }
}

function codeBlock(code, language) {
  const copy = make("button", { type: "button", className: "link", textContent: "Copy" });
  copy.addEventListener("click", () => copyText(code, copy));
  return make(
    "figure",
    { className: "code-block" },
    make("figcaption", {}, make("span", {}, language || "text"), copy),
    make("pre", { tabIndex: 0 }, make("code", {}, code)),
  );
}

function table(lines) {
  const cells = (line) => line.trim().replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim());
  const hasHead = lines.length > 1 && /^[\s|:-]+$/.test(lines[1]);
  const rows = lines.filter((_, index) => !(hasHead && index === 1)).map((line, index) =>
    make("tr", {}, ...cells(line).map((cell) => make(hasHead && index === 0 ? "th" : "td", {}, ...inline(cell)))),
  );
  return make("div", { className: "table" }, make("table", {}, ...rows));
}

function list(lines) {
  const [, indent, mark] = lines[0].match(ITEM);
  const items = [];
  for (const line of lines) {
    const item = line.match(ITEM);
    if (item && item[1].length <= indent.length) items.push([item[3]]);
    else items.at(-1).push(line);
  }
  const rendered = items.map(([first, ...rest]) => {
    const nested = rest.findIndex((line) => ITEM.test(line));
    const own = [first, ...(nested < 0 ? rest : rest.slice(0, nested)).map((line) => line.trim())].join("\n");
    return make("li", {}, ...inline(own), nested < 0 ? null : list(rest.slice(nested)));
  });
  const ordered = /\d/.test(mark);
  return make(ordered ? "ol" : "ul", ordered ? { start: parseInt(mark, 10) } : {}, ...rendered);
}

/** Let `container` show `text`. Blocks that have not changed keep their nodes, and so a selection in them. */
export function showMarkdown(container, text) {
  const wanted = blocks(text);
  wanted.forEach((block, index) => {
    const shown = container.children[index];
    if (shown?.source === block.source) return;
    const node = renderBlock(block);
    node.source = block.source;
    if (shown) shown.replaceWith(node);
    else container.append(node);
  });
  while (container.children.length > wanted.length) container.lastChild.remove();
}
