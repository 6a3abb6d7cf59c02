// The settings: what they are called, what they mean, and what they become in a request.

import { Failure } from "./api.js";
import { byId, make } from "./dom.js";
import { load, save } from "./store.js";

const FIELDS = [
  { name: "temperature", label: "Temperature", type: "number", min: 0, max: 2, step: 0.1, otherwise: 0,
    means: "0 always takes the likeliest token; the higher, the more is left to chance." },
  { name: "top_p", label: "Top p", type: "number", min: 0.01, max: 1, step: 0.01, otherwise: 1,
    means: "Only the likeliest tokens that together reach this probability may be drawn." },
  { name: "max_tokens", label: "Maximum tokens", type: "number", min: 1, step: 1, otherwise: 256,
    means: "The answer ends after so many tokens, if the model has not ended it before." },
  { name: "seed", label: "Seed", type: "number", step: 1, otherwise: "",
    means: "The same seed draws the same answer; empty takes a new one each time." },
  { name: "drafter", label: "Drafter", type: "select", otherwise: "",
    means: "The method that proposes tokens; it changes the speed, never the text." },
  { name: "num_speculative_tokens", label: "Drafted tokens per step", type: "number", min: 1, max: 256, step: 1, otherwise: "",
    means: "Most tokens that a step proposes; empty leaves it to the drafter." },
  { name: "prediction", label: "Prediction", type: "text", otherwise: "",
    means: "A text that the answer will mostly repeat, such as a file to be edited; it is drafted from." },
  { name: "schema", label: "JSON schema", type: "text", otherwise: "",
    means: "The answer becomes JSON that fits this schema; empty allows any text." },
];

const defaults = () => Object.fromEntries(FIELDS.map((field) => [field.name, field.otherwise]));

function randomSeed() {
  return crypto.getRandomValues(new Uint32Array(1))[0] >>> 1;
}

export class Settings {
  constructor(changed) {
    this.changed = changed;
    this.values = { ...defaults(), ...load("settings", {}) };
    this.drafters = [];
    byId("settings-reset").addEventListener("click", () => this.#set(defaults()));
    byId("settings-form").addEventListener("submit", (event) => {
      event.preventDefault();
      if (this.#valid()) byId("settings").close();
    });
    this.#build();
  }

  // `info`: what the server says of itself
  know(info) {
    this.own = info.drafter;
    this.drafters = info.drafters;
    if (!this.drafters.includes(this.values.drafter)) this.values.drafter = "";
    this.#build();
  }

  #set(values) {
    this.values = values;
    this.#store();
    this.#build();
  }

  #store() {
    save("settings", this.values);
    this.changed();
  }

  #build() {
    byId("fields").replaceChildren(...FIELDS.map((field) => this.#row(field)));
    this.#valid();
  }

  #row(field) {
    const id = `set-${field.name}`;
    const input = this.#input(field, id);
    input.addEventListener("input", () => {
      this.values[field.name] = input.value;
      this.#store();
      this.#valid();
    });
    const note = make("p", { class: "note", id: `${id}-note` }, field.means);
    const fault = make("p", { class: "fault", id: `${id}-fault`, hidden: true });
    return make("div", { class: `field ${field.type}` }, make("label", { for: id }, field.label), input, note, fault);
  }

  #input(field, id) {
    const { name, type, min, max } = field;
    const value = this.values[name];
    const shared = { id, name, "aria-describedby": `${id}-note ${id}-fault` };
    if (type === "select") {
      const others = this.drafters.filter((drafter) => drafter !== this.own);
      const own = make("option", { value: "" }, this.own ? `${this.own} (the server's own)` : "the server's own");
      const select = make("select", shared, own, ...others.map((one) => make("option", { value: one }, one)));
      select.value = value;
      return select;
    }
    const input = type === "text" ? make("textarea", { ...shared, rows: 3, spellcheck: "false" })
      : make("input", { ...shared, type: "number", step: "any", min, max, inputmode: "decimal" });
    input.value = value;
    return input;
  }

  // Says beside the field what is wrong with the schema.
  #valid() {
    let fault = "";
    try {
      this.#schema();
    } catch (error) {
      fault = error.message;
    }
    const place = byId("set-schema-fault");
    place.textContent = fault;
    place.hidden = !fault;
    byId("set-schema").setAttribute("aria-invalid", fault ? "true" : "false");
    return !fault;
  }

  #schema() {
    const text = this.values.schema.trim();
    if (!text) return null;
    try {
      return JSON.parse(text);
    } catch (error) {
      throw new Failure("refused", "The JSON schema in the settings is no JSON.", { said: error.message });
    }
  }

  #number(name) {
    const value = this.values[name];
    return value === "" ? null : Number(value);
  }

  // The options of a request. Throws a Failure when a setting cannot be sent.
  options() {
    const found = {
      temperature: this.#number("temperature") ?? 0,
      top_p: this.#number("top_p") ?? 1,
      max_tokens: this.#number("max_tokens") ?? 256,
      seed: this.#number("seed") ?? randomSeed(),
    };
    const { drafter, prediction } = this.values;
    const most = this.#number("num_speculative_tokens");
    if (drafter || most !== null) found.speculative_config = { method: drafter || this.own };
    if (most !== null && drafter !== "none") found.speculative_config.num_speculative_tokens = most;
    if (prediction) found.prediction = { type: "content", content: prediction };
    const schema = this.#schema();
    if (schema !== null) found.response_format = { type: "json_schema", json_schema: { name: "answer", schema } };
    return found;
  }

  // The settings in one line.
  get summary() {
    const { temperature, max_tokens, drafter, prediction, schema, seed } = this.values;
    const parts = [
      drafter === "none" ? "plain decoding" : `drafter ${drafter || this.own || "auto"}`,
      `temperature ${temperature || 0}`,
      `at most ${max_tokens || 256} tokens`,
    ];
    if (seed !== "") parts.push(`seed ${seed}`);
    if (prediction) parts.push("prediction");
    if (schema.trim()) parts.push("JSON schema");
    return parts.join(" · ");
  }
}
