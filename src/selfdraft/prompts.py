"""Prompts and messages as people give them, made plain: texts, token ids, dicts, arrays, conversations, files.

The shapes of vLLM and transformers are taken; anything else is a RequestError that says what was given
and what to give.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Sequence as SequenceOf
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypedDict

from selfdraft.errors import RequestError, shown
from selfdraft.types import bare

if TYPE_CHECKING:
    from selfdraft.models.reference import Tokenizer


class Array(Protocol):
    """An array of numpy or a tensor of torch: token ids, one-dimensional for one prompt."""

    @property
    def ndim(self) -> int: ...
    def tolist(self) -> object: ...


Prompt = str | SequenceOf[int] | Mapping[str, object] | Array
"""One prompt: text, token ids, vLLM's dicts ({'prompt'}, {'prompt_token_ids'}), or a tokenizer's output."""
Message = Mapping[str, object]
"""One message of a conversation: 'role', and 'content' as a text or a list of text parts."""
TAKEN = "give a text, a list of token ids, {'prompt': text}, {'prompt_token_ids': ids}, or a tokenizer's output"
BESIDE = frozenset({"prompt", "prompt_token_ids", "cache_salt"})
"""Keys of vLLM's dicts that a text model can honour; a cache salt never changes an answer."""
ENCODED = frozenset({"input_ids", "attention_mask", "token_type_ids", "position_ids", "special_tokens_mask", "length"})
"""Keys of a tokenizer's output that say nothing more than its ids and its mask do."""
TEXT_PARTS = ("text", "input_text", "output_text")


@dataclass(frozen=True, slots=True)
class ParsedPrompt:
    """One prompt as text, as token ids, or as ids with the text they came from."""

    text: str | None = None
    ids: tuple[int, ...] | None = None


@contextmanager
def naming(number: int) -> Iterator[None]:
    """Put the number of a prompt before what is wrong with it."""
    try:
        yield
    except RequestError as error:
        raise type(error)(f"prompt {number}: {error}") from error


def split_prompts(given: object) -> list[object]:
    """The prompts of a call, one or many, not yet read. Errors: RequestError when there is none, or no telling them."""
    if isinstance(given, Mapping) and "input_ids" in given:
        return [*_rows(given)]
    items = _items(given)
    if items is None:
        return [given]
    if not items:
        raise RequestError("there is no prompt; give a text, token ids, or a list of either")
    if any(_is_id(item) for item in items):
        if any(isinstance(item, str) or _items(item) is not None or isinstance(item, Mapping) for item in items):
            raise RequestError("the list mixes token ids and prompts; give one prompt as ids, or a list of prompts")
        return [items]
    return items


def parse_prompt(given: object) -> ParsedPrompt:
    """One prompt. Errors: RequestError says what was given and what is taken."""
    given = bare(given)
    if isinstance(given, str):
        return ParsedPrompt(str(given))
    if isinstance(given, Mapping):
        return _parse_dict(given)
    items = _items(given)
    if items is None:
        hint = "decode it to a text first" if isinstance(given, bytes | bytearray) else TAKEN
        raise RequestError(f"{shown(given)} ({type(given).__name__}) is no prompt: {hint}")
    if len(items) == 1 and (inner := _items(items[0])) is not None and hasattr(given, "ndim"):
        items = inner  # a batch of one, as `return_tensors` makes it
    return ParsedPrompt(ids=_ids(items))


def _parse_dict(given: Mapping[object, object]) -> ParsedPrompt:
    if "input_ids" in given:
        rows = _rows(given)
        if len(rows) != 1:
            raise RequestError(
                f"its input_ids hold {len(rows)} prompts, and one is asked for here: give them one by one"
            )
        return ParsedPrompt(ids=_ids(rows[0]))
    odd = [key for key, value in given.items() if key not in BESIDE and value is not None]
    if odd:
        raise RequestError(f"a text model cannot read {shown(odd[0])} in a prompt: {TAKEN}")
    text, ids = given.get("prompt"), given.get("prompt_token_ids")
    if text is None and ids is None:
        raise RequestError(f"a dict with the keys {shown(list(given))} is no prompt: {TAKEN}")
    if text is not None and not isinstance(text, str):
        raise RequestError(f"'prompt' is {shown(text)} and no text: give a text, or token ids as 'prompt_token_ids'")
    if ids is None:
        return ParsedPrompt(text)
    items = _items(ids)
    if items is None:
        raise RequestError(f"'prompt_token_ids' is {shown(ids)}: give a list of token ids, or a text as 'prompt'")
    return ParsedPrompt(text, _ids(items))


