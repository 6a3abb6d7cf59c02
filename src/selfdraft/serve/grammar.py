"""Structured output: a JSON schema as a logits processor, and what it forces as a draft that costs nothing.

The grammar is llguidance's. The processor bans what the grammar does not allow at a row; so drafted and plain decoding
under the grammar are the same text, as always. Where the grammar allows one text only, that text is drafted; and of
every other draft the part that breaks the grammar is left out before it is run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import replace
from typing import Protocol
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from selfdraft.core.sequence import Sequence
from selfdraft.core.tree import EMPTY, ROOT, Draft
from selfdraft.core.verify import Result
from selfdraft.errors import LoadError, RequestError
from selfdraft.models.reference import Tokenizer
from selfdraft.protocols import Drafter
from selfdraft.types import Budget

SOURCE = "grammar"
"""The name under which forced tokens are counted and shown."""
FORCED = 48
"""Most forced tokens of one draft."""
STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""Written as Python's json writes it, which models have read most."""
ANY_OBJECT = {"type": "object"}


class Matcher(Protocol):
    """What is used of llguidance's LLMatcher."""

    def consume_tokens(self, tokens: list[int]) -> bool: ...
    def rollback(self, count: int) -> bool: ...
    def validate_tokens(self, tokens: list[int]) -> int: ...
    def compute_ff_tokens(self) -> list[int]: ...
    def compute_logit_bias(self) -> bytes: ...
    def get_error(self) -> str: ...
    def is_stopped(self) -> bool: ...


