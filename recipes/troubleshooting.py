"""docs/troubleshooting.md: every error that a user can meet, read out of the source. Run it after errors have changed.

python recipes/troubleshooting.py [--check]
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE, PAGE = ROOT / "src" / "selfdraft", ROOT / "docs" / "troubleshooting.md"
KINDS = {
    "LoadError": "The checkpoint cannot be used",
    "UnsupportedModel": "The architecture cannot be decoded exactly here",
    "MissingMasks": "A method needs mask tokens that were trained for this model",
    "RequestError": "One request is wrong; nothing else is touched",
    "PromptTooLong": "The prompt does not fit",
    "OptionError": "An option is unknown, out of range, or belongs to another method",
    "PeerError": "Another engine, run for comparison, failed",
    "ServerError": "A server that is asked over HTTP cannot be reached, refuses, or breaks off its answer",
    "RankError": "Processes that decode together cannot meet, differ, or one of them has ended; the others end, too",
    "RunnerUnavailable": "The fast runner cannot be used; the plain one can",
    "EngineError": "A step failed; the engine stays usable",
}
HEAD = """# Errors, and the way out

Each line is an error of this version as it is written in the source, made by `python recipes/troubleshooting.py`; what
stands in braces is put in when it is raised. The text says what was wrong and what to do. All of them are a
`selfdraft.SelfdraftError`; the command line prints them as one line on standard error.
"""


def text_of(node: ast.expr) -> str | None:
    """What an expression says, with expressions in braces; None for one that is no text."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        parts = []
        for part in node.values:
            if isinstance(part, ast.FormattedValue):
                parts.append("{" + re.sub(r"\s+", " ", ast.unparse(part.value)) + "}")
            else:
                parts.append(text_of(part) or "")
        return "".join(parts)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = text_of(node.left), text_of(node.right)
        return None if left is None or right is None else left + right
    if isinstance(node, ast.IfExp):
        return text_of(node.body)
    return None


def errors_of(path: Path) -> Iterator[tuple[str, str]]:
    """(kind, text) of every error that a file makes."""
    tree = ast.parse(path.read_text("utf-8"))
    told = {
        target.id: text_of(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in KINDS and node.args:
            first = node.args[0]
            text = told.get(first.id) if isinstance(first, ast.Name) else text_of(first)
            if text and len(re.sub(r"\{.*?\}", "", text).strip(" :")) > 8:
                yield node.func.id, re.sub(r"\s+", " ", text).strip()


def page() -> str:
    """The whole page."""
    found = {(kind, text) for path in sorted(SOURCE.rglob("*.py")) for kind, text in errors_of(path)}
    lines = [HEAD]
    for kind, meaning in KINDS.items():
        texts = sorted(text for one, text in found if one == kind)
        if texts:
            lines += [f"## {kind}", "", f"{meaning}.", "", *(f"- `{text.replace('`', chr(39))}`" for text in texts), ""]
    return "\n".join(lines)


def main() -> None:
    wanted = page()
    if "--check" in sys.argv:
        sys.exit(PAGE.read_text("utf-8") != wanted and "docs/troubleshooting.md is old: run recipes/troubleshooting.py")
    PAGE.write_text(wanted, "utf-8")


if __name__ == "__main__":
    main()
