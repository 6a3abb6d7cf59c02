"""What a mask adapter learns from: token texts out of files, given or written by the target itself."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from pathlib import Path

from selfdraft.core.sequence import Sequence
from selfdraft.engine.engine import Engine
from selfdraft.errors import OptionError, RequestError
from selfdraft.files.atomic import whole_file
from selfdraft.files.records import FIELDS, read_records, token_ids, turns_of
from selfdraft.train.settings import first_change

Encode = Callable[[str], list[int]]
RECORDS = (".jsonl", ".json", ".gz")
"""Endings of files with records; all others are plain text."""
SHORTEST = 8
"""Fewest tokens of a text, and of an answer that is learned without its prompt."""
ANSWERS = ("completion", "response", "output", "answer", "canonical_solution", "code")
"""Where a record keeps what follows its prompt, in the order they are looked for."""


@dataclass(frozen=True, slots=True)
class Text:
    """Token ids; mask groups are hung under tokens from `start` on (the end of the prompt)."""

    tokens: tuple[int, ...]
    start: int = 0

    @property
    def lot(self) -> bytes:
        """A hash of the tokens: equal texts draw the same lot."""
        return hashlib.sha256(json.dumps(self.tokens).encode()).digest()


def split(texts: SequenceOf[Text]) -> tuple[list[Text], list[Text]]:
    """(texts to learn from, texts to measure on), in their order, chosen by lot: one text in fifty is held out.

    At least one is; a single text is both.
    """
    lots = [text.lot for text in texts]
    lowest = min(lots)
    out = [lot[0] < 256 // 50 or lot == lowest for lot in lots]
    held = [text for text, chosen in zip(texts, out, strict=True) if chosen]
    return [text for text, chosen in zip(texts, out, strict=True) if not chosen] or held, held


def read_texts(paths: SequenceOf[Path], encode: Encode, most: int, vocab: int | None = None) -> list[Text]:
    """Texts of at most `most` tokens out of .jsonl records and plain text files; longer ones are cut into pieces.

    A record is `prompt_token_ids` with `generated_token_ids` (below `vocab`), or a prompt with an answer, or a text.
    Errors: RequestError names the file and the line.
    """
    texts = [text for path in paths for whole in _file(path, encode, vocab) for text in _pieces(whole, most)]
    if not texts:
        raise RequestError(f"{', '.join(map(str, paths))}: no text of at least {SHORTEST} tokens in there")
    return texts


def read_prompts(paths: SequenceOf[Path], encode: Encode, vocab: int | None = None) -> list[list[int]]:
    """Prompts, as tokens, that the target shall continue. Errors: RequestError names the file and the line."""
    prompts = []
    for path in paths:
        if path.suffix not in RECORDS:
            raise RequestError(f"{path}: prompts to go on from must be records ({', '.join(RECORDS)}), not plain text")
        for place, record in read_records(path):
            prompt = token_ids(record, "prompt_token_ids", place, vocab) or encode(turns_of(record, place)[0])
            if prompt:
                prompts.append(prompt)
    if not prompts:
        raise RequestError(f"{', '.join(map(str, paths))}: no record with one of {', '.join(FIELDS)} in there")
    return prompts


def write_own(
    engine: Engine,
    prompts: SequenceOf[Callable[[], Sequence]],
    path: Path,
    batch: int,
    origin: Mapping[str, object],
) -> Iterator[int]:
    """Let the target continue prompts and append its texts to `path`, `batch` at a time; yields how many are done.

    What the file holds already is not written again, so a killed run goes on where it was. `origin` is what the texts
    depend on; it is kept beside them. Errors: OptionError when it has changed, or nothing can be written.
    """
    try:
        _check_origin(path, origin)
        done = _finished_lines(path, batch, len(prompts))
        yield done
        yield from _append_own(engine, prompts, path, batch, done)
    except OSError as error:
        raise OptionError(f"{path} cannot be written: {error.strerror}; what it holds stays") from error


def _check_origin(path: Path, origin: Mapping[str, object]) -> None:
    """The same options as before, or none yet: then they are written down first."""
    beside = path.with_name(path.stem + ".origin.json")
    try:
        made = dict(json.loads(beside.read_text("utf-8")))
    except FileNotFoundError:
        made = {} if path.exists() else dict(origin)
    except (ValueError, TypeError) as error:
        raise OptionError(f"{beside} cannot be read: {error}; delete it with {path.name} to start again") from error
    odd = first_change(made, origin)
    if odd is not None:
        raise OptionError(f"{path} was made with {odd}; go on with the same options, or choose another --output")
    with whole_file(beside, beside.with_suffix(".part")) as part:
        part.write_text(json.dumps(origin) + "\n", "utf-8")


def _append_own(
    engine: Engine, prompts: SequenceOf[Callable[[], Sequence]], path: Path, batch: int, done: int
) -> Iterator[int]:
    for start in range(done, len(prompts), batch):
        sequences = [make() for make in prompts[start : start + batch]]
        for _ in engine.generate(sequences):
            pass
        lines = [
            json.dumps({"prompt_token_ids": s.tokens[: s.prompt_length], "generated_token_ids": s.output})
            for s in sequences
        ]
        with path.open("a", encoding="utf-8") as file:
            file.write("\n".join(lines) + "\n")
        yield start + len(sequences)


def _finished_lines(path: Path, batch: int, total: int) -> int:
    """Lines of whole batches in the file; what a kill has torn is cut off.

    A batch is written again as a whole: with other neighbours a near-tie could fall otherwise.
    """
    if not path.exists():
        return 0
    lines = path.read_bytes().splitlines(keepends=True)
    whole = sum(line.endswith(b"\n") for line in lines)
    kept = whole if whole >= total else whole - whole % batch
    if kept < len(lines):
        with path.open("r+b") as file:
            file.truncate(sum(map(len, lines[:kept])))
    return kept


def _file(path: Path, encode: Encode, vocab: int | None) -> Iterator[Text]:
    if path.suffix not in RECORDS:
        yield Text(tuple(encode(_read(path))))
        return
    for place, record in read_records(path):
        prompt, answer = (token_ids(record, f"{half}_token_ids", place, vocab) for half in ("prompt", "generated"))
        if not (prompt and answer):
            text = turns_of(record, place)[0]
            said = next((record[n] for n in ANSWERS if isinstance(record.get(n), str)), "")
            prompt, both = encode(text), encode(f"{text}\n{said}" if said else text)
            yield Text(tuple(both), len(prompt) if said else 0)
        else:
            yield Text((*prompt, *answer), len(prompt))


def _pieces(text: Text, most: int) -> Iterator[Text]:
    """Cuts of at most `most` tokens; of a prompt that leaves no room for its answer the end is kept.

    An answer of a few tokens has no room for mask groups: there they hang under the prompt, too.
    """
    begin = 0 if len(text.tokens) <= most else max(0, text.start - most // 2)
    for first in range(begin, len(text.tokens), most):
        tokens = text.tokens[first : first + most]
        start = max(text.start - first, 0)
        if len(tokens) >= SHORTEST:
            yield Text(tokens, start if len(tokens) - start >= SHORTEST else 0)


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8-sig")
    except FileNotFoundError:
        raise RequestError(f"there is no data file {str(path)!r}") from None
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RequestError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from error