class Grammars:
    """Makes grammars for one tokenizer; `ends` are the ids that end an answer, `vocab` the logits' width.

    Errors: LoadError when llguidance is not installed, or cannot read the tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer, ends: frozenset[int], vocab: int) -> None:
        if not ends:
            raise LoadError("structured output needs a token that ends an answer, and this model has none")
        try:
            import llguidance
            import llguidance.hf
        except ImportError as error:
            raise LoadError("structured output needs llguidance: pip install 'selfdraft[serve]'") from error
        try:
            self._tokenizer = llguidance.hf.from_tokenizer(tokenizer, n_vocab=vocab, eos_token=sorted(ends))
        except Exception as error:  # a tokenizer of another library, or one without a vocabulary of bytes
            raise LoadError(f"structured output cannot read this tokenizer: {error}") from error
        self._new: Callable[[object, str], Matcher] = llguidance.LLMatcher
        self._of_schema = llguidance.LLMatcher.grammar_from_json_schema
        self.ends = sorted(ends)

    def json(self, schema: Mapping[str, object] | bool) -> str:
        """The grammar of a JSON schema. Errors: RequestError for a schema that cannot be compiled."""
        try:
            return self.checked(str(self._of_schema(json.dumps(schema), overrides=STYLE)))
        except RequestError:
            raise
        except (ValueError, TypeError, RecursionError) as error:
            raise RequestError(f"the JSON schema cannot be used: {str(error)[:300]}") from error

    def checked(self, grammar: str) -> str:
        """The grammar itself. Errors: RequestError when it matches nothing, or is too large."""
        if problem := self._new(self._tokenizer, grammar).get_error():
            raise RequestError(f"the JSON schema cannot be used: {problem[:300]}")
        return grammar

    def processor(self, grammar: str, prompt_length: int) -> Grammar:
        """The grammar on its way through one answer."""
        return Grammar(self._new(self._tokenizer, grammar), prompt_length, self.ends)


class Grammar:
    """A logits processor that follows one answer, back and forth over the rows of a draft."""

    def __init__(self, matcher: Matcher, prompt_length: int, ends: SequenceOf[int]) -> None:
        self._matcher, self._first, self._ends = matcher, prompt_length, list(ends)
        self._read: list[int] = []
        """Tokens that the matcher stands behind."""

    def __call__(self, path: SequenceOf[int], logits: Tensor) -> Tensor:
        banned = np.ones(len(logits), dtype=np.bool_)
        if self._move(path[self._first :]):
            found = np.frombuffer(self._matcher.compute_logit_bias(), dtype=np.uint8)[: len(logits)]
            np.equal(found, 0, out=banned[: len(found)])
        else:  # the text is whole: nothing but its end may come
            banned[self._ends] = False
        if logits.device.type != "cpu":
            return logits.masked_fill(torch.from_numpy(banned).to(logits.device), float("-inf"))
        # one thread of numpy: a row is so short that torch's threads wait longer for one another than they work
        return torch.from_numpy(np.where(banned, np.float32("-inf"), logits.numpy()))

    def forced(self, path: SequenceOf[int]) -> list[int]:
        """Tokens that must come behind `path`, prompt and output, as the tokenizer would write them."""
        return self._matcher.compute_ff_tokens()[:FORCED] if self._move(path[self._first :]) else []

    def valid(self, path: SequenceOf[int], draft: Draft) -> list[int]:
        """The nodes of a draft behind `path` that the grammar allows, in their order."""
        if not self._move(path[self._first :]):
            return []
        kept: set[int] = set()
        for leaf in draft.leaves():
            count = self._matcher.validate_tokens([draft.tokens[node] for node in leaf])
            kept.update(leaf[:count])
        probes = range(draft.num_candidates, len(draft))
        kept.update(node for node in probes if _stands(draft, node, kept))
        return sorted(kept)

    def _move(self, output: SequenceOf[int]) -> bool:
        """Stand behind these tokens; False where the text is whole, and nothing may follow."""
        same = next((i for i, (a, b) in enumerate(zip(self._read, output, strict=False)) if a != b), None)
        same = min(len(self._read), len(output)) if same is None else same
        if same < len(self._read):
            self._matcher.rollback(len(self._read) - same)
            del self._read[same:]
        for token in output[same:]:
            if self._matcher.is_stopped() or not self._matcher.consume_tokens([token]):
                return False
            self._read.append(token)
        return not self._matcher.is_stopped()


def _stands(draft: Draft, node: int, kept: set[int]) -> bool:
    """Whether all candidates above a probe are kept."""
    while node != ROOT:
        if node < draft.num_candidates and node not in kept:
            return False
        node = draft.parents[node]
    return True


def grammar_of(sequence: Sequence) -> Grammar | None:
    """The grammar of a request that has one."""
    return next((one for one in sequence.sampling.logits_processors if isinstance(one, Grammar)), None)


class GrammarDrafter:
    """A drafter whose drafts obey each request's grammar, with what the grammar forces in front.

    Where tokens are forced the draft is those alone, and `inner` is not asked; requests without a grammar are its own.
    """

    def __init__(self, inner: Drafter) -> None:
        self.inner = inner
        self.needs = getattr(inner, "needs", None)
        self._forced: set[Sequence] = set()
        self._cut: WeakKeyDictionary[Sequence, tuple[Draft, tuple[int, ...]]] = WeakKeyDictionary()
        """The tree of `inner`, and the nodes that were kept of it."""

    def draft(self, sequences: SequenceOf[Sequence], budgets: SequenceOf[Budget]) -> list[Draft]:
        self._forced.clear()
        self._cut.clear()
        drafts: dict[Sequence, Draft] = {}
        left: list[tuple[Sequence, Budget]] = []
        for sequence, budget in zip(sequences, budgets, strict=True):
            grammar = grammar_of(sequence)
            forced = grammar.forced(sequence.tokens) if grammar is not None and budget.max_depth > 0 else []
            if forced:
                drafts[sequence] = Draft.chain(forced, SOURCE)
                self._forced.add(sequence)
            else:
                left.append((sequence, budget))
        if left:
            asked, rooms = zip(*left, strict=True)
            for sequence, draft in zip(asked, self.inner.draft(asked, rooms), strict=True):
                drafts[sequence] = self._obeying(sequence, draft)
        return [drafts[sequence] for sequence in sequences]

    def observe(self, sequences: SequenceOf[Sequence], results: SequenceOf[Result]) -> None:
        pairs = [(s, self._seen(s, r)) for s, r in zip(sequences, results, strict=True) if s not in self._forced]
        self._forced.clear()
        if pairs:
            self.inner.observe(*map(list, zip(*pairs, strict=True)))

    def _obeying(self, sequence: Sequence, draft: Draft) -> Draft:
        grammar = grammar_of(sequence)
        if grammar is None or not draft.num_candidates:
            return draft
        kept = grammar.valid(sequence.tokens, draft)
        if len(kept) == len(draft):
            return draft
        self._cut[sequence] = draft, tuple(kept)
        return part_of(draft, kept)

    def _seen(self, sequence: Sequence, result: Result) -> Result:
        """The result as if `inner`'s own tree had been cut by the step."""
        if sequence not in self._cut:
            return result
        draft, kept = self._cut[sequence]
        return replace(result, proposed=draft, nodes=tuple(kept[node] for node in result.nodes))


def part_of(draft: Draft, kept: SequenceOf[int]) -> Draft:
    """Some nodes of a tree, each with its parent."""
    if not kept:
        return EMPTY
    place = {ROOT: ROOT} | {node: new for new, node in enumerate(kept)}
    return Draft(
        tuple(draft.tokens[node] for node in kept),
        tuple(place[draft.parents[node]] for node in kept),
        tuple(draft.sources[node] for node in kept),
        sum(node < draft.num_candidates for node in kept),
        tuple(draft.probabilities[node] for node in kept) if draft.probabilities else (),
    )
