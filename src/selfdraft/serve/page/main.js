// Puts the page together: the conversation, what runs now, and the panel beside it.

import { Answer } from "./answer.js";
import { Failure, info } from "./api.js";
import { compare } from "./compare.js";
import { decode, requestOf } from "./decode.js";
import { atMostEvery, byId, make } from "./dom.js";
import { askKey, hideFailure, showFailure } from "./failure.js";
import { showFigures, showSources } from "./figures.js";
import { History } from "./history.js";
import { Settings } from "./settings.js";
import { Stepper } from "./stepper.js";
import { saveWord } from "./store.js";
import { TurnView } from "./view.js";

const THEMES = ["auto", "light", "dark"];
const PANEL = 150; // milliseconds between two drawings of the figures while an answer runs
const EXAMPLES = {
  chat: [
    "Write a Python function that tells whether a word is a palindrome, and three tests for it.",
    "List the twelve months, one a line, with the number of days of each.",
    "What is a forward pass of a language model? Answer in three sentences.",
  ],
  completion: ["Once upon a time there was a", "def fibonacci(n):\n    "],
};
const NOTES = {
  chat: "The model gets the whole conversation.",
  completion: "The model goes on with the text; each prompt stands alone.",
};

const page = {
  server: null, // what /v1/info says
  conversation: null,
  views: new Map(), // turn -> TurnView
  inspected: null, // the answer whose figures and tree are shown
  running: null, // AbortController of what runs
  settings: new Settings(() => (byId("summary").textContent = page.settings.summary)),
  stepper: new Stepper(),
  history: null,
};

const refreshPanel = atMostEvery(PANEL, () => {
  showFigures(page.inspected);
  showSources(page.inspected);
});

// The conversation

function begin(mode) {
  const id = crypto.getRandomValues(new Uint32Array(2)).join("-");
  open({ id, mode, turns: [] });
}

function open(conversation) {
  page.running?.abort();
  page.conversation = conversation;
  page.views.clear();
  hideFailure();
  for (const mode of ["chat", "completion"]) {
    byId(`mode-${mode}`).setAttribute("aria-pressed", String(mode === conversation.mode));
  }
  byId("mode-note").textContent = NOTES[conversation.mode];
  byId("system-box").hidden = conversation.mode !== "chat";
  byId("prompt-label").textContent = conversation.mode === "chat" ? "Message" : "Text to go on with";
  byId("prompt").placeholder = conversation.mode === "chat" ? "Ask something" : "A text to go on with";
  const last = conversation.turns.at(-1);
  if (last) byId("system").value = last.system;
  byId("turns").replaceChildren(...(last ? conversation.turns.map(addView) : [welcome()]));
  inspect(last?.answer ?? null);
}

function welcome() {
  const examples = EXAMPLES[page.conversation.mode].map((text) => {
    return make("button", { type: "button", class: "example", onclick: () => send(text) }, text);
  });
  const words =
    "Each forward pass of the model checks a tree of drafted tokens. What it agrees with is kept, " +
    "so the text is exactly what it would have been, and comes in fewer passes.";
  return make("div", { class: "welcome" }, make("p", {}, words), make("p", { class: "note" }, "For example:"), ...examples);
}

function addView(turn) {
  const actions = { compare: (one, view) => runComparison(one, view), inspect: (one) => inspect(one.answer, true) };
  const view = new TurnView(turn, page.conversation.mode, actions);
  page.views.set(turn, view);
  return view.node;
}

function inspect(answer, jump = false) {
  page.inspected?.mark?.(null);
  page.inspected = answer;
  page.stepper.show(answer);
  showFigures(answer);
  showSources(answer);
  if (jump) byId("figures-title").scrollIntoView({ block: "nearest" });
}

// What runs

function setRunning(controller) {
  page.running = controller;
  const [stop, send] = [byId("stop"), byId("send")];
  const held = [stop, send].includes(document.activeElement);
  stop.hidden = !controller;
  send.hidden = Boolean(controller);
  if (held) (controller ? stop : byId("prompt")).focus();
}

// Does `work`; asks for a key where one is missing, and tells what failed. True when it worked.
async function attempt(work) {
  hideFailure();
  try {
    await work();
    return true;
  } catch (error) {
    const known = error instanceof Failure;
    const failure = known ? error : new Failure("failed", "This page has a fault.", { said: String(error) });
    const again = () => attempt(work);
    if (failure.kind === "key" && (await askKey(failure.message))) return again();
    showFailure(failure, again);
    return false;
  }
}

