"""Perplexity: against transformers' own logits, window by window; a second model; everything that can be wrong."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from selfdraft import LLM
from selfdraft.bench.sample_text import sample_text
from selfdraft.errors import EngineError, OptionError, RequestError
from selfdraft.files.plain_text import read_text
from selfdraft.models.checkpoint.embedded import checkpoint
from selfdraft.prove import perplexity as room
from selfdraft.prove.perplexity import Mean, perplexity, text_perplexity, tokens_of, windows_of
from tests.models import tiny_target
from tests.terminal import Done, one_line, typed

TEXT = "Once upon a time there was a little dog. He liked to run and to jump.\ndef add(a, b):\n    return a + b\n" * 24
FREE = {"size": 8, "most": 1000, "context": 64}


@pytest.fixture(scope="module")
def pocket() -> LLM:
    return LLM("pocket", dtype="float32", drafter="none")


def by_transformers(llm: LLM, windows: list[list[int]], known: int = 1) -> list[torch.Tensor]:
    """Log-probabilities [predicted, vocab] of each window, in float32 by the stock model's own forward pass."""
    with torch.inference_mode():
        return [
            torch.log_softmax(llm.model(torch.tensor([window]), use_cache=False).logits[0, known - 1 : -1].float(), -1)
            for window in windows
        ]


def nats(logs: list[torch.Tensor], windows: list[list[int]], known: int = 1) -> torch.Tensor:
    """The negative log-likelihood of every predicted token, one after the other."""
    parts = [
        -log.gather(1, torch.tensor(window[known:])[:, None])[:, 0] for log, window in zip(logs, windows, strict=True)
    ]
    return torch.cat(parts).double()


