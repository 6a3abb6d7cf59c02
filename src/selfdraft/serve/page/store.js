// What the browser keeps. Storage may be switched off or full: reading then finds nothing, writing says false.

const PREFIX = "selfdraft.";

export function load(name, otherwise) {
  try {
    const found = localStorage.getItem(PREFIX + name);
    return found === null ? otherwise : JSON.parse(found);
  } catch {
    return otherwise;
  }
}

export function save(name, value) {
  try {
    localStorage.setItem(PREFIX + name, JSON.stringify(value));
    return true;
  } catch {
    return false;
  }
}

// A word, not JSON: theme.js reads it too.
export function saveWord(name, word) {
  try {
    localStorage.setItem(PREFIX + name, word);
  } catch {
    // it holds until the page is left
  }
}

// The key lives as long as the tab; where even that is not allowed, as long as the page.
let heldKey = "";

export function loadKey() {
  try {
    return sessionStorage.getItem(PREFIX + "key") ?? heldKey;
  } catch {
    return heldKey;
  }
}

export function saveKey(key) {
  heldKey = key;
  try {
    sessionStorage.setItem(PREFIX + "key", key);
  } catch {
    // held above
  }
}
