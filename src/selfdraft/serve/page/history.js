// The conversations of this browser, newest first. Nothing of it goes to the server.

import { Answer } from "./answer.js";
import { byId, make } from "./dom.js";
import { load, save } from "./store.js";

const MOST = 100;
const TITLE = 60;

function packed(conversation) {
  const turns = conversation.turns
    .filter((turn) => turn.answer.text)
    .map(({ prompt, system, options, answer }) => ({ prompt, system, options, answer: answer.saved }));
  return { ...conversation, turns };
}

export class History {
  // open: called with the conversation that was picked; gone: with the ids that were deleted
  constructor(open, gone) {
    this.open = open;
    this.gone = gone;
    this.sure = false;
    byId("open-history").addEventListener("click", () => this.#show());
    byId("delete-all").addEventListener("click", () => this.#deleteAll());
  }

  get #all() {
    return load("history", []);
  }

  // Keeps a conversation. False when the browser has no room for it; then the oldest ones have gone, too.
  keep(conversation) {
    const saved = packed(conversation);
    if (conversation.deleted || !saved.turns.length) return true;
    saved.changed = Date.now();
    saved.title = saved.turns[0].prompt.trim().slice(0, TITLE);
    const all = [saved, ...this.#all.filter((one) => one.id !== saved.id)].slice(0, MOST);
    while (all.length && !save("history", all)) all.pop();
    return all.length > 0;
  }

  #show() {
    this.#list();
    byId("history").showModal();
  }

  #list() {
    const all = this.#all;
    this.sure = false;
    byId("delete-all").textContent = "Delete all";
    byId("delete-all").hidden = !all.length;
    const empty = make("li", { class: "note" }, "No conversation is kept.");
    byId("conversations").replaceChildren(...(all.length ? all.map((one) => this.#row(one)) : [empty]));
  }

  #row(one) {
    const date = new Date(one.changed).toLocaleString([], { dateStyle: "medium", timeStyle: "short" });
    const open = make(
      "button",
      { type: "button", class: "pick", onclick: () => this.#pick(one) },
      make("span", {}, one.title || "Untitled"),
      make("span", { class: "note" }, `${one.mode === "chat" ? "Chat" : "Completion"} · ${date}`),
    );
    const label = `Delete: ${one.title}`;
    const remove = make("button", { type: "button", "aria-label": label, onclick: () => this.#delete(one.id) }, "Delete");
    return make("li", {}, open, remove);
  }

  #pick(one) {
    byId("history").close();
    this.open({ ...one, turns: one.turns.map((turn) => ({ ...turn, answer: Answer.from(turn.answer) })) });
  }

  #delete(id) {
    save("history", this.#all.filter((one) => one.id !== id));
    this.gone([id]);
    this.#list();
    (byId("conversations").querySelector("button") ?? byId("history").querySelector(".close")).focus();
  }

  // Asks once more before all is lost.
  #deleteAll() {
    const all = this.#all;
    if (!this.sure) {
      this.sure = true;
      byId("delete-all").textContent = `Really delete all ${all.length}?`;
      return;
    }
    save("history", []);
    this.gone(all.map((one) => one.id));
    this.#list();
    byId("history").querySelector(".close").focus();
  }
}
