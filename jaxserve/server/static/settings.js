// What the reader sets, and keeps in this browser.

import { $, count, make } from "./dom.js";
import { Failure, server } from "./server.js";

export const EXAMPLE_TOOL = {
  type: "function",
  function: {
    name: "get_weather",
    description: "Get the weather.",
    parameters: { type: "object", properties: { city: { type: "string" } }, required: ["city"] },
  },
};

const keptSettings = () => JSON.parse(localStorage.getItem("jaxserve") ?? "{}");

export const settings = {
  form: $("#settings"),
  thinking: true,

  value(name) {
    return this.form.elements[name].value.trim();
  },

  /** The fields of a request, of those that are set. */
  request() {
    const fields = { chat_template_kwargs: { enable_thinking: this.thinking } };
    for (const { name, type, value } of this.form.elements) {
      if (type === "number" && value !== "") fields[name] = Number(value);
    }
    const stop = this.form.elements.stop.value;
    if (stop) fields.stop = [stop];
    const tools = this.tools();
    if (tools.length) fields.tools = tools;
    return fields;
  },

  tools() {
    const written = this.value("tools");
    if (!written) return [];
    let tools;
    try {
      tools = JSON.parse(written);
    } catch (error) {
      throw new Failure(`The tools are not JSON: ${error.message}.`);
    }
    if (!Array.isArray(tools)) throw new Failure("The tools are no JSON list; put [ and ] around them.");
    return tools;
  },

  /** Let the reader choose, if there is a choice. The first name is the model's. */
  offerModels(names) {
    const choice = this.form.elements.model;
    const chosen = keptSettings().fields?.model;
    choice.replaceChildren(...names.map((name) => make("option", { value: name }, name)));
    if (names.includes(chosen)) choice.value = chosen;
    choice.closest("label").hidden = names.length < 2;
    this.show();
  },

  load() {
    const kept = keptSettings();
    for (const [name, value] of Object.entries(kept.fields ?? {})) {
      if (this.form.elements[name]) this.form.elements[name].value = value;
    }
    server.key = this.form.elements.key.value = sessionStorage.getItem("jaxserve key") ?? "";
    this.thinking = kept.thinking ?? true;
    document.documentElement.dataset.theme = kept.theme ?? "auto";
    this.show();
  },

  save() {
    const { key, ...fields } = Object.fromEntries(new FormData(this.form));
    const theme = document.documentElement.dataset.theme;
    localStorage.setItem("jaxserve", JSON.stringify({ fields, thinking: this.thinking, theme }));
    sessionStorage.setItem("jaxserve key", (server.key = key)); // gone with the tab
    this.show();
  },

  show() {
    $("#model").textContent = this.value("model");
    $("#thinking").setAttribute("aria-pressed", this.thinking);
    let label = "Tools";
    let problem = "";
    try {
      const tools = this.tools();
      if (tools.length) label = count(tools.length, "tool");
    } catch (failure) {
      problem = failure.message;
    }
    $("#tools-chip span").textContent = problem ? "Tools!" : label;
    $("#tools-chip").setAttribute("aria-pressed", label !== "Tools" || Boolean(problem));
    $("#tools-error").textContent = problem;
    $("#tools-error").hidden = !problem;
    const theme = document.documentElement.dataset.theme;
    $("#theme use").setAttribute("href", `#i-${theme}`);
    const title = `Theme: ${{ auto: "as the system has it", light: "light", dark: "dark" }[theme]}`;
    Object.assign($("#theme"), { title, ariaLabel: title });
  },
};
