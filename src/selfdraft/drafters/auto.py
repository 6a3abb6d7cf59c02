"""The default: one tree of everything that costs no pass, as large as this machine's passes make worth while.

What pays is measured, before and while decoding (`drafting/cost_guard.py`); `docs/cost-model.md` explains the rule.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from functools import partial
from pathlib import Path
from typing import ClassVar

from selfdraft.core.sequence import Sequence
from selfdraft.core.tree import EMPTY, Draft
from selfdraft.core.verify import Result
from selfdraft.drafting.cost_guard import CostGuard
from selfdraft.drafting.cost_model import Profile
from selfdraft.drafting.inner_passes import InnerPasses
from selfdraft.drafting.mask_passes import MaskPasses, ShortPass
from selfdraft.drafting.mask_prediction import MaskTokens
from selfdraft.drafting.mask_source import BRANCHES
from selfdraft.drafting.output_memory import Memory
from selfdraft.drafting.source_tree import SourceTree, every_source, wanted_masks
from selfdraft.drafting.successors import RUNNERS_UP
from selfdraft.drafting.suffix_copy import AHEAD, SuffixCopy
from selfdraft.errors import OptionError
from selfdraft.files.skip_sets import given_skip
from selfdraft.files.task_profiles import read_task_profile
from selfdraft.protocols import UNASKED_BITS, DraftExtras, Needs, Target, search_of
from selfdraft.types import Budget, PassVariant, Skip, flag

ROUNDED, SKIPPING = "rounded", "layer_skip"
"""Names of the tokens that passes with rounded weights, or without some sublayers, agreed to."""
TREE_FROM = 0.002
"""Seconds of a plain step from which on the tree of all sources is made: its work is then small beside it."""
MASKED = "space"
"""The method whose masks need no pass of their own."""
SHORT = "s3d"
"""The method whose masks have one."""

CHEAP = 1.5
"""Where a pass of 8 rows takes at most so many times one of 1 row, masks are tried unasked. It was 1.1 to 1.4 where
they paid, and 1.6 to 1.9 where they did not (docs/training.md, docs/log.md)."""


def cheap_rows(profile: Profile | None) -> bool:
    """Whether rows are known to cost little beside a pass."""
    return profile is not None and profile.at(8) <= CHEAP * profile.at(1)


def unasked(extras: DraftExtras, masks: bool | None, bits: int | None, others: bool) -> tuple[bool, int | None]:
    """The options `masks` and `bits`, each with what pays on this machine where it is None.

    A copy with 4 bits, if no other way to draft with the model was asked for, whole passes take long enough for it to
    be cheaper, and it takes little to make. Trained masks where no pass drafts, beside which they bring little, and
    rows are cheap.
    """
    profile = extras.pass_cost
    slow = profile is not None and profile.at(1) >= TREE_FROM
    if bits is None and slow and not others and not masks and not extras.why_no_copy():
        bits = UNASKED_BITS
    if masks is None:
        masks = not bits and not others and cheap_rows(profile)
    return masks, bits


class Auto:
    """`merged` under a cost guard: trees are cut where a row does not pay, and steps are plain where nothing pays.

    Where a plain step takes hardly longer than making a tree, copied chains take its place (`drafting/suffix_copy.py`).
    `masks`: mask tokens trained with `selfdraft train --recipe space` are one more source, as long as they pay. `bits`:
    passes of a copy with weights rounded to so many bits draft, too, as long as they pay (`drafting/inner_passes.py`).
    None, for each of the two: what `unasked` says; False: never. `skip_set`: so do passes without the sublayers of a
    set, 'FILE' or 'FILE#NAME'. `s3d`: so does a short pass over masks trained with `selfdraft train --recipe s3d`
    (`drafting/mask_passes.py`), which needs the stock model's blocks in memory. `task_profile`: a file of `selfdraft
    tune task`, what was learned earlier on text of the same kind. Errors: OptionError for values out of range.
    """

    needs: ClassVar[Needs] = Needs(
        tokens_only=True,
        logits_options=("recycling", "masks", "bits", "skip_set", "s3d"),
        prediction=True,
        pass_cost=True,
        runners_up=RUNNERS_UP,
    )

    def __init__(
        self,
        target: Target,
        *,
        num_speculative_tokens: int = 64,
        memory: int = 0,
        recycling: bool = True,
        masks: bool | None = None,
        bits: int | None = None,
        skip_set: Skip | str | Path | None = None,
        s3d: bool = False,
        task_profile: str | Path | None = None,
    ) -> None:
        self.memory = Memory(memory) if memory else None
        found, clock = target.extras.mask_tokens.get(MASKED), target.extras.clock
        wanted, bits = unasked(target.extras, masks, bits, bool(skip_set or s3d))
        rows = wanted_masks(found, wanted)
        passes = self._short_masks(target, s3d, {"masks": rows, "bits": bits, "skip_set": skip_set})
        before, sources = read_task_profile(task_profile), every_source(recycling)
        self.tree = SourceTree(
            sources, num_speculative_tokens, clock, self.memory, rows or passes, before, hang=rows is not None
        )
        self.beside = self.tree.beside
        self.copies = SuffixCopy()
        self.guard = CostGuard(target.extras.pass_cost, clock)
        self.inner: InnerPasses | MaskPasses | None
        if passes is not None:
            advice, layers = target.extras.tuned_options.get(SHORT, {}), target.extras.num_layers
            short = ShortPass(target, passes, SHORT, BRANCHES, layers=layers, advice=advice)
            self.inner = MaskPasses(short, self.tree, self.guard)
        else:
            self.inner = self._inner_passes(target, bits, skip_set)
        self.uses_tree = True

    @staticmethod
    def _short_masks(target: Target, wanted: object, others: dict[str, object]) -> MaskTokens | None:
        """The masks that a short pass reads, if one drafts. `others`: what else was asked for.

        Errors: OptionError; MissingMasks.
        """
        if not flag("s3d", wanted):
            return None
        taken = [name for name, value in others.items() if value is not None and value is not False]
        if taken:
            raise OptionError(f"s3d and {taken[0]} are two ways to draft with the model: give one of them")
        return target.extras.masks_for(SHORT)

    def _inner_passes(self, target: Target, bits: int | None, skip_set: object) -> InnerPasses | None:
        """What drafts with cheaper passes, if anything does. Errors: OptionError; RunnerUnavailable without copies."""
        bits, skip_set = (None if bits is False else bits), (None if skip_set is False else skip_set)
        if bits is not None and skip_set is not None:
            raise OptionError("bits and skip_set are two ways to make a drafting pass cheaper: give one of them")
        short: PassVariant
        if bits is not None:
            short, source = target.extras.rounded("auto with bits", bits), ROUNDED
        elif skip_set is not None:
            short, source = given_skip(skip_set, target.extras.num_layers), SKIPPING
        else:
            return None
        return InnerPasses(target, short, self.tree, self.guard, search_of(target).contenders, source)

    def draft(self, sequences: SequenceOf[Sequence], budgets: SequenceOf[Budget]) -> list[Draft]:
        if self.inner is not None:
            self.inner.start(sequences)
        if not self.guard.drafts(sequences, budgets):
            return [EMPTY] * len(sequences)
        with self.guard.timed():
            self._choose(sequences)
            began = self.guard.clock()
            costs = self.guard.row_costs(sequences, self.tree.most if self.uses_tree else min(self.tree.most, AHEAD))
            drafts = self._maker.draft(sequences, budgets, costs)
            took = self.guard.clock() - began - (self.inner.seconds if self.inner is not None else 0.0)
            self.guard.node_time.observe(sum(map(len, drafts)), took)
            drafts = self.guard.cut(sequences, drafts)
            return self.tree.with_masks(sequences, drafts, budgets, costs) if self.uses_tree else drafts

    def observe(self, sequences: SequenceOf[Sequence], results: SequenceOf[Result]) -> None:
        if self.inner is not None:
            self.inner.observe(sequences, results)
        if self.guard.drafting:
            with self.guard.timed():
                if self.uses_tree:
                    self.tree.learn(sequences, results)
                else:
                    self.copies.observe(sequences)
        plain = self.guard.book(sequences, results)
        if plain:
            self.tree.book(results, plain)
            self.tree.book_masks(results, partial(self.guard.tokens_in, sequences, results))
        self.tree.forget(sequences)

    @property
    def _maker(self) -> InnerPasses | MaskPasses | SourceTree | SuffixCopy:
        """What makes the trees of this step."""
        return (self.inner or self.tree) if self.uses_tree else self.copies

    def _choose(self, sequences: SequenceOf[Sequence]) -> None:
        """Tree or copies: by the clock, when a request begins, as the profile may be of a busier machine."""
        used, other = (self.tree, self.copies) if self.uses_tree else (self.copies, self.tree)
        if any(sequence not in used and sequence not in other for sequence in sequences):
            seconds = self.guard.cost.at(1, 1, 0)
            forced = not self.guard.measured or self.memory is not None or self.inner is not None
            self.uses_tree = forced or seconds >= TREE_FROM
