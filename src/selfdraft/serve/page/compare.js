// The same prompt with drafts and then plainly, with the same seed: both clocks, and whether the texts are equal.

import { Answer } from "./answer.js";
import { decode } from "./decode.js";
import { make, seconds } from "./dom.js";

const TICK = 100;
const AROUND = 24;

// Both runs read the whole prompt: with a salt of its own neither finds what an earlier request had prefilled.
function salted(body) {
  const salt = [...crypto.getRandomValues(new Uint32Array(4))].map((part) => part.toString(16)).join("");
  const { draft_tree: _, ...rest } = body;
  return { ...rest, cache_salt: salt };
}

function bodies(body) {
  const drafted = salted(body);
  if (drafted.speculative_config?.method === "none") delete drafted.speculative_config;
  return [drafted, { ...salted(body), speculative_config: { method: "none" } }];
}

class Side {
  constructor(title) {
    this.clock = make("p", { class: "clock", role: "timer" }, seconds(0));
    this.figures = make("p", { class: "note" }, "waits");
    this.text = make("div", { class: "text", tabindex: "0", role: "group", "aria-label": `Text of: ${title}` });
    this.node = make("div", { class: "side" }, make("h4", {}, title), this.clock, this.figures, this.text);
    this.answer = new Answer();
  }

  async run(request, signal) {
    const timer = setInterval(() => this.#tick(performance.now() - this.answer.begun), TICK);
    this.figures.textContent = "reads the prompt";
    this.node.classList.add("running");
    try {
      await decode(request, this.answer, signal, () => (this.text.textContent = this.answer.text));
    } finally {
      clearInterval(timer);
      this.node.classList.remove("running");
      this.#tick(this.time);
    }
  }

  get time() {
    return this.answer.last === null ? 0 : this.answer.last - this.answer.begun;
  }

  #tick(time) {
    this.clock.textContent = seconds(time);
    const { rate, acceptanceLength } = this.answer.figures;
    const length = acceptanceLength ? ` · ${acceptanceLength.toFixed(2)} a pass` : "";
    this.figures.textContent = `${this.answer.size} tokens${rate ? ` · ${rate.toFixed(1)} a second` : ""}${length}`;
    this.text.scrollTop = this.text.scrollHeight;
  }
}

function firstDifference(one, other) {
  let place = 0;
  while (place < one.length && one[place] === other[place]) place += 1;
  const part = (text) => JSON.stringify(text.slice(Math.max(place - AROUND, 0), place + AROUND));
  return `They first differ at character ${place + 1}: ${part(one)} with drafts, ${part(other)} plainly.`;
}

function verdict(drafted, plain) {
  const [one, other] = [drafted.answer.text, plain.answer.text];
  const ratio = plain.time / drafted.time;
  const equal = one === other;
  const words = equal ? `The texts are equal, all ${one.length} characters.` : "The texts are not equal.";
  const nodes = [
    make("span", { class: "ratio", "aria-hidden": "true" }, `${ratio.toFixed(2)}×`),
    make("strong", {}, words),
    make("span", {}, `${ratio.toFixed(2)} times as fast with drafts: ${seconds(drafted.time)} instead of ${seconds(plain.time)}.`),
  ];
  if (!equal) nodes.push(make("span", {}, firstDifference(one, other)));
  return { equal, nodes };
}

function notes(info) {
  const found = ["One after the other, since they share the machine. Neither reuses a prompt that was read before."];
  if (info?.shared_memory) {
    found.push("This server drafts from earlier answers, and this one is among them: the speed-up is larger than for a new text.");
  }
  return make("p", { class: "note" }, found.join(" "));
}

// Shows the comparison in `place`. Throws a Failure when one of the two fails.
export async function compare(request, place, info, signal) {
  const [drafted, plain] = [new Side("With drafts"), new Side("Plain decoding")];
  const said = make("p", { class: "verdict", role: "status" });
  const sides = make("div", { class: "sides" }, drafted.node, plain.node);
  const section = make("section", { class: "compare", "aria-label": "Comparison" }, notes(info), sides, said);
  place.replaceChildren(section);
  section.scrollIntoView({ block: "nearest" });
  const [first, second] = bodies(request.body);
  await drafted.run({ ...request, body: first }, signal);
  if (!signal.aborted) await plain.run({ ...request, body: second }, signal);
  if (signal.aborted) {
    said.textContent = "Stopped before both were whole.";
    return;
  }
  const { equal, nodes } = verdict(drafted, plain);
  said.classList.add(equal ? "equal" : "unequal");
  said.replaceChildren(...nodes);
  section.scrollIntoView({ block: "nearest" });
}