// Runs `work` with a signal that Stop aborts. One thing runs at a time.
function run(work) {
  return attempt(async () => {
    if (page.running) return;
    const controller = new AbortController();
    setRunning(controller);
    try {
      await work(controller.signal);
    } finally {
      setRunning(null);
    }
  });
}

async function send(text) {
  if (page.running || !text.trim()) return;
  if (!page.server && !(await attempt(connect))) return;
  byId("prompt").value = "";
  const { conversation } = page;
  let turn = null; // of the attempt before: trying again replaces it
  await run((signal) => {
    const system = conversation.mode === "chat" ? byId("system").value.trim() : "";
    const options = page.settings.options();
    // turns without an answer are no part of the conversation
    conversation.turns = conversation.turns.filter((one) => one !== turn && one.answer.text);
    turn = { prompt: text, system, options, answer: new Answer() };
    conversation.turns.push(turn);
    byId("turns").replaceChildren(...conversation.turns.map((one) => page.views.get(one)?.node ?? addView(one)));
    return runTurn(conversation, turn, signal);
  });
}

async function runTurn(conversation, turn, signal) {
  const [view, { answer }] = [page.views.get(turn), turn];
  const changed = () => {
    view.changed();
    page.stepper.refresh();
    refreshPanel();
  };
  inspect(answer);
  byId("spoken").textContent = "The model answers.";
  view.node.scrollIntoView({ block: "end" });
  try {
    await decode(requestOf(conversation, turn, page.server.details), answer, signal, changed);
  } finally {
    view.refresh();
    byId("spoken").textContent = answer.text ? `Answer: ${answer.text}` : "No answer.";
    if (!page.history.keep(conversation)) byId("spoken").textContent += " The browser has no room to keep it.";
  }
}

function runComparison(turn, view) {
  const request = requestOf(page.conversation, turn, page.server?.details);
  run((signal) => compare(request, view.extra, page.server, signal));
}

// The server

async function connect() {
  page.server = await info();
  const { model, version, exactness, details } = page.server;
  const exact = make("span", { class: "chip", title: exactness.why }, `exactness: ${exactness.level}`);
  byId("about").replaceChildren(make("span", { class: "chip" }, model), exact, make("span", { class: "note" }, version));
  page.settings.know(page.server);
  byId("summary").textContent = page.settings.summary;
  byId("no-details").hidden = details;
  byId("no-details").textContent =
    "This server does not tell who drafted what, so there are no colours and no token tree. " +
    "Whoever runs it can start it with --details.";
  byId("sources-section").hidden = byId("tree-section").hidden = !details;
}

// Buttons and keys

function listenToComposer() {
  byId("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    send(byId("prompt").value);
  });
  byId("prompt").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    send(byId("prompt").value);
  });
  byId("stop").addEventListener("click", () => page.running?.abort());
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !document.querySelector("dialog[open]")) page.running?.abort();
  });
}

function listenToHead() {
  byId("new").addEventListener("click", () => {
    begin(page.conversation.mode);
    byId("prompt").focus();
  });
  for (const mode of ["chat", "completion"]) {
    byId(`mode-${mode}`).addEventListener("click", () => mode === page.conversation.mode || begin(mode));
  }
  byId("open-settings").addEventListener("click", () => byId("settings").showModal());
  for (const button of document.querySelectorAll("dialog .close")) {
    button.addEventListener("click", () => button.closest("dialog").close());
  }
}

function listenToTheme() {
  const root = document.documentElement;
  const tell = () => (byId("theme").textContent = `Theme: ${root.dataset.theme ?? "auto"}`);
  byId("theme").addEventListener("click", () => {
    const next = THEMES[(THEMES.indexOf(root.dataset.theme ?? "auto") + 1) % THEMES.length];
    if (next === "auto") delete root.dataset.theme;
    else root.dataset.theme = next;
    saveWord("theme", next);
    tell();
  });
  tell();
}

function start() {
  page.history = new History(open, (ids) => {
    if (!ids.includes(page.conversation.id)) return;
    page.conversation.deleted = true;
    begin(page.conversation.mode);
  });
  listenToComposer();
  listenToHead();
  listenToTheme();
  byId("summary").textContent = page.settings.summary;
  begin("chat");
  byId("prompt").focus();
  attempt(connect);
}

start();
