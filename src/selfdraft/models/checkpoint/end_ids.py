"""Token ids that end a text, from everywhere a checkpoint names them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


_log = logging.getLogger("selfdraft")
ANSWER = "selfdraft-answer"
"""An assistant's message that no template has words of its own for."""


def declared_ends(model: PreTrainedModel) -> dict[str, object]:
    """What a model's configurations give as `eos_token_id`, each by its name."""
    text = model.config.get_text_config()
    owners = {"generation config": getattr(model, "generation_config", None), "config": model.config}
    owners |= {"text config": text} if text is not model.config else {}
    return {name: getattr(owner, "eos_token_id", None) for name, owner in owners.items()}


def ends_of(
    declared: Mapping[str, object], vocabulary: int, tokenizer: PreTrainedTokenizerBase | None
) -> frozenset[int]:
    """Token ids that end a text: of the generation config, the config and the tokenizer, and the end of a turn.

    All of them count, because any one of these files may be older than the others. What is no token id of the model is
    logged in one line and left out.
    """
    ends: set[int] = set()
    for name, value in {**declared, "tokenizer": getattr(tokenizer, "eos_token_id", None)}.items():
        given = _listed(value)
        if odd := [one for one in given if not _is_id(one, vocabulary)]:
            _log.warning(
                "eos_token_id of the %s: %s is left out, for the model's token ids are 0 to %d",
                name,
                ", ".join(map(repr, odd)),
                vocabulary - 1,
            )
        ends.update(one for one in given if isinstance(one, int) and _is_id(one, vocabulary))
    turn = turn_end(tokenizer)
    return frozenset(ends | {turn} if turn is not None and turn < vocabulary else ends)


def turn_end(tokenizer: PreTrainedTokenizerBase | None) -> int | None:
    """The special token that the chat template writes behind an assistant's message; None when there is no such one."""
    if tokenizer is None or not getattr(tokenizer, "chat_template", None):
        return None
    messages = [{"role": "user", "content": "selfdraft-question"}, {"role": "assistant", "content": ANSWER}]
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=False))
    except Exception:  # a template is the checkpoint's code: it raises what it likes, and then tells nothing
        return None
    _, found, behind = text.rpartition(ANSWER)
    if not found:
        return None
    special = {str(token): int(number) for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    fits = [name for name in special if name and behind.lstrip().startswith(name)]
    longest = special[max(fits, key=len)] if fits else None
    # a beginning of a text or an unknown token is no end, whatever stands there
    return None if longest in (tokenizer.bos_token_id, tokenizer.unk_token_id) else longest


def whole_ends(config: Mapping[str, object]) -> dict[str, object]:
    """A config.json's entries, with what is no whole number taken out of each `eos_token_id`, and logged."""
    kept: dict[str, object] = {}
    for name, value in config.items():
        if name == "eos_token_id":
            odd = [one for one in _listed(value) if not _is_whole(one)]
            if odd:
                _log.warning("eos_token_id of the config: %s is left out: no token id", ", ".join(map(repr, odd)))
                value = [one for one in _listed(value) if _is_whole(one)] or None
        kept[name] = whole_ends(value) if isinstance(value, Mapping) else value
    return kept


def _listed(given: object) -> list[object]:
    if given is None:
        return []
    return list(given) if isinstance(given, list | tuple | set | frozenset) else [given]


def _is_whole(one: object) -> bool:
    return isinstance(one, int) and not isinstance(one, bool)


def _is_id(one: object, vocabulary: int) -> bool:
    return isinstance(one, int) and not isinstance(one, bool) and 0 <= one < vocabulary
