"""Any stock decoder of transformers as a Target: its own forward on flat rows, our attention, our cache."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from selfdraft.core.one_row import Search
from selfdraft.core.rows import Rows, text_rows
from selfdraft.drafting.cost_model import Profile
from selfdraft.drafting.mask_prediction import MaskTokens
from selfdraft.errors import OptionError, RunnerUnavailable
from selfdraft.models import views
from selfdraft.models.adapters import Ends, Gate, MaskAdapter, gate_rows, gated, link_state, placed, shift_of, shifts_of
from selfdraft.models.attention import Plan, make_plan, sent_at_once
from selfdraft.models.early_states import EarlyStates, unknown_part
from selfdraft.models.exactness import NATURAL, Shapes
from selfdraft.models.facts import Facts, Stock
from selfdraft.models.graph.graph_runner import SPARE, GraphRunner, GraphSettings
from selfdraft.models.graph.static_pass import StaticPlan
from selfdraft.models.kinds import has_experts
from selfdraft.models.kv_cache import KVCache, KVCacheDtype, check_kv_cache_dtype
from selfdraft.models.rounded import Copy, rounding, why_no_copy
from selfdraft.models.runner.link import LinkKernel
from selfdraft.models.runner.packing import Packer
from selfdraft.models.runner.runner import Runner
from selfdraft.models.runner.trace import Traced
from selfdraft.protocols import DraftExtras
from selfdraft.types import Clock, JsonObject, PassVariant, Rounded, Skip

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from selfdraft.models.start.copies import KeptCopies


LINK_STATES = 4096
"""Tokens whose link states are kept."""
LINK_ROWS = 32
"""Rows whose links are computed at once."""


@dataclass(frozen=True, slots=True)
class Exactness:
    """How equal drafted and plain text are here: 'bitwise' (same logits) or 'token' (same text up to near-ties)."""

    level: Literal["bitwise", "token"]
    why: str
    """What was probed, or what stands in the way."""


UNPROBED = Exactness("token", "nothing was probed")


class HFTarget:
    """A stock model and its memory of every slot. See `selfdraft.protocols.Target`.

    `model` is used through a view and never touched. `shapes` sets the exactness level (`exactness.py`).
    `adapters` bring mask tokens, if any: their ids stand behind the vocabulary, one adapter after the other.
    `exactness` is what the one who chose the shapes knows about them. `last` is the plan of the last forward pass.
    `fast` runs passes as tapes (`runner/`) instead of through transformers; `traced` is the tape of the whole pass,
    `masked` that of one with masks, and `packer` has their weights, where they are known already; `ends` too are given
    where the model is not loaded yet. `kv_cache_dtype` is how keys and values are stored
    (`models/kv_cache.py`). `clock` is what drafters and measurements read, in seconds. `graphs` makes decoding passes
    graphs of fixed shape (`graph/`): what a GPU replays, and what tests run on a CPU, where it brings nothing.
    Errors: RunnerUnavailable when that cannot be done; OptionError for another `kv_cache_dtype`.
    """

    def __init__(
        self,
        model: PreTrainedModel | Stock,
        *,
        slots: int = 1,
        context: int | None = None,
        shapes: Shapes = NATURAL,
        adapters: SequenceOf[MaskAdapter] = (),
        exactness: Exactness = UNPROBED,
        fast: bool = False,
        traced: Traced | None = None,
        masked: Traced | None = None,
        ends: Ends | None = None,
        packer: Packer | None = None,
        kv_cache_dtype: KVCacheDtype = "auto",
        graphs: GraphSettings | None = None,
        clock: Clock = time.perf_counter,
    ) -> None:
        check_kv_cache_dtype(kv_cache_dtype)
        self.facts = model.facts if isinstance(model, Stock) else Facts.of(model)
        self.vocab = self.facts.vocab
        self.shapes = shapes
        self.slots = slots
        self.clock = clock
        self.exactness = exactness
        self.last: Plan | StaticPlan | None = None
        self.tuned: dict[str, JsonObject] = {one.method: one.advice for one in adapters}
        self.profile: Profile | None = None  # whoever measures one puts it here
        self._device = self.facts.device
        self.adapters = tuple(adapters)
        self.gate = Gate()
        """Which rows of the running pass use which adapter."""
        self._stock = model if isinstance(model, Stock) else None
        if not isinstance(model, Stock):  # a view holds the modules, and lets the model itself go
            self._view = views.clone(model).eval()
            self._gated = gated(self._view, self.fitted, self.gate)
        self._views: dict[object, PreTrainedModel] = {}
        self.copies: dict[int, Copy] = {}
        """What the rounded copies took that were made so far, by bits."""
        self.kept_copies: KeptCopies | None = None  # of earlier starts; whoever opened the model puts it here
        self._ready: dict[PassVariant, Traced] = {}  # tapes that were kept, of views that were not made
        self._early = EarlyStates()
        self._context = context or self.facts.context
        self.cache = KVCache(slots, shapes.round_length(256), kv_cache_dtype)
        self.runner: Runner | None = None
        self.graphs: GraphRunner | None = None
        self.runs = "plain"
        """How passes are run, and why not fast if they are not."""
        self.traced, self._masked, self._ends = traced, masked, ends
        self._open_passes(fast, packer, graphs)

    @property
    def search(self) -> Search | None:
        """See `selfdraft.protocols.Target`."""
        return self.runner.search if self.runner else None

    def _open_passes(self, fast: bool, packer: Packer | None, graphs: GraphSettings | None) -> None:
        """From now on passes are tapes or graphs, if they are asked for. Errors: RunnerUnavailable."""
        if fast:
            self.runs = "fast"
            self.runner = Runner(self.facts.dtype, self._device, self.cache, len(self.adapters), packer)
            self.traced = self.traced or self.runner.tape(self._view)
        if graphs is not None:
            self._open_graphs(graphs)

    @torch.inference_mode(False)
    def _open_graphs(self, settings: GraphSettings) -> None:
        """From now on decoding passes are graphs. Errors: RunnerUnavailable."""
        if self.runner is not None or self.shapes != NATURAL or self.cache.dtype != "auto":
            raise RunnerUnavailable("graphs go with natural shapes, and with keys and values stored as they are")
        experts = has_experts(self._view)
        places = settings.places or self._context + SPARE
        self.graphs = GraphRunner(self, self._view, places, settings, experts=experts)
        self.cache, self.runs = self.graphs.cache, f"fast: {self.graphs}"

    @cached_property
    def fitted(self) -> tuple[MaskAdapter, ...]:
        """The adapters as passes use them."""
        with torch.inference_mode(False):
            return tuple(one.fitted(self.facts.dtype, self._device) for one in self.adapters)

    @cached_property
    def _masks(self) -> Tensor | None:
        """The embeddings of all mask ids [masks, hidden]."""
        with torch.inference_mode(False):
            return torch.cat([one.embeddings for one in self.fitted]) if self.adapters else None

    @cached_property
    def config(self) -> PreTrainedConfig:
        """The text configuration of the model."""
        text: PreTrainedConfig = self._view.config.get_text_config()
        return text

    @cached_property
    def _view(self) -> PreTrainedModel:
        """The whole model as this target runs it; of a kept start it is loaded when something asks for it."""
        assert self._stock is not None
        with torch.inference_mode(False):
            return views.clone(self._stock.model).eval()

    @cached_property
    def _gated(self) -> PreTrainedModel:
        with torch.inference_mode(False):
            return gated(self._view, self.fitted, self.gate)

    @property
    def ends(self) -> Ends:
        """What makes states of tokens and logits of states."""
        if self._ends is None:
            self._ends = Ends.of(self._view)
        return self._ends

    @property
    def masked(self) -> Traced | None:
        """The tape of a whole pass with masks among its rows; None without adapters, or on the plain path."""
        if self._masked is None and self.runner is not None and self.adapters:
            self._masked = self._tape(self.runner, self._gated, embedded=True)
        return self._masked

    def plainly(self, kv_cache_dtype: KVCacheDtype = "auto") -> HFTarget:
        """The same views on the plain path with one slot and a memory of its own: a proof disturbs nothing then."""
        twin = copy.copy(self)
        twin.runner, twin.graphs, twin.runs, twin.slots, twin.last = None, None, "plain", 1, None
        twin.cache, twin._early = KVCache(1, self.shapes.round_length(256), kv_cache_dtype), EarlyStates()
        return twin

    def unrounded(self) -> HFTarget:
        """The same target with a memory of its own in which keys and values are not rounded; itself if none are."""
        return self if self.cache.dtype == "auto" else self.aside("auto")

    def aside(self, kv_cache_dtype: KVCacheDtype) -> HFTarget:
        """The same target, and the same tapes if it has any, with one slot and a memory of its own."""
        twin = self.plainly(kv_cache_dtype)
        if self.runner is not None:
            twin.runs, twin.runner = self.runs, self.runner.over(twin.cache)
        return twin

    @property
    def rows_independent(self) -> bool:
        """Whether a row has the same bits in a pass of any size, so that any prefix of a request may be reused."""
        return self.runner is not None and self.exactness.level == "bitwise"

    @property
    def num_mask_ids(self) -> int:
        return 0 if self._masks is None else self._masks.shape[0]

    @property
    def extras(self) -> DraftExtras:
        """See `selfdraft.protocols.DraftExtras`."""
        masks = self._mask_tokens()
        return DraftExtras(
            self.clock,
            self.profile,
            self.layers,
            masks,
            self.tuned,
            unrounded=self._unrounded,
            why_no_copy=self._why_no_copy,
            prepare=self._prepare,
        )

    def _prepare(self, short: PassVariant) -> None:
        """Make the model of a drafting pass, and its tape; of a copy that was kept the tape alone."""
        if self._read_copy(short):
            return
        model = self.view(short)
        if self.runner is not None:
            traced = self._tape(self.runner, model, embedded=False)
            if self.kept_copies is not None and isinstance(short, Rounded):
                self.kept_copies.keep(short.bits, model, traced, self.copies[short.bits], self.runner.packer)

    def _read_copy(self, short: PassVariant) -> bool:
        """Whether the tape of a copy is ready, or is now as it was kept."""
        if short in self._ready:
            return True
        if self.kept_copies is None or self.runner is None or not isinstance(short, Rounded) or short in self._views:
            return False
        found = self.kept_copies.read(short.bits, self.runner.packer)
        if found is not None:
            self._ready[short], self.copies[short.bits] = found
        return found is not None

    @property
    def _unrounded(self) -> str:
        here = self._device
        return f"these have kernels for CPUs alone, while the model is on {here}" if here.type == "cuda" else ""

    def _why_no_copy(self) -> str:
        """See `DraftExtras.why_no_copy`."""
        if self.runner is None:
            return "passes are run by the plain path, which makes the weights anew each time"
        return self._unrounded or why_no_copy(self.facts.rounded_weights)

    def _mask_tokens(self) -> dict[str, MaskTokens]:
        found, first = dict[str, MaskTokens](), self.vocab
        for adapter in self.fitted:
            ids = range(first, first := first + len(adapter.embeddings))
            if adapter.link is not None:
                quick = self.runner.link(self.ends, adapter.link) if self.runner else None
                one, many = partial(self._shift, adapter.link, {}, quick), partial(self._shifts, adapter.link)
                found.setdefault(adapter.method, MaskTokens(ids, one, many, acceptance=adapter.acceptance))
            else:
                found.setdefault(adapter.method, MaskTokens(ids, acceptance=adapter.acceptance))
        return found

    @torch.inference_mode()
    def _shift(
        self,
        link: tuple[Tensor, Tensor],
        states: dict[int, Tensor],
        quick: LinkKernel | None,
        token: int,
        ids: Tensor,
    ) -> Tensor:
        """`states`: link states of tokens that were met, for text has most tokens many times."""
        state = states.get(token)
        if state is None:
            if len(states) >= LINK_STATES:
                states.clear()
            if quick is None:
                state = link_state(self.ends.table, torch.tensor(token, device=self._device), *link)
            else:
                state = quick.state(token)
            states[token] = state
        return shift_of(self.ends.head, state, ids.to(self._device)) if quick is None else quick.shift(state, ids)

    @torch.inference_mode()
    def _shifts(self, link: tuple[Tensor, Tensor], before: Tensor, ids: Tensor) -> Tensor:
        """See `Links`; some rows at a time, since each takes some megabytes on its way."""
        ends, found = self.ends, list[Tensor]()
        for tokens, own in zip(torch.split(before, LINK_ROWS), torch.split(ids, LINK_ROWS), strict=True):
            found.append(shifts_of(ends.head, link_state(ends.table, tokens, *link), own))
        return torch.cat(found)

    @property
    def layers(self) -> int:
        return self.facts.layers

    @property
    def max_length(self) -> int:
        return self._context

    def token_bytes(self) -> int:
        """Bytes of keys and values that one more token of a slot takes, in all layers; one token is run for it."""
        if not self.cache.keys:
            self.forward(text_rows(0, 0, [0]))
        return self.cache.bytes // (self.cache.slots * self.cache.places)

    def hold(self, places: int, behind: int) -> None:
        """Make room for `places` tokens in every slot at once, and for `behind` more rows; take no longer text."""
        self._context = min(places, self._context)
        with torch.inference_mode():
            self.cache.reserve(self.shapes.round_length(self._context) + behind, exactly=True)

    def next_boundary(self, position: int) -> int:
        bucket = self.shapes.bucket if self.graphs is None else self.graphs.edges
        return (position // bucket + 1) * bucket if bucket else self._context

    def keep(self, slot: int, base: int, order: SequenceOf[int]) -> None:
        if all(map(int.__eq__, order, range(len(order)))):
            return  # as after every step of plain decoding
        with torch.inference_mode():  # the cache was made in it and may only be written in it
            (self.graphs or self.runner or self.cache).keep(slot, base, order)

    def reuse(self, slot: int, source: int, count: int) -> None:
        self._early.drop(slot)
        if self.graphs is not None:
            self.graphs.flush()
        if source != slot:
            self.cache.copy(slot, source, count)

    @torch.inference_mode()
    def forward(self, rows: Rows, short: PassVariant | None = None) -> Tensor:
        return self.eager(rows, short) if self.graphs is None else self.graphs.forward(rows, short)

    def eager(self, rows: Rows, short: PassVariant | None = None) -> Tensor:
        """A pass that is no graph; see `selfdraft.protocols.Target.forward`."""
        self._make_room(rows)
        skipped = isinstance(short, Skip)
        acting = gate_rows(rows, self.adapters, self.vocab, skipped=skipped) if rows.probing else {}
        if acting:
            return self._run_gated(rows, short, acting)
        if short is None:
            return self._full(rows)
        if self.runner is not None and short in self._ready:
            self._early.forget(rows)
            return self._taped(self.runner, self._ready[short], rows)[0]
        logits, noted = self._pass(self.view(short), rows)
        if isinstance(short, Skip) and noted is not None and self.graphs is None:
            self._early.note(rows, noted, short.first)
        else:
            self._early.forget(rows)
        return logits

    def _run_gated(self, rows: Rows, short: PassVariant | None, acting: dict[int, list[int]]) -> Tensor:
        """A pass in which some rows use their adapter. What it leaves in the cache is nothing to build on."""
        self._early.forget(rows)
        self.gate.rows = placed(acting, self._device)
        try:
            return self._pass(None if short is None else self._gated_view(short), rows)[0]
        finally:
            self.gate.rows = {}

    def _full(self, rows: Rows) -> Tensor:
        """All blocks for all rows; what a drafting pass has computed of the first blocks is taken from there."""
        block = self._early.block
        known = self._early.take(rows) if self._early.trails else {}
        if not known:
            return self._pass(None, rows)[0]
        hidden: dict[int, Tensor] = dict(known)
        left = unknown_part(rows, known)
        if left is not None:
            _, noted = self._pass(self._cut("first", block, views.leaving), left)
            assert noted is not None
            places = [row for row in range(len(rows)) if row not in known]
            hidden |= dict(zip(places, noted, strict=False))
        states = torch.stack([hidden[row] for row in range(len(rows))])
        return self._pass(self._cut("rest", block, views.resuming), rows, states)[0]

    def _pass(
        self, model: PreTrainedModel | None, rows: Rows, hidden: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """One pass of a view, None being the whole one, with or without masks.

        Returns logits of the rows asked for, and the states [n, hidden] noted on the way.

        `hidden` [n, hidden] is where a view that resumes begins.
        """
        if self.runner is None:
            whole = self._gated if model is None and self.gate.rows else self._view
            logits, plan = self._run(whole if model is None else model, rows, hidden)
            return logits, None if plan.hidden is None else plan.hidden[0]
        embeds = self.embeds(torch.tensor(rows.tokens)[None]) if self._masked_in(rows) else None
        if model is None:
            traced = self.traced if embeds is None else self.masked
        else:
            traced = self._tape(self.runner, model, embedded=embeds is not None, resuming=hidden is not None)
        assert traced is not None
        return self._taped(self.runner, traced, rows, embeds, hidden)

    def _taped(
        self, runner: Runner, traced: Traced, rows: Rows, embeds: Tensor | None = None, hidden: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Run the tape of a view. Returns logits, and the states noted on the way."""
        self.last = Plan(self.cache, rows.spans, [], [*traced.calls])
        return runner.run(traced, rows, embeds=embeds, hidden=hidden, gates=self.gate.rows)

    def _tape(self, runner: Runner, model: PreTrainedModel, *, embedded: bool, resuming: bool = False) -> Traced:
        """The tape of a view, in which any row may use any adapter."""
        self.gate.traced = True
        try:
            return runner.tape(model, embedded=embedded, resuming=resuming)
        finally:
            self.gate.traced = False

    def _run(self, model: PreTrainedModel, rows: Rows, hidden: Tensor | None = None) -> tuple[Tensor, Plan]:
        """The plain path: one pass of a view over padded rows. Returns logits of the rows asked for, and the plan."""
        plan = self.last = make_plan(rows, self.cache, self.shapes, self._device)
        padding = self.shapes.round_rows(len(rows)) - len(rows)
        if hidden is not None:
            plan.hidden = torch.nn.functional.pad(hidden, (0, 0, 0, padding))[None]
        asked = list(rows.logit_rows)
        asked += [0] * (self.shapes.round_rows(len(asked)) - len(asked))
        empty = (0,) * padding
        tokens, positions, wanted = sent_at_once((rows.tokens + empty, rows.positions + empty, asked), self._device)
        tokens = tokens[None]
        output = model(
            **({"inputs_embeds": self.embeds(tokens)} if self._masked_in(rows) else {"input_ids": tokens}),
            position_ids=positions[None],
            use_cache=False,
            logits_to_keep=wanted,
            selfdraft=plan,
        )
        return output.logits[0, : len(rows.logit_rows)], plan

    def view_for(self, short: PassVariant | None, *, gated: bool) -> PreTrainedModel:
        """The model as a pass uses it, None being the whole one; with adapters or without."""
        if short is None:
            return self._gated if gated else self._view
        return self._gated_view(short) if gated else self.view(short)

    def view(self, short: PassVariant) -> PreTrainedModel:
        """The model as `short` says. One with sublayers left out notes the states entering the first of them."""
        if short not in self._views:
            if isinstance(short, Rounded):
                with torch.inference_mode(False):
                    self._views[short], self.copies[short.bits] = rounding(self._view, short.bits, self.clock)
                return self._views[short]
            made = self._short(self._view, short)
            self._views[short] = views.noting(made, self.layers, short.first) if short.first else made
        return self._views[short]

    def _gated_view(self, short: PassVariant) -> PreTrainedModel:
        if ("gated", short) not in self._views:
            if isinstance(short, Rounded):
                made = gated(self.view(short), self.fitted, self.gate)
            else:
                made = self._short(self._gated, short)
            self._views["gated", short] = made
        return self._views["gated", short]

    def _short(self, whole: PreTrainedModel, skip: Skip) -> PreTrainedModel:
        outside = [i for i in skip.attention | skip.mlp if not 0 <= i < self.layers]
        if outside:
            raise OptionError(f"block {outside[0]} cannot be skipped: the model has blocks 0 to {self.layers - 1}")
        return views.skipping(whole, self.layers, skip)

    def _cut(
        self, part: str, block: int, make: Callable[[PreTrainedModel, int, int], PreTrainedModel]
    ) -> PreTrainedModel:
        if (part, block) not in self._views:
            self._views[part, block] = make(self._view, self.layers, block)
        return self._views[part, block]

    def _masked_in(self, rows: Rows) -> bool:
        """Whether mask ids are among the tokens; the host knows, so the device is not asked."""
        return bool(self.adapters) and rows.probing and max(rows.tokens) >= self.vocab

    def embeds(self, tokens: Tensor) -> Tensor:
        """Embeddings [1, n, hidden] of tokens [1, n], mask ids among them."""
        assert self._masks is not None, "mask ids come with an adapter"
        stock = self.ends.table(tokens.clamp(max=self.vocab - 1))
        learned = self._masks[(tokens - self.vocab).clamp(min=0)].to(stock.dtype)
        return torch.where((tokens >= self.vocab)[..., None], learned, stock)

    def _make_room(self, rows: Rows) -> None:
        last = max(span.base + span.size for span in rows.spans)
        if self.shapes.bucket:
            last = max(last, self.next_boundary(max(rows.positions)))
        self.cache.reserve(last)
        for span in rows.spans:
            self.cache.claim(span.slot, span.base, span.size)
