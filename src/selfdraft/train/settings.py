"""How a mask adapter is trained; every value is checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import cos, pi
from typing import Literal, get_args

from selfdraft.errors import OptionError
from selfdraft.types import Skip, middle, usual_widths, within

Recipe = Literal["s3d", "space"]
Modules = Literal["all", "attention", "output"]
"""Linear layers that get the adapter: all of them, those of attention, or attention's output projection alone."""
LAST_RATE = 0.05
"""The learning rate ends at this share of its height."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Errors: OptionError names the option, the value and its limits."""

    recipe: Recipe
    masks: int
    """Mask tokens of a group."""
    rank: int = 32
    """Rank of the adapter; 0 trains the mask embeddings alone."""
    link: int = 128
    """Rank of the map that tells a row which token came before; 0 leaves it out."""
    steps: int = 2000
    batch_size: int = 8
    """Texts of a step, over all processes."""
    groups: int = 48
    """Mask groups under each text."""
    thinning: float = 0.7
    """Share of the groups with a mask j that also have a mask j + 1: what is deep is read less often. 1: all masks."""
    modules: Modules = "all"
    learning_rate: float = 3e-3
    max_length: int = 384
    """Most tokens of a text."""
    hard_share: float = 0.5
    """Share of the loss that asks for the target's likeliest token; the rest asks for its whole distribution."""
    skip_widths: tuple[int, ...] = ()
    """S3D: numbers of middle blocks to leave out; each step draws one, so that one adapter serves all of them."""
    sar_sft: bool = False
    """Train as SPACE does: the adapter acts on every row and is merged into the weights."""
    seed: int = 0
    start: str = ""
    """The adapter that training begins with (`train/start.py`), as a hash; "": a fresh one."""

    def __post_init__(self) -> None:
        if self.recipe not in ("s3d", "space"):
            raise OptionError(f"recipe={self.recipe!r} is unknown; there are 's3d' and 'space'")
        within("masks", self.masks, 1, 32)
        within("rank", self.rank, 0, 1024)
        within("link", self.link, 0, 1024)
        within("steps", self.steps, 1, 2**31)
        within("batch_size", self.batch_size, 1, 2**16)
        within("groups", self.groups, 1, 2**12)
        within("seed", self.seed, 0, 2**32)
        within("learning_rate", self.learning_rate, 0.0, 1.0, open_low=True)
        within("max_length", self.max_length, 16, 2**20)
        within("hard_share", self.hard_share, 0.0, 1.0)
        within("thinning", self.thinning, 0.0, 1.0, open_low=True)
        if self.modules not in get_args(Modules):
            raise OptionError(f"modules={self.modules!r} is unknown; there are {', '.join(get_args(Modules))}")
        if self.sar_sft and self.recipe != "space":
            raise OptionError(f"sar_sft belongs to recipe 'space', not to {self.recipe!r}")
        if self.sar_sft and not self.rank:
            raise OptionError("sar_sft tunes the model through an adapter: rank=0 leaves nothing to tune")
        if self.sar_sft and self.start:
            raise OptionError("sar_sft tunes the model itself; an adapter to start from acts on masks alone")
        if self.skip_widths and self.recipe != "s3d":
            raise OptionError(f"skip_widths belongs to recipe 's3d', not to {self.recipe!r}")

    def skips(self, layers: int) -> tuple[Skip | None, ...]:
        """What the drafting pass may leave out of a model with so many blocks. Errors: OptionError."""
        if self.recipe == "space":
            return (None,)
        return tuple(middle(layers, width) for width in self.skip_widths or usual_widths(layers))

    def sizes(self, groups: int) -> tuple[int, ...]:
        """Masks of each of so many groups, the largest first; every place has at least one."""
        reach = [max(1, round(groups * self.thinning**place)) for place in range(self.masks)]
        return tuple(sum(group < count for count in reach) for group in range(groups))

    def rate(self, step: int) -> float:
        """Learning rate of a step: a short rise, then half a cosine down to LAST_RATE of it."""
        warm = max(1, self.steps // 50)
        fall = LAST_RATE + (1 - LAST_RATE) * (1 + cos(pi * step / self.steps)) / 2
        return self.learning_rate * min((step + 1) / warm, fall)

    def as_dict(self) -> dict[str, object]:
        return {**asdict(self), "skip_widths": list(self.skip_widths)}


def first_change(old: Mapping[str, object], new: Mapping[str, object]) -> str | None:
    """The first option of `new` that was otherwise in `old`, said as 'name=old, not new'; None when all are equal."""
    before = {"start": "", **old}  # a card may be older than this option
    return next((f"{n}={before.get(n)!r}, not {value!r}" for n, value in new.items() if before.get(n) != value), None)
