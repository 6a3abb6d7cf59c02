// Runs one request and fills one Answer.

import { stream } from "./api.js";

// Returns normally when the answer is whole, or was stopped. Throws a Failure; the text so far stays in `answer`.
export async function decode(request, answer, signal, changed) {
  answer.begun = performance.now();
  try {
    for await (const chunk of stream(request.path, request.body, signal)) {
      answer.take(chunk);
      changed();
    }
    answer.end("done");
  } catch (error) {
    answer.end(error.name === "AbortError" ? "stopped" : "broken");
    if (error.name !== "AbortError") throw error;
  } finally {
    changed();
  }
}

// The messages of a conversation up to and with turn `index`.
function messages(conversation, index) {
  const turn = conversation.turns[index];
  const found = turn.system ? [{ role: "system", content: turn.system }] : [];
  for (const { prompt, answer } of conversation.turns.slice(0, index)) {
    found.push({ role: "user", content: prompt }, { role: "assistant", content: answer.text });
  }
  return [...found, { role: "user", content: turn.prompt }];
}

// The request of a turn: {path, body}. `details`: whether the server tells who drafted what.
export function requestOf(conversation, turn, details) {
  const body = { ...turn.options, stream: true, stream_options: { include_usage: true } };
  if (details) Object.assign(body, { draft_details: true, draft_tree: true });
  if (conversation.mode === "completion") return { path: "v1/completions", body: { ...body, prompt: turn.prompt } };
  const index = conversation.turns.indexOf(turn);
  return { path: "v1/chat/completions", body: { ...body, messages: messages(conversation, index) } };
}
