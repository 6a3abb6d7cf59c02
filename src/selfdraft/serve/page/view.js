// One turn on the screen: what was asked, and the answer with its tokens coloured by who proposed them.

import { count, make } from "./dom.js";
import { classOf, titleOf } from "./sources.js";

const NEAR = 60; // pixels
const ENDS = {
  stopped: "Stopped. The text so far is kept.",
  broken: "Broken off. The text so far is kept.",
};

export class TurnView {
  // actions: {compare(turn, view), inspect(turn)}
  constructor(turn, mode, actions) {
    this.turn = turn;
    this.shown = 0; // tokens, or characters where there are no tokens
    this.text = make("div", { class: "text" });
    this.state = make("p", { class: "note state" });
    this.compareButton = make("button", { type: "button", onclick: () => actions.compare(turn, this) }, "Compare with plain decoding");
    this.inspectButton = make("button", { type: "button", onclick: () => actions.inspect(turn) }, "Show figures and tree");
    this.copyButton = make("button", { type: "button", onclick: () => this.#copy() }, "Copy");
    this.buttons = make("div", { class: "actions" }, this.compareButton, this.inspectButton, this.copyButton);
    this.extra = make("div");
    const asked = mode === "chat" ? "You" : "Prompt";
    const answer = make("div", { class: "answer" }, make("h3", {}, mode === "chat" ? "Answer" : "Completion"), this.text);
    answer.append(this.state, this.buttons, this.extra);
    const question = make("div", { class: "asked" }, make("h3", {}, asked), make("div", { class: "text" }, turn.prompt));
    this.node = make("article", { class: `turn ${mode}` }, question, answer);
    this.waiting = null;
    turn.answer.mark = (step) => this.#mark(step);
    this.refresh();
  }

  // Many chunks may come within a frame; the screen is changed once.
  changed() {
    this.waiting ??= requestAnimationFrame(() => this.#follow());
  }

  // Keeps the end of the answer in view, unless the reader has scrolled away from it.
  #follow() {
    const near = this.node.getBoundingClientRect().bottom < window.innerHeight + NEAR;
    this.refresh();
    if (near) this.node.scrollIntoView({ block: "end" });
  }

  refresh() {
    cancelAnimationFrame(this.waiting);
    this.waiting = null;
    const { answer } = this.turn;
    if (answer.tokens.length) this.#addTokens(answer.tokens);
    else this.#addText(answer.text);
    if (!answer.running && !answer.whole) this.text.replaceChildren(answer.text);
    this.text.classList.toggle("running", answer.running);
    this.text.setAttribute("aria-busy", answer.running);
    this.buttons.hidden = answer.running;
    this.compareButton.hidden = !answer.text;
    this.copyButton.hidden = !answer.text;
    this.state.textContent = this.#words(answer);
  }

  #words(answer) {
    if (answer.state === "waiting") return "Reading the prompt …";
    if (answer.running) return "";
    if (!answer.text && answer.state !== "done") return "There is no answer.";
    const parts = [ENDS[answer.state], answer.size ? count(answer.size, "token") : ""];
    if (answer.finish === "length") parts.push("ended at the maximum of tokens");
    if (answer.state === "done" && !answer.text) parts.unshift("The model said nothing.");
    if (!answer.whole) parts.push("without colours: a stop text cut through a token");
    return parts.filter(Boolean).join(" · ");
  }

  #addTokens(tokens) {
    const fresh = tokens.slice(this.shown).map(([text, source]) => {
      return make("span", { class: classOf(source), title: titleOf(source) }, text);
    });
    this.shown = tokens.length;
    this.text.append(...fresh);
  }

  #addText(text) {
    if (text.length > this.shown) this.text.append(text.slice(this.shown));
    this.shown = text.length;
  }

  #mark(step) {
    for (const old of this.text.querySelectorAll(".of-step")) old.classList.remove("of-step");
    if (!step || !this.turn.answer.whole) return;
    for (let index = step.before; index < step.after; index++) this.text.children[index]?.classList.add("of-step");
  }

  async #copy() {
    try {
      await navigator.clipboard.writeText(this.turn.answer.text);
      this.copyButton.textContent = "Copied";
    } catch {
      this.copyButton.textContent = "The browser does not allow it";
    }
    setTimeout(() => (this.copyButton.textContent = "Copy"), 2000);
  }
}
