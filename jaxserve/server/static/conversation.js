// The conversation: its turns, what is sent of them, and how they are shown.

import { Answer } from "./answer.js";
import { $, announce, copyText, count, icon, make, rate } from "./dom.js";
import { look } from "./live.js";
import { showMarkdown } from "./markdown.js";
import { events, Failure } from "./server.js";
import { settings } from "./settings.js";

export const log = $("#log");
export const prompt = $("#prompt");

/** The turns of the conversation, each with the node that shows it: of `user`, `assistant` or `tool`. */
let turns = [];
let running = null; // the AbortController of the answer that comes now

export const isRunning = () => Boolean(running);
export const stop = () => running?.abort();
export const lastUserTurn = () => turns.findLast((turn) => turn instanceof UserTurn);

function messages() {
  const system = settings.value("system");
  return [...(system ? [{ role: "system", content: system }] : []), ...turns.flatMap((turn) => turn.messages())];
}

class UserTurn {
  constructor(text) {
    this.text = text;
    const edit = make("button", { type: "button", className: "tool-button", title: "Edit", ariaLabel: "Edit" }, icon("edit"));
    edit.addEventListener("click", () => editTurn(this));
    this.node = make("article", { className: "turn user" }, edit, make("div", { className: "bubble" }, text));
  }

  messages() {
    return [{ role: "user", content: this.text }];
  }
}

class ToolTurn {
  constructor(results) {
    this.results = results; // {call, content}
    const shown = results.map(({ call, content }) =>
      make("p", { className: "bubble result" }, icon("tool"), make("span", {}, make("b", {}, call.name), ` returned ${content}`)),
    );
    this.node = make("article", { className: "turn user" }, make("div", { className: "results" }, ...shown));
  }

  messages() {
    return this.results.map(({ call, content }) => ({ role: "tool", tool_call_id: call.id, content }));
  }
}

class AssistantTurn {
  constructor() {
    this.answer = new Answer();
    this.error = "";
    this.stopped = false;
    this.done = false;
    this.started = performance.now();
    this.first = this.last = this.thoughtAt = null;
    this.summary = make("span");
    this.thought = make("div", { className: "thought" });
    this.thinking = make(
      "details",
      { className: "thinking", hidden: true },
      make("summary", {}, icon("think"), this.summary, icon("chevron")),
      this.thought,
    );
    this.wait = make("p", { className: "wait", ariaLabel: "Waiting for the first token" }, make("i"), make("i"), make("i"));
    this.text = make("div", { className: "text" });
    this.calls = make("div", { className: "calls" });
    this.problem = make("div", { className: "problem", role: "alert", hidden: true });
    this.facts = make("footer", { className: "facts faint" });
    this.node = make(
      "article",
      { className: "turn assistant" },
      this.thinking, this.wait, this.text, this.calls, this.problem, this.facts,
    );
  }

  messages() {
    const { text, calls } = this.answer.parts;
    if (!text && !calls.length) return [];
    const called = calls.map((call) => ({
      id: call.id,
      type: "function",
      function: { name: call.name, arguments: call.arguments },
    }));
    return [{ role: "assistant", content: text, ...(called.length && { tool_calls: called }) }];
  }

  /** Take a chunk of the stream; what is shown follows with the next frame. */
  add(chunk) {
    this.last = performance.now();
    this.first ??= this.last;
    this.answer.add(chunk);
    const { thought, thinks } = this.answer.parts;
    if (this.thoughtAt === null && thought && !thinks) this.thoughtAt = this.last;
    this.frame ??= requestAnimationFrame(() => this.show());
  }

  end() {
    this.done = true;
    cancelAnimationFrame(this.frame);
    this.show();
  }

  show() {
    this.frame = null;
    const atEnd = isAtEnd();
    const { thought, thinks, text, calls } = this.answer.parts;
    const busy = !this.done;
    this.thinking.hidden = !thought;
    this.thinking.classList.toggle("busy", busy && thinks);
    this.thought.textContent = thought;
    this.summary.textContent = this.toldOfThinking(thinks);
    this.wait.hidden = !busy || Boolean(text || calls.length || thought);
    showMarkdown(this.text, text);
    this.text.classList.toggle("busy", busy && Boolean(text) && !calls.length);
    this.showCalls(calls);
    this.problem.hidden = !this.error;
    this.problem.replaceChildren(icon("warn"), make("p", {}, this.error));
    this.showFacts();
    if (atEnd) toEnd();
  }

  toldOfThinking(thinks) {
    if (thinks) return this.done ? "Thought until it was cut" : "Thinking";
    const seconds = (this.thoughtAt - this.first) / 1000;
    return seconds < 0.1 ? "Thought for a moment" : `Thought for ${seconds.toFixed(1)} s`;
  }

  showCalls(calls) {
    while (this.calls.children.length > calls.length) this.calls.lastChild.remove();
    calls.forEach((call, index) => {
      const shown = this.calls.children[index] ?? this.calls.appendChild(new CallCard().node);
      shown.card.show(call, this.done && !this.stopped && !this.error);
    });
    if (this.done && calls.length && !this.error && !this.stopped && this.wantsResults) this.calls.append(this.resultsButton(calls));
  }

  get wantsResults() {
    return turns.at(-1) === this;
  }

