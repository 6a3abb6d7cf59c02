// Draws the token tree of one step: depth to the right, the path that the model took as the top row.

import { makeSvg, visible } from "./dom.js";
import { classOf, titleOf } from "./sources.js";

const ROW = 50;
const HEIGHT = 24;
const GAP = 20;
const LETTER = 7.3;
const LONGEST = 14;
const SMALLEST = 0.7; // a wide tree shrinks so far to fit, and then scrolls

function shortened(text) {
  const shown = visible(text) || "∅";
  return shown.length > LONGEST ? `${shown.slice(0, LONGEST - 1)}…` : shown;
}

// The nodes of the drawing: the known token before the step, the candidates, and the bonus token.
function nodesOf(tree, before) {
  const accepted = new Set(tree.accepted);
  const root = { kind: "root", text: before, children: [], parent: null, title: "the last token before this step" };
  const nodes = tree.tokens.map((text, index) => {
    const kind = accepted.has(index) ? "accepted" : "rejected";
    const probability = tree.probabilities[index];
    const guess = probability === undefined ? "" : `, estimated probability ${probability.toFixed(2)}`;
    const title = `${JSON.stringify(text)}, ${titleOf(tree.sources[index])}${guess}, ${kind}`;
    return { kind, text, probability, source: tree.sources[index], children: [], title };
  });
  nodes.forEach((node, index) => {
    node.parent = tree.parents[index] < 0 ? root : nodes[tree.parents[index]];
    node.parent.children.push(node);
  });
  const last = tree.accepted.length ? nodes[tree.accepted.at(-1)] : root;
  const title = `${JSON.stringify(tree.bonus)}, the bonus token: chosen by the target`;
  const bonus = { kind: "bonus", text: tree.bonus, source: "target", children: [], parent: last, title };
  last.children.push(bonus);
  return [root, ...nodes, bonus];
}

const ON_PATH = { root: 0, accepted: 0, bonus: 0, rejected: 1 };

function place(nodes) {
  let rows = 0;
  const visit = (node, depth) => {
    node.depth = depth;
    if (!node.children.length) node.row = rows++;
    node.children.sort((one, other) => ON_PATH[one.kind] - ON_PATH[other.kind]);
    node.children.forEach((child) => visit(child, depth + 1));
    if (node.children.length) node.row = node.children[0].row;
  };
  visit(nodes[0], 0);
  const widths = [];
  for (const node of nodes) {
    node.label = shortened(node.text);
    const width = Math.max(node.label.length, 3) * LETTER + 14;
    widths[node.depth] = Math.max(widths[node.depth] ?? 0, width);
  }
  let x = 1;
  const lefts = widths.map((width) => {
    const left = x;
    x += width + GAP;
    return left;
  });
  for (const node of nodes) {
    node.x = lefts[node.depth];
    node.y = 4 + node.row * ROW;
    node.width = Math.max(node.label.length, 3) * LETTER + 14;
  }
  return { width: x - GAP + 2, height: rows * ROW + 2 };
}

function edge(node) {
  const { parent } = node;
  const [fromX, fromY] = [parent.x + parent.width, parent.y + HEIGHT / 2];
  const [toX, toY] = [node.x, node.y + HEIGHT / 2];
  const middle = toX - GAP / 2;
  const path = `M${fromX} ${fromY}H${middle - 8}C${middle} ${fromY} ${middle - 8} ${toY} ${toX} ${toY}`;
  const line = makeSvg("path", { d: path, class: `edge ${node.kind}`, pathLength: 1 });
  line.style.setProperty("--depth", node.depth);
  return line;
}

function box(node) {
  const shape = makeSvg("rect", { x: node.x, y: node.y, width: node.width, height: HEIGHT, rx: 6 });
  const label = makeSvg("text", { x: node.x + node.width / 2, y: node.y + 16, "text-anchor": "middle", class: "label" }, node.label);
  const kind = node.source ? classOf(node.source) : "";
  const group = makeSvg("g", { class: `node ${node.kind} ${kind}` }, makeSvg("title", {}, node.title), shape, label);
  const below = { x: node.x + node.width / 2, y: node.y + HEIGHT + 17, "text-anchor": "middle", class: "probability" };
  if (node.probability !== undefined) {
    const bar = { x: node.x + 2, y: node.y + HEIGHT + 3, height: 4, rx: 2 };
    group.append(makeSvg("rect", { ...bar, width: node.width - 4, class: "scale" }));
    group.append(makeSvg("rect", { ...bar, width: (node.width - 4) * node.probability, class: "level" }));
    group.append(makeSvg("text", below, node.probability.toFixed(2).replace(/^0/, "")));
  } else if (node.kind === "bonus") {
    group.append(makeSvg("text", below, "bonus"));
  }
  group.style.setProperty("--depth", node.depth);
  return group;
}

export function sentence(step, number, all) {
  const { tree } = step;
  const drafted = tree.tokens.length;
  const path = tree.accepted.map((node) => JSON.stringify(tree.tokens[node])).join(", ");
  return {
    short: `Step ${number} of ${all}: ${drafted} drafted, ${tree.accepted.length} accepted, 1 bonus`,
    long: `Token tree of step ${number}: ${drafted} drafted; accepted: ${path || "none"}; bonus: ${JSON.stringify(tree.bonus)}`,
  };
}

// `before`: the text of the token before the step. `pace`: "live" | "replay" | "still", how fast it grows.
export function drawTree(tree, before, label, pace) {
  const nodes = nodesOf(tree, before);
  const { width, height } = place(nodes);
  const edges = nodes.slice(1).map(edge);
  // edges of the path over the others
  edges.sort((one, other) => one.classList.contains("accepted") - other.classList.contains("accepted"));
  const view = { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label, class: pace };
  const drawing = makeSvg("svg", view, ...edges, ...nodes.map(box));
  drawing.style.setProperty("max-width", `${width}px`);
  drawing.style.setProperty("min-width", `${width * SMALLEST}px`);
  return drawing;
}

// Tokens of each step as bars: what was accepted, and the bonus token on top of it.
export function drawSteps(steps, shown) {
  const most = Math.max(4, ...steps.map((step) => step.tree.accepted.length + 1));
  const parts = steps.flatMap(({ tree }, index) => {
    const kept = tree.accepted.length;
    const bar = { x: index, width: 0.86 };
    return [
      makeSvg("rect", { ...bar, y: most - kept, height: kept, class: "kept" }),
      makeSvg("rect", { ...bar, y: most - kept - 1, height: 1, class: "extra" }),
    ];
  });
  const here = makeSvg("rect", { x: shown, y: 0, width: 0.86, height: most, class: "here" });
  const view = { viewBox: `0 0 ${Math.max(steps.length, 24)} ${most}`, preserveAspectRatio: "none" };
  return makeSvg("svg", { ...view, class: "strip", "aria-hidden": "true" }, here, ...parts);
}