@pytest.mark.parametrize(("size", "piece"), [(16, 128), (100, 7), (129, 128), (300, 128)])
def test_it_is_what_transformers_computes(pocket: LLM, size: int, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows that fill a pass exactly, end in the midst of one, or need several."""
    monkeypatch.setattr(room, "PIECE", piece)
    assert pocket.tokenizer is not None
    ids, begin = tokens_of(pocket.tokenizer, TEXT, 1000)
    windows = windows_of(ids, size=size, most=400, context=pocket.target.max_length, begin=begin)
    wanted = nats(by_transformers(pocket, windows), windows)
    found = perplexity(pocket.target, windows)
    assert (found.tokens, found.windows) == (400, len(windows))
    assert found.model.nats.value == pytest.approx(float(wanted.mean()), abs=1e-4)
    assert found.model.perplexity == pytest.approx(math.exp(float(wanted.mean())), rel=1e-4)
    assert found.model.nats.error == pytest.approx(float(wanted.std()) / 400**0.5, rel=1e-4)
    assert found.model.error == pytest.approx(found.model.perplexity * found.model.nats.error)
    whole = text_perplexity(pocket.target, pocket.tokenizer, TEXT, window=size, tokens=400)
    assert whole.as_dict() == found.as_dict()


def test_the_plain_path_says_the_same(pocket: LLM) -> None:
    plain = LLM("pocket", dtype="float32", drafter="none", runner="plain")
    assert plain.tokenizer is not None
    one = text_perplexity(pocket.target, plain.tokenizer, TEXT, window=290, tokens=600)
    other = text_perplexity(plain.target, plain.tokenizer, TEXT, window=290, tokens=600)
    assert other.model.nats.value == pytest.approx(one.model.nats.value, abs=1e-4)


def test_a_second_model(pocket: LLM) -> None:
    assert pocket.tokenizer is not None
    rounded = LLM("pocket", dtype="bfloat16", drafter="none")
    ids, _ = tokens_of(pocket.tokenizer, TEXT, 1000)
    windows = windows_of(ids, size=64, most=300, context=512)
    mine, theirs = by_transformers(rounded, windows), by_transformers(pocket, windows)
    found = perplexity(rounded.target, windows, against=pocket.target)
    assert found.against is not None
    first, second = found.model.nats.value, found.against.nats.value
    assert second == pytest.approx(float(nats(theirs, windows).mean()), abs=1e-4)
    # in bfloat16 our passes and transformers' round differently, so only about as much as they differ
    assert first == pytest.approx(float(nats(mine, windows).mean()), abs=0.02)
    assert found.percent == pytest.approx(100 * (math.exp(first - second) - 1))
    assert 0 < found.percent_error < 1
    assert 0 < found.divergence.value < 0.01
    assert 0.9 < found.equal_argmax / found.tokens <= 1
    said = found.as_dict()
    assert said["equal_argmax_share"] == found.equal_argmax / 300
    assert said["mean_kl_divergence"] == found.divergence.value


def test_divergence_and_argmax_by_hand(pocket: LLM) -> None:
    """Two models whose distributions are known: the figures follow from them alone."""
    tokens, one, two = torch.tensor([0, 1]), torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0]] * 2)
    found = room.Perplexity(against=room.Surprise())
    room._count(found, tokens, one, two)
    p, q = torch.softmax(two.double(), -1), torch.softmax(one.double(), -1)
    assert found.divergence.value == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), abs=1e-6)
    assert found.equal_argmax == 1
    ruled_out = torch.tensor([[0.0, -math.inf]])
    found = room.Perplexity(against=room.Surprise())
    room._count(found, tokens[:1], ruled_out, ruled_out)
    assert (found.divergence.value, found.difference.value) == (0.0, 0.0)


def test_a_model_beside_itself(pocket: LLM) -> None:
    windows = windows_of(list(range(3, 40)), size=8, most=30, context=64)
    twin = LLM("pocket", dtype="float32", drafter="none")
    found = perplexity(pocket.target, windows, against=twin.target)
    assert (found.percent, found.divergence.value, found.equal_argmax) == (0.0, 0.0, found.tokens)


@pytest.mark.parametrize(
    ("count", "begin", "wanted"),
    [
        (8, [], [8]),
        (9, [], [8]),  # the one token that is left would predict nothing
        (10, [], [8, 2]),
        (16, [], [8, 8]),
        (2, [], [2]),
        (1, [1], [2]),
        (7, [1], [8]),
        (8, [1], [8, 2]),
    ],
)
def test_windows(count: int, begin: list[int], wanted: list[int]) -> None:
    found = windows_of(range(10, 10 + count), begin=begin, **FREE)
    assert [len(window) for window in found] == wanted
    assert all(window[: len(begin)] == begin for window in found)
    assert [token for window in found for token in window[len(begin) :]] == [*range(10, 10 + count)][
        : sum(wanted) - len(begin) * len(wanted)
    ]


@pytest.mark.parametrize("begin", [[], [1]])
@pytest.mark.parametrize("most", [1, 6, 7, 8, 14, 15, 29])
def test_as_many_tokens_as_are_wanted(begin: list[int], most: int) -> None:
    found = windows_of(range(100), size=8, most=most, context=8, begin=begin)
    assert sum(len(window) - 1 for window in found) == most
    assert max(map(len, found)) <= 8


@pytest.mark.parametrize(
    ("tokens", "size", "begin", "error", "words"),
    [
        (100, 65, [], OptionError, "--window 65 is longer than the context of 64 tokens: give 64 or less"),
        (100, 1, [], OptionError, "--window 1 predicts no token: give 2 or more"),
        (1, 8, [], RequestError, "the text has 1 token, and 2 are the least"),
        (0, 8, [1], RequestError, "the text has 0 tokens, and 1 are the least"),
    ],
)
def test_windows_that_are_none(tokens: int, size: int, begin: list[int], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        windows_of(range(tokens), size=size, most=100, context=64, begin=begin)


def test_a_first_token_begins_every_window() -> None:
    class Beginning:
        bos_token_id = 1

        def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
            return {"input_ids": [1] * add_special_tokens + [ord(letter) for letter in text]}

    tokenizer: Any = Beginning()
    assert tokens_of(tokenizer, "ab", 10) == ([97, 98], [1])
    assert len(tokens_of(tokenizer, "a" * 10_000, 3)[0]) == room.CHARACTERS * 5


def test_only_what_is_behind_the_known_tokens_counts(pocket: LLM) -> None:
    windows = [[5, 6, 7, 8, 9], [9, 8, 7]]
    found = perplexity(pocket.target, windows, known=2)
    wanted = nats(by_transformers(pocket, windows, 2), windows, 2)
    assert found.tokens == 4
    assert found.model.nats.value == pytest.approx(float(wanted.mean()), abs=1e-4)


def test_a_model_that_answers_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    target = tiny_target()
    honest = target.forward
    monkeypatch.setattr(target, "forward", lambda rows, short=None: honest(rows, short) * float("nan"))
    with pytest.raises(EngineError, match="the model answered NaN"):
        perplexity(target, [[3, 4, 5]])


def test_means() -> None:
    mean = Mean()
    assert math.isnan(mean.value)
    mean.add(torch.tensor([1.0, 2.0]))
    mean.add(torch.tensor([6.0]))
    assert (mean.count, mean.value) == (3, 3.0)
    assert mean.error == pytest.approx(7**0.5 / 3**0.5)


# Files


def test_texts_of_records(tmp_path: Path) -> None:
    lines = '{"text": "one"}\n\n{"prompt": "two", "text": ""}\n'
    (tmp_path / "a.jsonl").write_text(lines, "utf-8")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "plain").write_text("one\n\ntwo", "utf-8-sig")
    assert {read_text(tmp_path / name) for name in ("a.jsonl", "a.jsonl.gz", "plain")} == {"one\n\ntwo"}


def test_the_text_of_the_package() -> None:
    text = sample_text()
    assert text.index("Janet") < text.index("def has_close_elements") < text.index("A robe takes")
    assert len(text) > 500_000


BROKEN = {
    "missing.txt": (None, "there is no text file"),
    "folder": ("", "is a folder: give a text file"),
    "empty.txt": (b"", "empty.txt holds no text"),
    "white.txt": (b" \n\t", "white.txt holds no text"),
    "empty.jsonl": (b"", "empty.jsonl holds no text"),
    "binary.txt": (b"ab\0cd", "is no text: byte 2 is zero"),
    "latin.txt": (b"caf\xe9 au lait", "is not UTF-8 text: invalid continuation byte at byte 3"),
    "odd.jsonl": (b'{"words": "a"}\n', "odd.jsonl:1: no text; a record needs one of text, prompt"),
    "torn.jsonl": (b'{"text": "a"\n', "torn.jsonl:1: broken JSON"),
    "torn.jsonl.gz": (b"\x1f\x8bxx", "is a broken gzip file"),
    "short.txt": (b"a", "the text has 1 token, and 2 are the least that predict one"),
}


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    return lambda *arguments: typed(monkeypatch, capsys, "perplexity", "--model", "pocket", *arguments)


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_that_is_no_text_is_one_line(name: str, verb: Callable[..., Done], tmp_path: Path) -> None:
    content, words = BROKEN[name]
    if content == "":
        (tmp_path / name).mkdir()
    elif isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    one_line(verb(tmp_path / name), words)


def test_an_unreadable_file_is_one_line(
    verb: Callable[..., Done], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "locked.txt").write_text("words", "utf-8")

    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    one_line(verb(tmp_path / "locked.txt"), "locked.txt cannot be read: Permission denied")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--window", 9999), "--window 9999 is longer than the context of"),
        (("--window", 1), "--window 1 predicts no token: give 2 or more"),
        (("--dtype", "int3"), "int3"),
        (("--against-dtype", "int3"), "int3"),
        (("--against", "pocket"), "is the model itself, run in the same way"),
        (("--against", "/no/such/folder"), "/no/such/folder"),
        (("--tokens", 0), "--tokens': Input should be greater than or equal to 1"),
    ],
)
def test_options_that_are_wrong_are_one_line(
    arguments: tuple[object, ...], words: str, verb: Callable[..., Done], tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text(TEXT, "utf-8")
    one_line(verb(tmp_path / "a.txt", *arguments), words)


def changed_pocket(folder: Path, *, words: bool) -> Path:
    """The pocket model with two tokens of the vocabulary exchanged, or with fewer tokens than its tokenizer knows."""
    source = Path(checkpoint("pocket"))
    folder.mkdir()
    for path in source.iterdir():
        if path.is_file():
            (folder / path.name).write_bytes(path.read_bytes())
    if words:
        told = json.loads((folder / "tokenizer.json").read_text("utf-8"))
        vocab = told["model"]["vocab"]
        one, other = (word for word in vocab if vocab[word] in (vocab["a"], vocab["e"]))
        vocab[one], vocab[other] = vocab[other], vocab[one]
        (folder / "tokenizer.json").write_text(json.dumps(told), "utf-8")
    return folder


def test_other_tokenizers_are_one_line(verb: Callable[..., Done], tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("aaa eee zzz\n", "utf-8")
    other = changed_pocket(tmp_path / "other", words=True)
    done = verb(tmp_path / "a.txt", "--against", other)
    one_line(done, "have other tokenizers: token ")


def test_other_vocabularies_are_refused(pocket: LLM, tmp_path: Path) -> None:
    from selfdraft.cli.perplexity import Subject, read_alike
    from tests.models import tiny_llama

    other = LLM(tiny_llama(torch.float32), drafter="none", tokenizer=pocket.tokenizer)
    subjects = [Subject("pocket", "auto", None), Subject("tiny", "auto", None)]
    with pytest.raises(OptionError, match=rf"pocket chooses among {pocket.target.vocab} tokens and tiny among 61"):
        read_alike([pocket, other], subjects, TEXT, 100)
    other = LLM(tiny_llama(torch.float32), drafter="none")
    with pytest.raises(OptionError, match="tiny has no tokenizer"):
        read_alike([pocket, other], subjects, TEXT, 100)


def test_the_verb_in_words(verb: Callable[..., Done], tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT, "utf-8")
    done = verb(tmp_path / "a.txt", "--tokens", 200, "--window", 64)
    assert (done.code, done.err) == (0, "")
    assert "200 tokens predicted, in 4 windows of 64" in done.out
    assert "perplexity" in done.out
    assert "KL" not in done.out


def test_the_verb_in_json(verb: Callable[..., Done], tmp_path: Path, pocket: LLM) -> None:
    (tmp_path / "a.txt").write_text(TEXT, "utf-8")
    options = ("--tokens", 200, "--window", 64, "--dtype", "float32")
    done = verb(tmp_path / "a.txt", *options, "--against-dtype", "bfloat16", "--json")
    assert pocket.tokenizer is not None
    wanted = text_perplexity(pocket.target, pocket.tokenizer, TEXT, window=64, tokens=200)
    assert done.said["perplexity"] == wanted.model.perplexity
    assert done.said["tokens"] == 200
    assert done.said["text"] == str(tmp_path / "a.txt")
    assert {done.said[name]["dtype"] for name in ("conditions", "against_conditions")} == {"float32", "bfloat16"}
    assert {"perplexity", "perplexity_error", "mean_negative_log_likelihood"} == {*done.said["against"]}
    assert 0 < done.said["mean_kl_divergence"] < 0.01


def test_without_a_file(verb: Callable[..., Done]) -> None:
    done = verb("--tokens", 64, "--window", 32)
    assert done.code == 0
    assert "GSM8K and HumanEval in turns, from this package: 64 tokens predicted" in done.out


def test_two_models_in_words(verb: Callable[..., Done]) -> None:
    done = verb("--tokens", 64, "--window", 32, "--dtype", "float32", "--against-dtype", "bfloat16")
    assert done.code == 0
    assert "mean KL divergence 0.0" in done.out
    assert "equal argmax" in done.out


def test_keys_and_values_in_8_bits_beside_those_of_the_model(verb: Callable[..., Done]) -> None:
    options = ("--tokens", 64, "--window", 32, "--dtype", "float32")
    done = verb(*options, "--kv-cache-dtype", "int8", "--against-kv-cache-dtype", "auto", "--json")
    assert done.code == 0
    assert done.said["conditions"]["kv_cache_dtype"] == "int8"
    assert "kv_cache_dtype" not in done.said["against_conditions"]
    assert 0 < done.said["mean_kl_divergence"] < 0.01
    assert done.said["against"]["perplexity"] == verb(*options, "--json").said["perplexity"]
    told = verb(*options, "--against-kv-cache-dtype", "int8").out
    assert "values int8" in told
