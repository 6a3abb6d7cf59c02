// Small helpers to make elements. Texts always become text nodes: no answer is ever read as HTML.

const SVG = "http://www.w3.org/2000/svg";

export const byId = (id) => document.getElementById(id);

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

export function make(name, attributes = {}, ...children) {
  return fill(document.createElement(name), attributes, children);
}

export function makeSvg(name, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, name), attributes, children);
}

export const percent = (part, whole) => (whole ? `${Math.round((100 * part) / whole)} %` : "–");
export const seconds = (ms) => `${(ms / 1000).toFixed(2)} s`;
export const count = (number, one, many = `${one}s`) => `${number} ${number === 1 ? one : many}`;

// Spaces and line ends as signs, for places where one token stands alone.
export function visible(text) {
  return text.replaceAll(" ", "·").replaceAll("\n", "↵").replaceAll("\t", "⇥");
}

// Runs `work` at most once in `wait` milliseconds, and always once more after the last call.
export function atMostEvery(wait, work) {
  let last = -Infinity;
  let timer = null;
  const run = () => {
    timer = null;
    last = performance.now();
    work();
  };
  return () => {
    if (timer === null) timer = setTimeout(run, Math.max(0, last + wait - performance.now()));
  };
}
