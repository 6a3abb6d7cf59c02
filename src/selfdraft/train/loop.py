"""The training loop: every step is a function of (seed, step), so a killed run goes on as if nothing had happened."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as SequenceOf
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from selfdraft.errors import OptionError
from selfdraft.files.atomic import whole_file
from selfdraft.train.losses import best, row_losses
from selfdraft.train.settings import Settings, first_change
from selfdraft.train.student import Batch, Student
from selfdraft.train.texts import Text, split
from selfdraft.types import Skip

if TYPE_CHECKING:
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer

HELD_OUT_BATCHES = 4
LOT = 32
"""Most groups of a text that are attended to together: each row of a lot is compared with all others of it."""
MASK_SPEED = 3.0
"""Learning rate of the mask embeddings, in that of the adapter."""


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run is. `acceptance[j]`: share of held-out rows j that say the target's own token."""

    step: int
    loss: float
    acceptance: tuple[float, ...] = ()

    @property
    def mean_acceptance_length(self) -> float:
        """Tokens of a step if the rows of a group were accepted independently, the bonus token counted."""
        total, product = 1.0, 1.0
        for share in self.acceptance:
            product *= share
            total += product
        return total


def train(
    student: Student,
    texts: SequenceOf[Text],
    settings: Settings,
    accelerator: Accelerator,
    checkpoint: Path,
    *,
    every: int = 100,
) -> Iterator[Progress]:
    """Train to the end of `settings.steps`, from the checkpoint if there is one.

    Yields after every step; every `every` steps, and at the end, with held-out acceptance and a checkpoint written.
    Errors: OptionError when the checkpoint was made with other settings, for another model or out of other texts;
    when the loss is no number, a step does not fit into memory, or the checkpoint cannot be written.
    """
    skips = settings.skips(student.layers)
    ordered = sorted(texts, key=lambda text: len(text.tokens))
    learned, measured = split(ordered)
    adam = torch.optim.AdamW(_by_speed(student), betas=(0.9, 0.98), weight_decay=0.0)
    model, optimizer = accelerator.prepare(student, adam)
    origin = {"model": student.fingerprint, "precision": accelerator.mixed_precision, "texts": digest(ordered)}
    step, mean = _resume(checkpoint, student, optimizer, settings, origin)
    if step == settings.steps:  # killed after the last step, before its result was written
        yield Progress(step, mean, measure(student, measured, settings, skips[len(skips) // 2], accelerator))
    while step < settings.steps:
        for group in optimizer.param_groups:
            group["lr"] = settings.rate(step) * group["speed"]
        skip = skips[step % len(skips)]
        share = (accelerator.process_index, accelerator.num_processes)
        batch = draw(learned, settings, step, skip, accelerator.device, *share)
        with _blaming_memory(batch):
            mean = _learn(model, optimizer, batch, _generator(settings, step), settings, accelerator)
        step += 1
        if step % every and step < settings.steps:
            yield Progress(step, mean)
            continue
        acceptance = measure(student, measured, settings, skips[len(skips) // 2], accelerator)
        if accelerator.is_main_process:
            save(checkpoint, student, optimizer, settings, Progress(step, mean), origin)
        accelerator.wait_for_everyone()
        yield Progress(step, mean, acceptance)


def _learn(
    model: Student,
    optimizer: AcceleratedOptimizer,
    batch: Batch,
    chance: torch.Generator,
    settings: Settings,
    accelerator: Accelerator,
) -> float:
    """One step of the optimizer; the loss, over all processes. Errors: OptionError, and nothing is changed then."""
    with accelerator.autocast():
        answers = model(batch, chance)
        total = row_losses(answers.said, answers.wanted, settings.hard_share, answers.weight).sum()
        # the mean over the rows of all processes: gradients are averaged over them, and their rows differ in number
        count = torch.tensor(float(len(answers.said)), device=total.device)
        loss = total / accelerator.reduce(count, "mean").clamp(min=1.0)
    mean = float(accelerator.reduce(loss.detach(), "mean"))
    if not isfinite(mean):
        raise OptionError(f"the loss is {mean}: give a lower --learning-rate than {settings.learning_rate}")
    accelerator.backward(loss)
    accelerator.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return mean


def _by_speed(student: Student) -> list[dict[str, object]]:
    """Parameters with how much faster than the adapter they are learned: the mask embeddings begin far from use."""
    others = [p for p in student.trainable() if p is not student.masks]
    groups = ((1.0, others), (MASK_SPEED, [student.masks]))
    return [{"params": parameters, "speed": speed} for speed, parameters in groups if parameters]


@contextmanager
def _blaming_memory(batch: Batch) -> Iterator[None]:
    """Errors: OptionError when a step does not fit into memory."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        count, length = batch.tokens.shape
        what = f"{count} texts of {length} tokens with {batch.anchors.shape[1]} mask groups each"
        raise OptionError(f"{what} do not fit into memory; lower --groups, --batch-size or --max-length") from error


def draw(
    texts: SequenceOf[Text],
    settings: Settings,
    step: int,
    skip: Skip | None,
    device: torch.device,
    part: int = 0,
    parts: int = 1,
) -> Batch:
    """The texts and anchors of a step out of texts ordered by length; process `part` of `parts` gets its share."""
    chance = _generator(settings, step)
    first = int(torch.randint(max(1, len(texts) - settings.batch_size + 1), (1,), generator=chance))
    chosen = range(first, min(first + settings.batch_size, len(texts)))  # neighbours in length: little padding
    spread = torch.rand(settings.batch_size, settings.groups, generator=chance)
    mine = [texts[i] for i in chosen][part::parts]
    idle = not mine  # fewer texts than processes: this one runs along with rows that do not count
    mine = mine or [texts[first]]
    longest = max(len(text.tokens) for text in mine)
    tokens = torch.zeros(len(mine), longest, dtype=torch.int64)
    anchors = torch.zeros(len(mine), settings.groups, dtype=torch.int64)
    for row, (text, place) in enumerate(zip(mine, spread[part::parts], strict=False)):
        size = len(text.tokens)
        tokens[row, :size] = torch.tensor(text.tokens)
        start = min(max(text.start - 1, 0), size - 2)
        anchors[row] = (start + place * (size - 1 - start)).long()
    lengths = torch.tensor([0 if idle else len(text.tokens) for text in mine])
    sizes = settings.sizes(-(-settings.groups // -(-settings.groups // LOT)))
    return Batch(tokens.to(device), anchors.to(device), lengths.to(device), sizes, skip)


def _generator(settings: Settings, step: int) -> torch.Generator:
    """What a step draws from."""
    return torch.Generator().manual_seed(settings.seed * 1_000_003 + step)


@torch.no_grad()
def measure(
    student: Student, texts: SequenceOf[Text], settings: Settings, skip: Skip | None, accelerator: Accelerator
) -> tuple[float, ...]:
    """Share of held-out rows, per place in the group, whose likeliest token is the target's. Errors: OptionError."""
    right, total = torch.zeros(student.size), torch.zeros(student.size)
    whole = replace(settings, thinning=1.0)
    for number in range(HELD_OUT_BATCHES):
        batch = draw(texts, whole, -1 - number, skip, accelerator.device)
        with _blaming_memory(batch), accelerator.autocast():
            answers = student(batch)
        mine = answers.groups[:, 1] >= 0
        places = answers.places[mine].cpu()
        hits = (answers.said.argmax(-1) == best(answers.wanted))[mine].cpu()
        total += places.bincount(minlength=student.size)
        right += places[hits].bincount(minlength=student.size)
    shares: list[float] = (right / total.clamp(min=1)).tolist()
    return tuple(shares)


def digest(texts: SequenceOf[Text]) -> str:
    """A hash of the texts, in their order."""
    content = json.dumps([(text.start, text.tokens) for text in texts])
    return hashlib.blake2b(content.encode(), digest_size=12).hexdigest()


def save(
    path: Path,
    student: Student,
    optimizer: AcceleratedOptimizer,
    settings: Settings,
    done: Progress,
    origin: Mapping[str, str],
) -> None:
    """Write a checkpoint; a kill leaves the old one whole."""
    weights = [p.detach().cpu() for p in student.trainable()]
    state = {"weights": weights, "optimizer": optimizer.state_dict(), "settings": settings.as_dict()}
    state |= {"step": done.step, "loss": done.loss, "origin": dict(origin)}
    if optimizer.scaler is not None:  # float16
        state["scaler"] = optimizer.scaler.state_dict()
    try:
        with whole_file(path, path.with_suffix(".part")) as part:
            torch.save(state, part)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        what = str(error).partition("\n")[0]
        raise OptionError(f"the checkpoint {path} cannot be written: {what}; the last one, if any, is whole") from error


def _resume(
    path: Path, student: Student, optimizer: AcceleratedOptimizer, settings: Settings, origin: Mapping[str, str]
) -> tuple[int, float]:
    """(steps done, the loss of the last one), from the checkpoint if there is one. Errors: OptionError."""
    if not path.exists():
        return 0, 0.0
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
        made = {**state["settings"], **origin, **state.get("origin", {})}  # old checkpoints do not say all
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, LookupError, TypeError) as error:
        what = str(error).partition("\n")[0]
        raise OptionError(f"{path} cannot be read: {what}; delete it to start again") from error
    odd = first_change(made, settings.as_dict() | dict(origin))
    if odd is not None:
        raise OptionError(f"{path} was made with {odd}; go on with the same options, or choose another --output")
    with torch.no_grad():
        for parameter, saved in zip(student.trainable(), state["weights"], strict=True):
            parameter.copy_(saved)
    optimizer.load_state_dict(state["optimizer"])
    if "scaler" in state:
        optimizer.scaler.load_state_dict(state["scaler"])
    return int(state["step"]), float(state.get("loss", 0.0))
