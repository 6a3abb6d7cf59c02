// One answer as it comes: its text, its tokens with their sources, its steps, and the figures of all that.

import { groupOf } from "./sources.js";

function total(steps, size) {
  return steps.reduce((sum, step) => sum + size(step), 0);
}

export class Answer {
  constructor() {
    this.text = "";
    this.tokens = []; // [text, source]
    this.steps = []; // {tokens: how many before and after it, tree}
    this.state = "waiting"; // then "streaming", and at the end "done" | "stopped" | "broken"
    this.finish = null;
    this.usage = null;
    this.metrics = null;
    this.begun = performance.now();
    this.first = null;
    this.last = null;
    this.firstSize = 0;
    this.sources = new Map(); // group -> {tokens, drafted, accepted}
    this.pieces = 0;
    this.kept = null; // the figures of an answer of the history
    this.mark = null; // set by the view: shows which tokens a step brought
  }

  static from(saved) {
    const { text, tokens, state, finish, usage, figures, sources } = saved;
    const answer = Object.assign(new Answer(), { text, tokens, finish, usage, kept: figures });
    answer.sources = new Map(sources);
    answer.end(state);
    return answer;
  }

  // What the history keeps: no trees, they are many times larger than the text.
  get saved() {
    const { text, tokens, state, finish, usage, figures } = this;
    return { text, tokens, state, finish, usage, figures, sources: [...this.sources] };
  }

  get running() {
    return this.state === "waiting" || this.state === "streaming";
  }

  take(chunk, now = performance.now()) {
    if (chunk.usage) this.usage = chunk.usage;
    if (chunk.metrics) this.metrics = chunk.metrics.speculative_decoding;
    const choice = chunk.choices[0];
    if (!choice) return;
    this.state = "streaming";
    this.text += choice.delta ? (choice.delta.content ?? "") : choice.text;
    this.finish = choice.finish_reason ?? this.finish;
    const tokens = chunk.draft?.tokens ?? [];
    this.pieces += 1;
    if (this.first === null) {
      this.first = now;
      this.firstSize = tokens.length;
    }
    this.last = now;
    if (chunk.draft) this.#count(tokens, chunk.draft_tree);
  }

  #count(tokens, tree) {
    const before = this.tokens.length;
    for (const { text, source } of tokens) {
      this.tokens.push([text, source]);
      this.#row(groupOf(source)).tokens += 1;
    }
    if (!tree) return;
    this.steps.push({ before, after: this.tokens.length, tree });
    tree.sources.forEach((source) => (this.#row(groupOf(source)).drafted += 1));
    tree.accepted.forEach((node) => (this.#row(groupOf(tree.sources[node])).accepted += 1));
  }

  #row(group) {
    if (!this.sources.has(group)) this.sources.set(group, { tokens: 0, drafted: 0, accepted: 0 });
    return this.sources.get(group);
  }

  end(state) {
    this.state = state;
    // a stop text cuts in the midst of a token: then the tokens say more than the text has
    this.whole = !this.tokens.length || this.tokens.map(([text]) => text).join("") === this.text;
  }

  get size() {
    return this.usage?.completion_tokens ?? (this.tokens.length || this.pieces);
  }

  get figures() {
    if (this.kept) return this.kept;
    const drafted = total(this.steps, (step) => step.tree.tokens.length);
    const accepted = total(this.steps, (step) => step.tree.accepted.length);
    const later = this.last - this.first;
    const tokens = this.size - (this.firstSize || 1);
    const length = this.steps.length ? this.tokens.length / this.steps.length : null;
    return {
      acceptanceLength: this.metrics?.mean_acceptance_length ?? length,
      steps: this.steps.length,
      drafted,
      accepted,
      rate: later > 0 && tokens > 0 ? (1000 * tokens) / later : null,
      firstToken: this.first === null ? null : this.first - this.begun,
    };
  }
}
