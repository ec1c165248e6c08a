// The playground. Plain modules, no build step; this one ties the others to the page.

import { editTurn, fitPrompt, isAtEnd, isRunning, lastUserTurn, log, newChat, prompt, send, stop, toEnd } from "./conversation.js";
import { $, make } from "./dom.js";
import { look } from "./live.js";
import { EXAMPLE_TOOL, settings } from "./settings.js";

const EXAMPLES = [
  { text: "What is 27+45?", about: "Thinks it through first" },
  { text: "What is the capital of France?", about: "A fact" },
  { text: "Turn this into JSON: Anna is 31 years old and lives in Rome.", about: "Structure" },
  { text: "What is the weather in Paris?", about: "Calls a tool", tools: [EXAMPLE_TOOL] },
];

const isWide = () => matchMedia("(min-width: 60rem)").matches; // then the side stands beside the chat

function showSide(open) {
  document.body.classList.toggle("side-open", open);
  document.body.classList.toggle("side-shut", !open && isWide());
  $("#shade").hidden = !open || isWide();
  $("#open-side").setAttribute("aria-expanded", open);
}

const sideIsOpen = () =>
  isWide() ? !document.body.classList.contains("side-shut") : document.body.classList.contains("side-open");

function openTools() {
  showSide(true);
  $("#tools-section").open = true;
  settings.form.elements.tools.scrollIntoView({ block: "nearest" });
  settings.form.elements.tools.focus();
}

function insertTool(tools) {
  settings.form.elements.tools.value = JSON.stringify(tools, null, 2);
  settings.save();
}

for (const { text, about, tools } of EXAMPLES) {
  const button = make("button", { type: "button" }, make("span", {}, text), make("small", { className: "faint" }, about));
  button.addEventListener("click", () => {
    if (tools) insertTool(tools);
    send(text);
  });
  $("#examples").append(button);
}

$("#composer").addEventListener("submit", (event) => {
  event.preventDefault();
  if (isRunning()) return stop();
  const text = prompt.value;
  prompt.value = "";
  fitPrompt();
  send(text);
});

prompt.addEventListener("input", fitPrompt);
prompt.addEventListener("keydown", (event) => {
  if (event.isComposing) return;
  if (event.key === "Enter" && !event.shiftKey) {
    event.preventDefault();
    if (!isRunning() && prompt.value.trim()) $("#composer").requestSubmit();
  } else if (event.key === "ArrowUp" && !prompt.value && !isRunning()) {
    const last = lastUserTurn();
    if (last) {
      event.preventDefault();
      editTurn(last);
    }
  }
});

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") {
    if (isRunning()) stop();
    else if (document.body.classList.contains("side-open")) showSide(false);
  } else if (event.key === "/" && !/^(INPUT|TEXTAREA)$/.test(document.activeElement?.tagName)) {
    event.preventDefault();
    prompt.focus();
  }
});

log.addEventListener("scroll", () => ($("#to-end").hidden = isAtEnd()));
$("#to-end").addEventListener("click", toEnd);
$("#new-chat").addEventListener("click", newChat);
$("#pulse").addEventListener("click", () => showSide(true));
$("#open-side").addEventListener("click", () => showSide(!sideIsOpen()));
$("#close-side").addEventListener("click", () => showSide(false));
$("#shade").addEventListener("click", () => showSide(false));
$("#tools-chip").addEventListener("click", openTools);
$("#example-tool").addEventListener("click", () => insertTool([EXAMPLE_TOOL]));
$("#thinking").addEventListener("click", () => {
  settings.thinking = !settings.thinking;
  settings.save();
});
$("#theme").addEventListener("click", () => {
  const themes = ["auto", "light", "dark"];
  const { dataset } = document.documentElement;
  dataset.theme = themes[(themes.indexOf(dataset.theme) + 1) % themes.length];
  settings.save();
});
$("#reset-settings").addEventListener("click", () => {
  const { key } = settings.form.elements;
  const kept = key.value;
  settings.form.reset();
  key.value = kept;
  settings.thinking = true;
  settings.save();
});
settings.form.addEventListener("input", () => settings.save());
settings.form.addEventListener("submit", (event) => event.preventDefault());

addEventListener("pagehide", stop); // a page that may come back would keep its connections

settings.load();
fitPrompt();
look();
if (matchMedia("(hover: hover)").matches) prompt.focus();
