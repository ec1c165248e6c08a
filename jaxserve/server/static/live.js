// The engine, live.

import { $, count, make, number, rate } from "./dom.js";
import { call, Failure, server } from "./server.js";
import { settings } from "./settings.js";

const INTERVAL = 1000; // milliseconds
const HISTORY = 60; // looks that the curve shows
const history = []; // tokens per second, the last on the right
const MOST_SLOTS = 64; // shown as squares; more are one bar
let lastLook = null;
let nextLook = null;

document.addEventListener("visibilitychange", () => (document.hidden ? clearTimeout(nextLook) : look()));

export async function look() {
  clearTimeout(nextLook);
  nextLook = null;
  try {
    const stats = await (await call("stats")).json();
    if (!server.model) await meet();
    showStats(stats);
  } catch (error) {
    if (!(error instanceof Failure)) throw error;
    lastLook = null;
    const wantsKey = error.status === 401;
    if (wantsKey) $("#access").open = true;
    showPulse("lost", wantsKey ? "wants an API key" : "unreachable");
  } finally {
    clearTimeout(nextLook);
    nextLook = document.hidden ? null : setTimeout(look, INTERVAL);
  }
}

/** Ask once who is there. */
async function meet() {
  const [models, { version }] = await Promise.all([
    call("v1/models").then((response) => response.json()),
    call("version").then((response) => response.json()),
  ]);
  const [{ id, max_model_len }] = models.data;
  server.model = id;
  settings.offerModels(models.data.map((model) => model.id));
  $("#context").textContent = `${number(max_model_len)} tokens`;
  $("#greeting").textContent = `Talk to ${id}`;
  $("#version").textContent = `jaxserve ${version}`;
  document.title = `${id} · jaxserve`;
}

function showStats(stats) {
  const seconds = lastLook ? stats.seconds - lastLook.seconds : 0;
  const perSecond = (name) => (seconds > 0 ? Math.max(0, stats[name] - lastLook[name]) / seconds : 0);
  const generated = perSecond("total_generated_tokens");
  const prompts = perSecond("total_prompt_tokens");
  if (lastLook) history.push(generated);
  if (history.length > HISTORY) history.shift();
  lastLook = stats;

  const pages = stats.pages_held + stats.pages_cached + stats.pages_free;
  const texts = {
    rate: rate(generated),
    "prompt-rate": rate(prompts),
    running: number(stats.running),
    "max-running": number(stats.max_running),
    waiting: number(stats.waiting),
    pages: count(pages, "page"),
    held: number(stats.pages_held),
    cached: number(stats.pages_cached),
    free: number(stats.pages_free),
    hits: stats.total_prefix_cache_queries
      ? `${Math.round((100 * stats.total_prefix_cache_hits) / stats.total_prefix_cache_queries)}%`
      : "–",
    generated: number(stats.total_generated_tokens),
    preemptions: number(stats.total_preemptions),
    compilations: number(stats.total_compilations),
  };
  for (const [id, text] of Object.entries(texts)) $(`#${id}`).textContent = text;
  for (const state of ["held", "cached", "free"]) {
    $(`#bar-${state}`).style.flexGrow = stats[`pages_${state}`];
    $(`#bar-${state}`).hidden = !stats[`pages_${state}`];
  }
  showSlots(stats);
  showCurve();
  const busy = stats.running + stats.waiting > 0;
  showPulse(busy ? "busy" : "ready", busy ? `${rate(generated)} tok/s` : "ready");
}

function showSlots({ running, max_running: most }) {
  const slots = $("#slots");
  const squares = most <= MOST_SLOTS ? most : 1;
  slots.classList.toggle("one", squares === 1);
  while (slots.children.length < squares) slots.append(make("i"));
  while (slots.children.length > squares) slots.lastChild.remove();
  if (squares === 1) slots.firstChild.style.setProperty("--share", `${(100 * running) / most}%`);
  else [...slots.children].forEach((slot, index) => slot.classList.toggle("on", index < running));
}

function showCurve() {
  const highest = Math.max(1, ...history);
  const x = (index) => (120 * (HISTORY - history.length + index)) / (HISTORY - 1);
  const points = history.map((value, index) => `${x(index).toFixed(2)} ${(34 - (32 * value) / highest).toFixed(2)}`);
  $("#spark .line").setAttribute("d", points.length ? `M${points.join("L")}` : "");
  $("#spark .area").setAttribute("d", points.length ? `M${x(0).toFixed(2)} 36L${points.join("L")}L120 36Z` : "");
}

function showPulse(state, text) {
  $("#pulse").dataset.state = state;
  $("#pulse-text").textContent = text;
}
