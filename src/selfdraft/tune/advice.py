"""Says in plain words what a profile means: which drafters pay on this machine with this model, and why."""

from __future__ import annotations

from dataclasses import dataclass, replace

from selfdraft.core.rows import chain_rows
from selfdraft.drafters.auto import TREE_FROM, unasked
from selfdraft.drafters.layer_skip import usual_skip
from selfdraft.drafting.cost_model import Profile
from selfdraft.models.target import HFTarget
from selfdraft.protocols import UNASKED_BITS
from selfdraft.tune.machine import BATCH, settled
from selfdraft.types import PassVariant, Skip

TYPICAL = 256
"""Remembered tokens at which rows are compared."""
FREE = 0.1
"""Rows that together add less than this share to a step are called nearly free."""
LIKELY = 0.3
"""A guess that is right so often must pay for its row, or a tree is not worth much."""
WINDOW, WINDOW_BRINGS = (7, 5, 7), 2.5
"""Lookahead's usual window, n-grams and pool, and the most tokens a step that such windows brought here."""
PAYS = 0.8
"""Drafted tokens that take a larger part of a plain step do not pay, however often they are right."""
MASKED_BRINGS = 2.8
"""The most tokens a step that trained masks brought here."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What `auto` does about one way to guess, or what it would take."""

    drafter: str
    used: bool
    why: str


def explain(target: HFTarget, profile: Profile) -> list[Verdict]:
    """One verdict for every way to guess, by the measured cost of its rows."""
    plain = profile.step(1, TYPICAL)
    found = [_tree(profile, plain), _window(profile, plain)]
    for method in ("space", "s3d"):
        masks = target.extras.num_masks(method)
        if masks:
            found.append(_masks(profile, plain, method, masks))
    found += [_skipping(target, profile, plain), *_rounded(target, profile, plain)]
    return [*found, _batch(profile)]


def free_rows(profile: Profile) -> int:
    """The most rows of a step that takes hardly longer than one."""
    plain = profile.step(1, TYPICAL)
    return max(n for n in range(1, profile.rows[-1] + 1) if profile.step(n, TYPICAL) <= (1 + FREE) * plain)


def _tree(profile: Profile, plain: float) -> Verdict:
    prices = [seconds / plain for seconds in profile.marginal(64, TYPICAL)]
    size = sum(price < LIKELY for price in prices)
    tree = plain >= TREE_FROM
    name = "merged" if tree else "copies"
    how = (
        "one tree of all that costs no pass; making it is small beside a step"
        if tree
        else f"copied chains; making the tree of all sources would take about as long as a step of {1e3 * plain:.2f} ms"
    )
    if not size:
        return Verdict(name, False, f"{how}; but a row costs {prices[0]:.0%} of a step, so hardly any guess pays")
    first, last = prices[0], prices[size - 1]
    return Verdict(
        name, True, f"{how}; the first guess pays when it is right in {first:.0%}, guess {size} in {last:.0%}"
    )


def _window(profile: Profile, plain: float) -> Verdict:
    width, size, guesses = WINDOW
    rows = 1 + (size - 1) * (width + guesses)
    need = profile.step(rows, TYPICAL) / plain
    why = f"its {rows} rows take {need:.2f} steps, so it needs as many tokens; windows bring 1.5 to {WINDOW_BRINGS}"
    pays = need < 1.5
    return Verdict("lookahead", False, why + ("; try it where text does not repeat" if pays else ""))


def _masks(profile: Profile, plain: float, method: str, masks: int) -> Verdict:
    groups = 6 if method == "space" else 1
    rows = 1 + 12 + masks * groups if method == "space" else 1 + masks
    need = profile.step(rows, TYPICAL) / plain
    why = f"its {rows} rows take {need:.2f} steps, so it needs as many tokens; masks bring up to {MASKED_BRINGS}"
    return Verdict(method, False, why + (f"; try --drafter {method}" if need < MASKED_BRINGS / 1.3 else ""))


def _skipping(target: HFTarget, profile: Profile, plain: float) -> Verdict:
    named = target.tuned.get("layer_skip", {}).get("skip_set")
    skip = named if isinstance(named, Skip) else usual_skip(target.layers)
    why, _ = _chains(target, profile, plain, skip)
    return Verdict("layer_skip", False, f"{why}; measure it: selfdraft tune layer-skip")


def _rounded(target: HFTarget, profile: Profile, plain: float) -> list[Verdict]:
    """Of a copy with 4 bits a weight; nothing where none can be made."""
    extras = replace(target.extras, pass_cost=profile)
    if extras.unrounded:
        return []
    why, share = _chains(target, profile, plain, extras.rounded("tune", UNASKED_BITS))
    why += f"; the copy takes {target.copies[UNASKED_BITS].bytes / 1e6:.0f} MB"
    if share < PAYS and unasked(extras, None, None, False)[1] is not None:
        return [Verdict("rounded copy", True, why + '; without it: "bits": false in the options of auto')]
    if share < PAYS:
        why += '; try it: "bits": 4 in the options of auto'
        why += f" (not unasked: {reason})" if (reason := extras.why_no_copy()) else ""
    return [Verdict("rounded copy", False, why)]


def _chains(target: HFTarget, profile: Profile, plain: float, short: PassVariant) -> tuple[str, float]:
    """What chains drafted by such passes cost: in words, and the part of a plain step that a drafted token takes."""
    rows = chain_rows([(0, 1, 1)])
    settled(target, rows, short)  # makes the cheaper model
    share = (settled(target, rows, short) + profile.host) / plain
    why = f"drafting a token takes {share:.2f} of a step"
    if share < PAYS:
        why += f", so chains of 4 pay where nothing can be copied and each is right in {_needed(share, 4):.0%}"
    return why, share


def _needed(share: float, length: int) -> float:
    """The acceptance at which a chain of so many drafts, each `share` of a step, breaks even."""
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        brought = sum(middle**depth for depth in range(length + 1))
        low, high = (low, middle) if brought > 1 + share * length else (middle, high)
    return high


def _batch(profile: Profile) -> Verdict:
    """How many sequences can still draft, with guesses that are right half of the time."""
    sizes = [2**power for power in range(8)]
    most = 0
    for size in sizes:
        price = profile.marginal(4, size * TYPICAL, size)[0] / (profile.step(size, size * TYPICAL, size) / size)
        if price >= 0.5:
            break
        most = size
    measured = f"a further sequence of a batch adds {1e3 * profile.per_sequence:.2f} ms beside its row (of {BATCH})"
    if most == sizes[-1]:
        return Verdict("batches", True, f"{measured}; drafting pays up to {most} sequences and more")
    return Verdict("batches", most > 0, f"{measured}; guesses right half of the time pay up to {most} sequences")


def paragraph(profile: Profile, verdicts: list[Verdict]) -> str:
    """All of it in one paragraph."""
    plain = profile.step(1, TYPICAL)
    free = free_rows(profile)
    many = profile.step(64, TYPICAL) / plain
    head = f"A plain step takes {1e3 * plain:.2f} ms, up to {free} rows hardly longer, 64 rows {many:.1f} times that."
    return " ".join([head, *(f"{v.drafter} {'on' if v.used else 'off'}: {v.why}." for v in verdicts)])
