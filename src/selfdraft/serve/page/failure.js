// Tells a person what went wrong, and offers what can be done about it.

import { byId, make } from "./dom.js";
import { loadKey, saveKey } from "./store.js";

export function hideFailure() {
  byId("failure").hidden = true;
  byId("failure").replaceChildren();
}

// again: tries the same once more; null where that makes no sense
export function showFailure(failure, again) {
  const nodes = [make("p", {}, make("strong", {}, failure.message || "The server asks for a key."))];
  if (failure.said) nodes.push(make("p", { class: "note" }, `It said: ${failure.said}`));
  if (failure.wait) {
    const unit = failure.wait === 1 ? "second" : "seconds";
    nodes.push(make("p", {}, `It asks to wait ${failure.wait} ${unit} before trying again.`));
  }
  const retry = again && make("button", { type: "button", class: "main", onclick: again }, "Try again");
  const close = make("button", { type: "button", onclick: hideFailure }, "Close");
  nodes.push(make("div", { class: "row" }, close, retry));
  byId("failure").replaceChildren(...nodes);
  byId("failure").hidden = false;
}

// Asks for the key. True when one was given.
export function askKey(why) {
  const [dialog, form, input] = [byId("key"), byId("key-form"), byId("key-value")];
  byId("key-why").textContent = why || "Whoever runs this server has it.";
  input.value = loadKey();
  dialog.showModal();
  return new Promise((resolve) => {
    let given = false;
    form.onsubmit = (event) => {
      event.preventDefault();
      given = true;
      saveKey(input.value.trim());
      dialog.close();
    };
    dialog.onclose = () => {
      input.value = "";
      resolve(given);
    };
  });
}
