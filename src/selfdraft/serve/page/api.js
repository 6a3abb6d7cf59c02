// Talks to the server. Every failure becomes a Failure with words for a person.

import { loadKey } from "./store.js";

export class Failure extends Error {
  // kind: "key" | "busy" | "gone" | "refused" | "broken" | "failed"; wait: seconds after which to try again
  constructor(kind, message, { said = "", wait = null } = {}) {
    super(message);
    this.kind = kind;
    this.said = said;
    this.wait = wait;
  }
}

const WORDS = {
  400: "The server did not take this request.",
  403: "The server does not allow this.",
  404: "The server does not know this model or address. Reload the page.",
  413: "The request is too long for this server. Shorten the conversation.",
  415: "The server did not take this request.",
  429: "The server has all the requests that it can hold.",
  503: "The server has no room for this request now, or is about to stop.",
};

function headers() {
  const key = loadKey();
  return { "content-type": "application/json", ...(key ? { authorization: `Bearer ${key}` } : {}) };
}

// Where the page itself wants a key, the browser has asked for it as a password and sends it along. A key that was
// given to the page goes instead of it.
async function ask(path, options) {
  const credentials = loadKey() ? "omit" : "same-origin";
  try {
    return await fetch(path, { ...options, headers: headers(), credentials });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Failure("gone", "The server cannot be reached. Is it still running?");
  }
}

async function failureOf(response) {
  let said = "";
  try {
    said = (await response.json()).error.message;
  } catch {
    // not JSON: something between the page and the server has answered
  }
  if (response.status === 401) return new Failure("key", loadKey() ? "The server does not take this key." : "", { said });
  const words = WORDS[response.status] ?? "The server failed at this request.";
  const after = Number.parseInt(response.headers.get("retry-after") ?? "", 10);
  const wait = Number.isNaN(after) ? null : after;
  if (response.status === 429 || response.status === 503) return new Failure("busy", words, { said, wait: wait ?? 1 });
  return new Failure(response.status < 500 ? "refused" : "failed", words, { said, wait });
}

export async function info() {
  const response = await ask("v1/info", {});
  if (!response.ok) throw await failureOf(response);
  return response.json();
}

async function* texts(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  try {
    while (true) {
      const { value, done } = await reader.read();
      if (done) return;
      yield value;
    }
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Failure("broken", "The connection broke before the answer was whole. The text so far is kept.");
  }
}

async function* events(body) {
  let rest = "";
  for await (const text of texts(body)) {
    const blocks = (rest + text).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) if (block.startsWith("data: ")) yield block.slice("data: ".length);
  }
}

// The chunks of a streamed answer, to the end. Throws a Failure, or the AbortError of `signal`.
export async function* stream(path, body, signal) {
  const response = await ask(path, { method: "POST", body: JSON.stringify(body), signal });
  if (!response.ok) throw await failureOf(response);
  for await (const line of events(response.body)) {
    if (line === "[DONE]") return;
    const chunk = JSON.parse(line);
    if (chunk.error) {
      const words = "The server broke off before the answer was whole. The text so far is kept.";
      throw new Failure("broken", words, { said: chunk.error.message });
    }
    yield chunk;
  }
  throw new Failure("broken", "The stream ended before the answer was whole. The text so far is kept.");
}
