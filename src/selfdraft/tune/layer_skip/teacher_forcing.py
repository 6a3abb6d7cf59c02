"""Teacher-forced drafting: what a layer-skip draft would say at every place of a known text, in one pass.

A real drafting pass sees the full model's keys and values of what is committed, and its own behind that. So the text
is read once by the full model; then every place is the base of a chain of skipped rows that see the full model's
memory before the base and the chain's own rows, and nothing else. As long as its drafts are right, a real draft from
that base has the same rows. Source: Draft & Verify (arXiv 2309.08168), section 3.2, for the agreement that is sought.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import torch
from torch import Tensor

from selfdraft.core.rows import Span
from selfdraft.core.sampler import choose, process
from selfdraft.core.tree import EMPTY
from selfdraft.models import views
from selfdraft.models.attention import Group, Plan
from selfdraft.models.kv_cache import KVCache
from selfdraft.models.reference import Model
from selfdraft.types import SamplingParams, Skip

CHUNK = 1024
"""Most rows of one pass."""


@dataclass(frozen=True, slots=True)
class Text:
    """What the target said after a prompt: token ids of both, and the seed and end ids it was said with."""

    tokens: tuple[int, ...]
    prompt_length: int
    seed: int = 0
    ends: frozenset[int] = frozenset()

    @property
    def bases(self) -> range:
        """Places from which a draft can start: the last token known, with a token of the answer behind it."""
        return range(self.prompt_length, len(self.tokens) - 1)


@dataclass(frozen=True, slots=True)
class Forced:
    """Chains of drafts from every base of every text, text by text. Shapes: all [bases, depth].

    Entry [b, d] is the (d + 1)-th link of the chain from base b. It stands for real drafting only where all earlier
    links of its row are right; `known` is False where the text ends before it.
    """

    drafts: Tensor
    confidence: Tensor
    """Probability of the draft at temperature 1, float32."""
    right: Tensor
    known: Tensor

    @property
    def agreement(self) -> float:
        """Share of bases whose first draft is what the target said."""
        return float(self.right[:, 0].double().mean())

    @property
    def by_depth(self) -> list[float]:
        """Acceptance at depth 1, 2, ... given that all before was accepted, as far as anybody got."""
        rates = []
        alive = torch.ones(len(self.right), dtype=torch.bool)
        for depth in range(self.right.shape[1]):
            alive = alive & self.known[:, depth]
            if not bool(alive.any()):
                break
            rates.append(float(self.right[alive, depth].double().mean()))
            alive = alive & self.right[:, depth]
        return rates


class Forcing:
    """A model that has read some texts, ready to say what any skip set would draft in them.

    All texts lie in one slot behind one another; a row sees only its own text. The model is used through a view and
    never touched. `sampling` is what the texts were said with: sampled drafts share the target's noise.
    """

    def __init__(self, model: Model, texts: SequenceOf[Text], sampling: SamplingParams, chunk: int = CHUNK) -> None:
        self.texts, self.sampling, self.chunk = texts, sampling, chunk
        self.layers = int(model.config.get_text_config().num_hidden_layers)
        self._view = views.clone(model).eval()
        self._device = next(model.parameters()).device
        self._tokens = torch.tensor([token for text in texts for token in text.tokens])
        self._owner = torch.tensor([i for i, text in enumerate(texts) for _ in text.tokens])
        self._places = torch.tensor([place for text in texts for place in range(len(text.tokens))])
        self._starts = [int(i) for i in (self._places == 0).nonzero()[:, 0]]
        self._cache = KVCache(1, len(self._tokens) + chunk)
        self._read()

    @torch.inference_mode()
    def _read(self) -> None:
        """Keys and values of all texts by the full model."""
        for rows in torch.split(torch.arange(len(self._tokens)), self.chunk):
            groups = []
            for text in sorted(set(self._owner[rows].tolist())):
                mine = (self._owner[rows] == text).nonzero()[:, 0]
                keys = torch.arange(self._starts[text], int(rows[mine[-1]]) + 1)
                sees = keys <= rows[mine][:, None]
                groups.append(self._group(mine, keys, self._places[keys], self._places[rows[mine]], sees))
            self._run(self._view, rows, int(rows[0]), self._places[rows], groups, answers=[0])

    @torch.inference_mode()
    def draft(self, skip: Skip, depth: int = 1) -> Forced:
        """Chains of `depth` links from every base, drafted with the sublayers of `skip` left out."""
        model = views.skipping(self._view, self.layers, skip)
        parts = [self._chunk(model, bases, depth) for bases in self._split(depth)]
        return Forced(*(torch.cat(column) for column in zip(*parts, strict=True)))

    def _split(self, depth: int) -> Iterator[Tensor]:
        """Flat places of the bases, as many at a time as fit into a pass."""
        flat = [start + base for start, text in zip(self._starts, self.texts, strict=True) for base in text.bases]
        yield from torch.split(torch.tensor(flat), max(1, self.chunk // depth))

    def _chunk(self, model: Model, bases: Tensor, depth: int) -> tuple[Tensor, ...]:
        """One pass: drafts, confidences, rightness and knownness [bases, depth]."""
        count = len(self._tokens)
        places = (bases[:, None] + torch.arange(depth)).clamp(max=count - 1)
        follower = (places + 1).clamp(max=count - 1)
        known = (bases[:, None] + torch.arange(1, depth + 1) < count) & (
            self._owner[follower] == self._owner[bases][:, None]
        )
        rows, base = places.flatten(), bases.repeat_interleave(depth)
        chain = torch.arange(depth).repeat(len(bases))
        positions = self._places[base] + chain
        groups = []
        for text in sorted(set(self._owner[bases].tolist())):
            mine = (self._owner[base] == text).nonzero()[:, 0]
            root, link = base[mine], chain[mine]
            past = torch.arange(self._starts[text], int(root.max()))
            own = (root == root[:, None]) & (link <= link[:, None])
            sees = torch.cat([past < root[:, None], own], 1)
            keys, at = torch.cat([past, count + mine]), torch.cat([self._places[past], positions[mine]])
            groups.append(self._group(mine, keys, at, positions[mine], sees))
        logits = self._run(model, rows, count, positions, groups)
        said = self._say(logits, rows)
        confidence = logits.float().softmax(-1).gather(-1, said[:, None])[:, 0]
        right = (said.view(-1, depth) == self._tokens[follower].to(said.device)).cpu() & known
        return said.view(-1, depth).cpu(), confidence.view(-1, depth).cpu(), right, known

    def _group(self, rows: Tensor, keys: Tensor, places: Tensor, queries: Tensor, sees: Tensor) -> Group:
        """Rows of one text: they attend to the keys of their own text only, so other texts cost them nothing."""
        rows, keys, places, queries, sees = (each.to(self._device) for each in (rows, keys, places, queries, sees))
        write = torch.arange(len(rows), device=self._device)
        return Group(0, rows, write, rows, keys[None], sees[None], places[None], queries[None])

    def _say(self, logits: Tensor, rows: Tensor) -> Tensor:
        """What the drafter would draft at these rows: as `LayerSkip` does, with the text up to there as its path."""
        if self.sampling.plain:
            return logits.argmax(-1)
        said = []
        for scores, flat in zip(logits, rows.tolist(), strict=True):
            text, place = self.texts[int(self._owner[flat])], int(self._places[flat])
            path = list(text.tokens[: place + 1])
            scores = process(scores, self.sampling, path, text.prompt_length, text.ends)
            said.append(choose(scores, self.sampling, text.seed, len(path)))
        return torch.tensor(said, device=logits.device)

    def _run(
        self,
        model: Model,
        rows: Tensor,
        base: int,
        positions: Tensor,
        groups: list[Group],
        answers: SequenceOf[int] | None = None,
    ) -> Tensor:
        """Logits of one pass over the tokens at flat places `rows`, written behind `base`."""
        device, count = self._device, len(rows)
        output = model(
            input_ids=self._tokens[rows][None].to(device),
            position_ids=positions[None].to(device),
            use_cache=False,
            logits_to_keep=torch.tensor([*range(count)] if answers is None else answers, device=device),
            selfdraft=Plan(self._cache, (Span(0, base, 0, count, EMPTY, 0),), groups),
        )
        logits: Tensor = output.logits[0]
        return logits