  resultsButton(calls) {
    const button = make("button", { type: "button", className: "button" }, calls.length > 1 ? "Send results" : "Send result");
    button.addEventListener("click", () => {
      const fields = [...this.calls.querySelectorAll("textarea")];
      const empty = fields.find((field) => !field.value.trim());
      if (empty) return empty.focus();
      const results = calls.map((call, index) => ({ call, content: fields[index].value.trim() }));
      this.closeCalls();
      push(new ToolTurn(results));
      answer();
    });
    return button;
  }

  /** Results can no longer be given: the conversation has gone on. */
  closeCalls() {
    for (const field of this.calls.querySelectorAll("label, .button")) field.remove();
  }

  showFacts() {
    const { tokens, finish } = this.answer;
    const facts = [];
    if (tokens) facts.push(count(tokens, "token"));
    if (this.first) facts.push(`first after ${((this.first - this.started) / 1000).toFixed(2)} s`);
    const seconds = (this.last - this.first) / 1000;
    if (tokens > 1 && seconds > 0) facts.push(`${rate((tokens - 1) / seconds)} tokens/s`);
    if (this.stopped) facts.push("stopped");
    if (finish === "length") facts.push("cut at the limit of tokens");
    this.facts.replaceChildren(make("span", {}, facts.join(" · ")));
    if (this.done) this.facts.append(...this.buttons());
  }

  buttons() {
    const button = (name, title, act) => {
      const made = make("button", { type: "button", className: "tool-button", title, ariaLabel: title }, icon(name));
      made.addEventListener("click", () => act(made));
      return made;
    };
    return [
      button("copy", "Copy the answer", (made) => copyText(this.answer.parts.text || this.answer.content, made)),
      button("code", "Copy the request as curl", (made) => copyText(this.curl, made)),
      button("retry", "Answer again", () => retry(this)),
    ];
  }

  get curl() {
    const { stream, stream_options, ...body } = this.body;
    const url = new URL("v1/chat/completions", document.baseURI);
    const json = JSON.stringify(body, null, 2).replaceAll("'", "'\\''");
    return `curl ${url} -H 'Content-Type: application/json' -d '${json}'`;
  }
}

class CallCard {
  constructor() {
    this.name = make("b");
    this.given = make("pre", { tabIndex: 0 });
    this.node = make("section", { className: "call" }, make("header", {}, icon("tool"), this.name), this.given);
    this.node.card = this;
  }

  show(call, asks) {
    this.name.textContent = call.name || "tool call";
    this.given.textContent = pretty(call.arguments);
    if (asks && !this.asked) {
      this.asked = true;
      const field = make("textarea", { rows: 1, placeholder: 'What it returns, such as {"sky": "sunny"}' });
      field.addEventListener("keydown", (event) => {
        if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
          event.preventDefault();
          this.node.parentNode.querySelector(".button").click();
        }
      });
      this.node.append(make("label", {}, make("span", { className: "faint" }, "Result"), field));
    }
  }
}

function pretty(json) {
  try {
    return JSON.stringify(JSON.parse(json), null, 2);
  } catch {
    return json;
  }
}

function push(turn) {
  turns.push(turn);
  $("#turns").append(turn.node);
  $("#welcome").hidden = true;
  toEnd();
}

/** Take a turn and all after it out of the conversation. */
function cutFrom(turn) {
  running?.abort();
  for (const later of turns.splice(turns.indexOf(turn))) later.node.remove();
  $("#welcome").hidden = turns.length > 0;
}

export function editTurn(turn) {
  cutFrom(turn);
  prompt.value = turn.text;
  fitPrompt();
  prompt.focus();
}

function retry(turn) {
  cutFrom(turn);
  answer();
}

export function newChat() {
  if (turns.length) cutFrom(turns[0]);
  prompt.focus();
}

export function send(text) {
  if (running || !text.trim()) return;
  const last = turns.at(-1);
  if (last instanceof AssistantTurn) last.closeCalls();
  push(new UserTurn(text.trim()));
  answer();
}

/** Let the model write the next turn. */
async function answer() {
  const turn = new AssistantTurn();
  const control = (running = new AbortController());
  const before = messages();
  push(turn);
  showRunning();
  try {
    turn.body = {
      model: settings.value("model"),
      messages: before,
      ...settings.request(),
      stream: true,
      stream_options: { include_usage: true, continuous_usage_stats: true },
    };
    for await (const chunk of events("v1/chat/completions", turn.body, control.signal)) turn.add(chunk);
    announce("The answer is complete.");
  } catch (error) {
    if (control.signal.aborted) turn.stopped = true;
    else if (error instanceof Failure) turn.error = error.message;
    else throw error;
  } finally {
    turn.end();
    if (running === control) running = null;
    showRunning();
    look();
  }
}

function showRunning() {
  const busy = Boolean(running);
  const button = $("#send");
  button.classList.toggle("stop", busy);
  $("use", button).setAttribute("href", busy ? "#i-stop" : "#i-send");
  Object.assign(button, busy ? { title: "Stop (Esc)", ariaLabel: "Stop" } : { title: "Send (Enter)", ariaLabel: "Send" });
  button.disabled = !busy && !prompt.value.trim();
}

export const isAtEnd = () => log.scrollHeight - log.scrollTop - log.clientHeight < 48;

export function toEnd() {
  log.scrollTop = log.scrollHeight;
}

export function fitPrompt() {
  prompt.style.height = "auto";
  prompt.style.height = `${prompt.scrollHeight}px`;
  showRunning();
}
