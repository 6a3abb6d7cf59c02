// Sources are strings such as "context+copy": who proposed a token. They are grouped by the first name.

export const TARGET = "target";
const KNOWN = ["context", "recycling", "prediction", "grammar", "memory", "lookup", "align", "copy"];
const STYLES = 8;

export const groupOf = (source) => source.split("+", 1)[0];

// Number of the group's colour and underline; names that are not known get one by their letters, always the same.
function styleOf(group) {
  const known = KNOWN.indexOf(group);
  if (known >= 0) return known;
  let sum = 0;
  for (const letter of group) sum = (sum * 31 + letter.codePointAt(0)) % 9973;
  return sum % STYLES;
}

export function classOf(source) {
  const group = groupOf(source);
  return group === TARGET ? "by-target" : `by by-${styleOf(group)}`;
}

export function titleOf(source) {
  return source === TARGET ? "target: chosen by the model itself" : `proposed by ${source}`;
}