def _rows(given: Mapping[object, object]) -> list[list[object]]:
    """The ids of a tokenizer's output, without their padding."""
    odd = [key for key in given if key not in ENCODED and not str(key).startswith(("offset", "overflow", "num_trunc"))]
    if odd:
        raise RequestError(f"a text model cannot read {shown(odd[0])} in a tokenizer's output: {TAKEN}")
    rows, masks = _table(given, "input_ids"), None
    if given.get("attention_mask") is not None:
        masks = _table(given, "attention_mask")
        if list(map(len, masks)) != list(map(len, rows)):
            raise RequestError("attention_mask has another shape than input_ids: give both as the tokenizer made them")
    if masks is None:
        return rows
    return [[i for i, kept in zip(row, mask, strict=True) if kept] for row, mask in zip(rows, masks, strict=True)]


def _table(given: Mapping[object, object], key: str) -> list[list[object]]:
    """One row for each prompt. Errors: RequestError."""
    items = _items(given[key])
    if items is None:
        raise RequestError(f"'{key}' is {shown(given[key])}: give a list of token ids, or a list of such lists")
    if not items:
        raise RequestError(f"'{key}' is empty: give at least one token")
    rows = [_items(item) for item in items]
    if all(row is None for row in rows):
        return [items]
    if any(row is None for row in rows):
        raise RequestError(f"'{key}' mixes numbers and lists: give a list of token ids, or a list of such lists")
    return [row for row in rows if row is not None]


def _items(given: object) -> list[object] | None:
    """What a list or an array holds; None for anything else. A set has no order, so it is no list."""
    given = bare(given)
    if isinstance(given, str | bytes | bytearray | memoryview | Mapping | AbstractSet):
        return None
    if hasattr(given, "ndim") and hasattr(given, "tolist"):
        found = given.tolist()
        return found if isinstance(found, list) else None
    return [bare(item) for item in given] if isinstance(given, Iterable) else None


def _is_id(item: object) -> bool:
    return isinstance(item, int) and not isinstance(item, bool)


def _ids(items: SequenceOf[object]) -> tuple[int, ...]:
    for place, item in enumerate(items):
        if not _is_id(item):
            kind = type(item).__name__
            raise RequestError(f"token {place} is {shown(item)} ({kind}), and token ids are whole numbers: {TAKEN}")
    return tuple(item for item in items if isinstance(item, int))


def once(ids: list[int], text: str, tokenizer: Tokenizer) -> list[int]:
    """The ids of a text with one BOS where the text begins with it and the tokenizer put its own before that."""
    bos, begin = getattr(tokenizer, "bos_token", None), getattr(tokenizer, "bos_token_id", None)
    if bos and text.startswith(bos) and ids[:2] == [begin, begin]:
        return ids[1:]
    return ids


