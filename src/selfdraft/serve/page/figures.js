// The panel's figures, and the table of sources, which is the legend of the colours, too.

import { byId, count, make, percent, seconds } from "./dom.js";
import { TARGET, classOf } from "./sources.js";

const NONE = "–";

function figure(name, value, note) {
  return make("div", {}, make("dt", {}, name), make("dd", {}, value, make("span", { class: "note" }, note)));
}

export function showFigures(answer) {
  const found = answer?.figures;
  const steps = found?.steps ?? 0;
  const rows = [
    figure(
      "Tokens per forward pass",
      found?.acceptanceLength?.toFixed(2) ?? NONE,
      steps ? `${count(answer.tokens.length, "token")} in ${count(steps, "step")}` : "mean acceptance length",
    ),
    figure(
      "Acceptance rate",
      found ? percent(found.accepted, found.drafted) : NONE,
      found?.drafted ? `${found.accepted} of ${found.drafted} drafted` : "accepted of drafted",
    ),
    figure("Tokens per second", found?.rate?.toFixed(1) ?? NONE, "after the first token"),
    figure("Time to first token", found?.firstToken ? seconds(found.firstToken) : NONE, "from sending"),
  ];
  byId("figures").replaceChildren(...rows);
}

function sourceRow(group, row, all) {
  const own = group === TARGET;
  const sample = make("span", { class: `sample ${classOf(group)}` }, group);
  return make(
    "tr",
    {},
    make("th", { scope: "row" }, sample),
    make("td", {}, `${row.tokens} `, make("span", { class: "note" }, percent(row.tokens, all))),
    make("td", {}, own ? NONE : `${row.accepted} of ${row.drafted}`),
    make("td", {}, own ? NONE : percent(row.accepted, row.drafted)),
  );
}

function bar(rows, all) {
  const node = make("div", { class: "bar", "aria-hidden": "true" });
  for (const [group, row] of rows) {
    const part = make("span", { class: classOf(group), title: `${group}: ${percent(row.tokens, all)}` });
    part.style.setProperty("flex-grow", row.tokens);
    if (row.tokens) node.append(part);
  }
  return node;
}

export function showSources(answer) {
  const rows = [...(answer?.sources ?? [])].sort(([, one], [, other]) => other.tokens - one.tokens);
  if (!rows.length) {
    byId("sources").replaceChildren(make("p", { class: "note" }, "Nothing is decoded yet."));
    return;
  }
  const all = answer.tokens.length;
  const names = ["Source", "In the answer", "Accepted", "Rate"];
  const head = make("tr", {}, ...names.map((name) => make("th", { scope: "col" }, name)));
  const body = rows.map(([group, row]) => sourceRow(group, row, all));
  const table = make("table", { class: "sources" }, make("thead", {}, head), make("tbody", {}, ...body));
  byId("sources").replaceChildren(bar(rows, all), table);
}
