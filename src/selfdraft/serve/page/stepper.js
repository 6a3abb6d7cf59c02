// The token tree and the steps of one answer: following it live, paused, stepped through, or played again.

import { atMostEvery, byId } from "./dom.js";
import { drawSteps, drawTree, sentence } from "./tree.js";

const LIVE = 400; // a step of a small model takes less time than an eye; drawing all would slow the model down, too
const PLAY = 1600;

export class Stepper {
  constructor() {
    this.answer = null;
    this.shown = -1; // index of the step on the screen
    this.following = true;
    this.timer = null;
    this.slider = byId("step");
    this.slider.addEventListener("input", () => this.#go(this.slider.valueAsNumber - 1));
    byId("earlier").addEventListener("click", () => this.#go(this.shown - 1));
    byId("later").addEventListener("click", () => this.#go(this.shown + 1));
    byId("play").addEventListener("click", () => this.#press());
    this.refresh = atMostEvery(LIVE, () => this.#refresh());
    this.#refresh();
  }

  show(answer) {
    this.#halt();
    this.answer = answer;
    this.shown = -1;
    this.following = true;
    this.#refresh();
  }

  get #running() {
    return this.answer?.running ?? false;
  }

  get #count() {
    return this.answer?.steps.length ?? 0;
  }

  #refresh() {
    if (this.following && this.shown !== this.#count - 1) {
      this.shown = this.#count - 1;
      this.#draw(this.#running ? "live" : "still");
    } else if (this.#count === 0) {
      byId("tree").replaceChildren();
      byId("tree-said").textContent = this.#empty();
    }
    this.#controls();
  }

  #empty() {
    if (this.#running) return "Waiting for the first step.";
    if (this.answer) return "The steps of this answer were not kept.";
    return "Send something, and the tree of each step is drawn here.";
  }

  #go(index) {
    this.#halt();
    this.following = false;
    this.#select(index);
  }

  #select(index) {
    this.shown = Math.min(Math.max(index, 0), this.#count - 1);
    this.#draw("replay");
    this.#controls();
  }

  #press() {
    if (this.#running) {
      this.following = !this.following;
      this.#refresh();
    } else if (this.timer !== null) {
      this.#halt();
      this.#controls();
    } else {
      this.following = false;
      this.timer = setInterval(() => this.#next(), PLAY);
      this.#select(this.shown >= this.#count - 1 ? 0 : this.shown);
    }
  }

  #next() {
    if (this.shown >= this.#count - 1) this.#halt();
    else this.#select(this.shown + 1);
    this.#controls();
  }

  #halt() {
    clearInterval(this.timer);
    this.timer = null;
  }

  #draw(pace) {
    const step = this.answer?.steps[this.shown];
    if (!step) return;
    const words = sentence(step, this.shown + 1, this.#count);
    const before = step.before ? this.answer.tokens[step.before - 1][0] : "prompt";
    byId("tree").replaceChildren(drawTree(step.tree, before, words.long, pace));
    this.slider.setAttribute("aria-valuetext", words.short);
    this.answer.mark?.(this.following ? null : step);
  }

  #controls() {
    const count = this.#count;
    this.slider.max = Math.max(count, 1);
    this.slider.value = this.shown + 1;
    this.slider.disabled = count === 0;
    byId("earlier").disabled = this.shown <= 0;
    byId("later").disabled = this.shown >= count - 1;
    const button = byId("play");
    button.disabled = count === 0 && !this.#running;
    if (this.#running) button.textContent = this.following ? "Pause" : "Follow";
    else button.textContent = this.timer === null ? "Play" : "Pause";
    byId("steps").replaceChildren(drawSteps(this.answer?.steps ?? [], this.shown));
    if (count) byId("tree-said").textContent = sentence(this.answer.steps[this.shown], this.shown + 1, count).short;
  }
}
