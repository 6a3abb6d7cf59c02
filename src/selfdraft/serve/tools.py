"""Tool calls: told to the model through its chat template, and read out of its answer.

Known forms: Hermes and Qwen (`<tool_call>` around JSON, one or a list), Mistral (`[TOOL_CALLS]` and a list), Llama 3 (a
JSON object with `name` and `parameters` as the whole answer). A template that knows nothing of tools gets them as a
system message in the Hermes form.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field

from selfdraft.serve.requests import NamedTool, Tool

HERMES = re.compile(r"<tool_call>\s*(.*?)\s*(?:</tool_call>|$)", re.DOTALL)
PREAMBLE = (
    "You can call functions. The functions are, as JSON:\n{tools}\n"
    "To call one, answer with nothing but <tool_call>\n"
    '{{"name": "...", "arguments": {{...}}}}\n</tool_call>'
)


@dataclass(frozen=True, slots=True)
class ParsedCall:
    """One call of a function, as the model wrote it. `arguments` is JSON."""

    name: str
    arguments: str
    id: str = field(default_factory=lambda: f"call_{uuid.uuid4().hex[:24]}")

    def document(self, index: int | None = None) -> dict[str, object]:
        """As OpenAI's clients read it; with the `index` that it has in a stream."""
        function = {"name": self.name, "arguments": self.arguments}
        numbered = {} if index is None else {"index": index}
        return {**numbered, "id": self.id, "type": "function", "function": function}


def form_of(template: str) -> str:
    """The form in which a model of this chat template writes calls: 'hermes', 'mistral' or 'llama3'."""
    if "[TOOL_CALLS]" in template:
        return "mistral"
    if "<tool_call>" in template:
        return "hermes"
    return "llama3" if "<|python_tag|>" in template or '"parameters"' in template else "hermes"


def told_in_words(tools: Sequence[Tool]) -> str:
    """The tools as a system message, for a template that has no place for them."""
    listed = json.dumps([tool.function.model_dump(exclude_none=True) for tool in tools])
    return PREAMBLE.format(tools=listed)


def forced_schema(tools: Sequence[Tool], choice: NamedTool | str) -> dict[str, object]:
    """The JSON schema of a call that must come: of the named function, or of any one."""
    wanted = [tool.function for tool in tools if isinstance(choice, str) or tool.function.name == choice.function.name]
    shapes = [
        {
            "type": "object",
            "properties": {"name": {"const": one.name}, "arguments": one.parameters or {"type": "object"}},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for one in wanted
    ]
    return shapes[0] if len(shapes) == 1 else {"anyOf": shapes}


def parse_calls(text: str, form: str, names: frozenset[str]) -> tuple[str, list[ParsedCall]]:
    """The answer without its calls, and the calls. What is no whole call of a known function stays text."""
    if form == "mistral":
        before, marker, after = text.partition("[TOOL_CALLS]")
        calls = _calls_in(after, names) if marker else []
        return (before.strip(), calls) if calls else (text, [])
    if form == "hermes":
        calls = [call for found in HERMES.findall(text) for call in _calls_in(found, names)]
        if calls:
            return HERMES.sub("", text).strip(), calls
    calls = _calls_in(text.removeprefix("<|python_tag|>"), names)
    return ("", calls) if calls else (text, [])


def opens_call(text: str, form: str) -> bool:
    """Whether an answer that begins so may be a call, so that a stream must not show it as text yet."""
    start = text.lstrip()
    markers = {"mistral": ("[TOOL_CALLS]",), "hermes": ("<tool_call>",), "llama3": ("<|python_tag|>",)}[form]
    return start[:1] in ("{", "[") or any(
        marker in text or marker.startswith(_tail(text, marker)) for marker in markers
    )


def _tail(text: str, marker: str) -> str:
    """The longest end of a text that begins a marker; what begins no marker for none."""
    for size in range(min(len(text), len(marker)), 0, -1):
        if marker.startswith(text[-size:]):
            return text[-size:]
    return "\0"


def _calls_in(text: str, names: frozenset[str]) -> list[ParsedCall]:
    try:
        found = json.loads(text.strip())
    except (ValueError, RecursionError):
        return []
    items = found if isinstance(found, list) else [found]
    calls = []
    for item in items:
        if not isinstance(item, dict) or item.get("name") not in names:
            return []
        arguments = item.get("arguments", item.get("parameters", {}))
        calls.append(ParsedCall(item["name"], arguments if isinstance(arguments, str) else json.dumps(arguments)))
    return calls