def check_text(text: str, what: str) -> None:
    """Errors: RequestError for half of a character, which no tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RequestError(
            f"{what} holds half a character at place {error.start} ({text[error.start]!a}), "
            "as wrongly decoded bytes leave it: decode them as UTF-8"
        ) from error


def parse_messages(given: object) -> list[dict[str, object]]:
    """A conversation with texts as contents. Errors: RequestError names the message by its number."""
    taken = "give a list of messages: [{'role': 'user', 'content': 'Hello'}]"
    if isinstance(given, str | bytes | Mapping | AbstractSet) or not isinstance(given, Iterable):
        raise RequestError(f"{shown(given)} is no conversation: {taken}")
    messages = list(given)
    if not messages:
        raise RequestError(f"there is no message; {taken}")
    parsed = []
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping):
            several = isinstance(message, list | tuple)
            hint = "give one conversation at a time" if several else "give {'role': 'user', 'content': 'Hello'}"
            raise RequestError(f"message {number} is {shown(message)}: {hint}")
        role = message.get("role")
        if not isinstance(role, str) or not role:
            raise RequestError(f"message {number} has no 'role' as a text: {shown(message)}; {taken}")
        parsed.append({**message, "content": _content(message, number)})
    return parsed


def _content(message: Message, number: int) -> str:
    """The text of a message; of one with calls of tools it may be empty."""
    content = message.get("content")
    if content is None:
        if message.get("tool_calls"):
            return ""
        raise RequestError(f"message {number} has no 'content': {shown(dict(message))}; give a text")
    return text_of(content, f"message {number}")


def text_of(content: object, what: str) -> str:
    """A content as a text; its parts are joined by line ends, as vLLM joins them. Nothing is ever fetched.

    Errors: RequestError, also for a part that is no text; `what` it belongs to.
    """
    if isinstance(content, str):
        check_text(content, what)
        return content
    if not isinstance(content, list | tuple):
        raise RequestError(f"{what}: its content is {shown(content)}; give a text or a list of text parts")
    texts = []
    for part in content:
        kind = part.get("type", "text") if isinstance(part, Mapping) else "text"
        text = part.get("text") if isinstance(part, Mapping) else part
        if kind not in TEXT_PARTS or not isinstance(text, str):
            taken = "a text model takes {'type': 'text', 'text': ...} only"
            raise RequestError(f"{what}: the part {shown(part)} is no text; {taken}")
        check_text(text, what)
        texts.append(text)
    return "\n".join(texts)


class ChatOptions(TypedDict, total=False):
    """The options of `LLM.render`, as `chat` takes them."""

    add_generation_prompt: bool
    continue_final_message: bool
    chat_template_kwargs: Mapping[str, object] | None


def render_messages(
    tokenizer: Tokenizer,
    messages: object,
    *,
    add_generation_prompt: bool,
    continue_final_message: bool,
    chat_template_kwargs: Mapping[str, object] | None,
) -> list[int]:
    """Token ids of a conversation through the tokenizer's template. Errors: RequestError has the template's words."""
    from jinja2 import TemplateError

    if add_generation_prompt and continue_final_message:
        raise RequestError("continue_final_message goes on with the last message: add add_generation_prompt=False")
    extra = _template_options(tokenizer.apply_chat_template, chat_template_kwargs)
    if not getattr(tokenizer, "chat_template", None) and not extra.get("chat_template"):
        raise RequestError("this checkpoint has no chat template; give a plain prompt instead of messages")
    parsed = parse_messages(messages)
    try:
        ids = tokenizer.apply_chat_template(
            parsed,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            return_dict=False,
            **extra,
        )
    except TemplateError as error:
        raise RequestError(f"the chat template refuses these messages: {error}") from error
    except Exception as error:  # a template is a program of the checkpoint: it can raise anything
        raise RequestError(f"the chat template failed on these messages: {type(error).__name__}: {error}") from error
    return [int(token) for token in ids]


def _template_options(apply: Callable[..., object], given: object) -> dict[str, object]:
    """What the template is told besides. Errors: RequestError for what would change the call and not the template."""
    if given is None:
        return {}
    if not isinstance(given, Mapping) or not all(isinstance(key, str) for key in given):
        raise RequestError(f"chat_template_kwargs={shown(given)}: give a dict of names and values, as in vLLM")
    fixed = set(inspect.signature(apply).parameters) - {"tools", "documents", "chat_template", "kwargs"}
    taken = sorted(fixed & {*given})
    if taken:
        raise RequestError(f"chat_template_kwargs holds {taken[0]!r}, which is no variable of a template: leave it out")
    return dict(given)


def read_prompt(path: str | Path) -> str:
    """The prompt in a UTF-8 file, or on standard input for '-', without its last line end. Errors: RequestError."""
    what = "standard input" if str(path) == "-" else f"the prompt file {str(path)!r}"
    try:
        if str(path) != "-":
            raw = Path(path).read_bytes()
        else:
            raw = sys.stdin.buffer.read() if sys.stdin is not None else b""
        text = raw.decode("utf-8-sig")
    except OSError as error:
        raise RequestError(f"{what} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise RequestError(f"{what} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    # editors and echo put it there; what was meant to end in a line end has two
    text = text.removesuffix("\r\n") if text.endswith("\r\n") else text.removesuffix("\n")
    if not text:
        raise RequestError(f"{what} is empty: give at least one token")
    return text
