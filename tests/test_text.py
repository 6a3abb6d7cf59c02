"""Text out of tokens: whatever the decoder and the chunks, the pieces are the text and nothing shows too early."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.decoders import ByteFallback, Fuse, Replace, Strip
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.decoders import Sequence as DecoderSequence
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from selfdraft.core.detokenizer import Decode, TextStream
from selfdraft.core.sequence import Sequence
from selfdraft.outputs import PieceReader
from selfdraft.types import SamplingParams

BROKEN = "\N{REPLACEMENT CHARACTER}"
SAMPLES = (
    "plain words, and  two spaces",
    "émoji 😀😃👍🏽 tail",
    "family 👨\u200d👩\u200d👧\u200d👦 and flag 🏳️\u200d🌈",
    "漢字かな交じり文と한국어 텍스트",
    "combining e\u0301 a\u0308\u0323 क्षि नमस्ते",
    "العربية \u202bعبرית\u202c עברית",
    f"a {BROKEN} that was in the text, at its end too {BROKEN}",
    f"{BROKEN}{BROKEN}",
    "\n\t tabs\r\n and  spaces   ",
)
CHARACTERS = st.one_of(
    st.sampled_from(list("ab .\n") + list("é漢字😀👍\u200d\u0301\u202b") + [BROKEN]), st.characters(codec="utf-8")
)
TEXTS = st.one_of(st.sampled_from(SAMPLES), st.text(CHARACTERS, max_size=40))


class Pieces:
    """A decoder over a growing table of byte strings: token i is `table[i]`."""

    def __init__(self, join: Callable[[bytes], str]) -> None:
        self.table: list[bytes] = []
        self.join = join
        self.calls = 0
        self.widest = 0

    def __call__(self, tokens: SequenceOf[int]) -> str:
        self.calls += 1
        self.widest = max(self.widest, len(tokens))
        return self.join(b"".join(self.table[token] for token in tokens))

    def add(self, pieces: SequenceOf[bytes]) -> list[int]:
        self.table += pieces
        return list(range(len(self.table) - len(pieces), len(self.table)))


def byte_level(data: bytes) -> str:
    """Bytes as they come, as in GPT-2."""
    return data.decode("utf-8", errors="replace")


def one_space_less(data: bytes) -> str:
    """A sentencepiece-like decoder: the space before the first word is an artefact."""
    return byte_level(data).removeprefix(" ")


def chop(data: bytes, cuts: SequenceOf[int]) -> list[bytes]:
    """Pieces of `data`; each cut is a size, the last one is used for all the rest."""
    pieces, start = [], 0
    for number in range(len(data)):
        size = max(cuts[min(number, len(cuts) - 1)], 1)
        if start < len(data):
            pieces.append(data[start : start + size])
        start += size
    return pieces


def follow(decode: Decode, tokens: SequenceOf[int]) -> list[str]:
    """The growing text after every token and after the end, checked: it never shrinks, never ends half-way."""
    stream = TextStream(decode)
    shown = [""]
    pieces = ""
    for token in tokens:
        stream.push(token)
        pieces += stream.since(len(shown[-1]))
        shown.append(stream.text)
        assert not stream.text.endswith(BROKEN)
    stream.flush()
    pieces += stream.since(len(shown[-1]))
    shown.append(stream.text)
    stream.flush()
    assert stream.text == pieces == shown[-1], "a second end changes nothing; the pieces are the text"
    assert all(after.startswith(before) for before, after in pairwise(shown))
    assert stream.size == len(stream.text)
    return shown


@settings(max_examples=300, deadline=None)
@given(text=TEXTS, cuts=st.lists(st.integers(1, 7), min_size=1, max_size=30), strips=st.booleans())
def test_pieces_add_up_however_the_bytes_are_cut(text: str, cuts: list[int], strips: bool) -> None:
    decode = Pieces(one_space_less if strips else byte_level)
    tokens = decode.add(chop(text.encode(), cuts))
    assert follow(decode, tokens)[-1] == decode(tokens)


@pytest.mark.parametrize("join", [byte_level, one_space_less])
@pytest.mark.parametrize("text", SAMPLES)
def test_every_fixed_cut(text: str, join: Callable[[bytes], str]) -> None:
    data = text.encode()
    for size in range(1, 8):
        for first in range(1, size + 1):
            decode = Pieces(join)
            tokens = decode.add(chop(data, [first, size]))
            assert follow(decode, tokens)[-1] == join(data)


@settings(max_examples=300, deadline=None)
@given(data=st.lists(st.sampled_from([b"\x80", b"\xf0", b"\x9f", b"\x98", b"\xc3", b"\xa9", b"b", b" c"]), max_size=60))
def test_bytes_that_are_no_text_come_out_broken_but_complete(data: list[bytes]) -> None:
    decode = Pieces(byte_level)
    tokens = decode.add(data)
    assert follow(decode, tokens)[-1] == decode(tokens)


@settings(max_examples=200, deadline=None)
@given(
    words=st.lists(st.sampled_from([b" a", b" b", b"", b"", b" ", b"\xc3\xa9", b"c"]), max_size=60),
    strips=st.booleans(),
)
def test_silent_tokens_lose_no_space(words: list[bytes], strips: bool) -> None:
    """Special tokens that the decoder leaves out must not become the only context of the next word."""
    decode = Pieces(one_space_less if strips else byte_level)
    tokens = decode.add(words)
    assert follow(decode, tokens)[-1] == decode(tokens)


def test_a_long_run_of_silent_tokens_keeps_the_context() -> None:
    """A model that goes on behind its end-of-sequence token: the next word's space must not be taken for the first."""
    decode = Pieces(one_space_less)
    tokens = decode.add([b" a", *[b""] * 50, b" b"])
    assert follow(decode, tokens)[-1] == "a b"


def test_text_comes_as_early_as_it_can() -> None:
    decode = Pieces(byte_level)
    tokens = decode.add([b"ab\xf0\x9f", b"\x98\x80\xc3", b"\xa9", b"\xff", b"c"])
    assert follow(decode, tokens) == ["", "ab", "ab😀", "ab😀é", "ab😀é", f"ab😀é{BROKEN}c", f"ab😀é{BROKEN}c"]


def test_a_broken_character_does_not_stop_the_text() -> None:
    """A decoder may take back what it said (byte fallback: one bad byte breaks its run); the text goes on."""
    texts = {(): "", (0,): "é", (0, 1): BROKEN * 3, (0, 1, 2): BROKEN * 3 + "abc", (1, 2): BROKEN + "abc", (2,): "abc"}
    stream = TextStream(lambda tokens: texts[tuple(tokens)])
    for token in range(3):
        stream.push(token)
    assert stream.text == f"é{BROKEN}abc"
    ended = TextStream(lambda tokens: texts.get(tuple(tokens), BROKEN))
    ended.push(0)
    ended.push(1)
    ended.flush()
    assert ended.text == f"é{BROKEN}"


@pytest.mark.parametrize(
    "pieces",
    [
        [b" word"],
        [b"\x80"],
        [b""],
        ["漢".encode()[:1], "漢".encode()[1:]],
        ["漢".encode()[1:] + "漢".encode()[:1]],
        [b" "],
    ],
    ids=["words", "garbage", "silent", "halves", "never aligned", "spaces"],
)
@pytest.mark.parametrize("join", [byte_level, one_space_less])
def test_cost_of_a_token_is_constant(pieces: list[bytes], join: Callable[[bytes], str]) -> None:
    decode = Pieces(join)
    tokens = decode.add(pieces) * (2000 // len(pieces))
    stream = TextStream(decode)
    for token in tokens:
        stream.push(token)
    assert decode.widest <= 20
    assert decode.calls <= 3 * len(tokens)
    stream.flush()
    assert stream.text == decode(tokens)


@cache
def trained() -> Tokenizer:
    """A small byte-level BPE whose merges go through the middle of characters."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    alphabet = ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=["<end>"], show_progress=False)
    tokenizer.train_from_iterator([*SAMPLES, "😀😃😄" * 5, "漢字漢語漢" * 5] * 3, trainer)
    return tokenizer


@cache
def fallback() -> Tokenizer:
    """A tokenizer as LLaMA 2's: unknown characters fall back to bytes, spaces are ▁, the first one is dropped."""
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abdeilnoprstw,."]
    tokenizer = Tokenizer(BPE({token: i for i, token in enumerate(tokens)}, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = DecoderSequence([Replace("▁", " "), ByteFallback(), Fuse(), Strip(" ", 1, 0)])
    return tokenizer


@settings(max_examples=150, deadline=None)
@given(text=TEXTS, ends=st.lists(st.integers(0, 60), max_size=4))
def test_byte_level_bpe(text: str, ends: list[int]) -> None:
    tokenizer = trained()
    tokens = tokenizer.encode(text).ids
    assert follow(tokenizer.decode, tokens)[-1] == text
    for place in ends:  # special tokens, which the decoder leaves out, between whole characters
        cut = min(place, len(tokens))
        if not tokenizer.decode(tokens[:cut]).endswith(BROKEN):
            tokens.insert(cut, 0)
    assert follow(tokenizer.decode, tokens)[-1] == tokenizer.decode(tokens) == text


@settings(max_examples=150, deadline=None)
@given(tokens=st.lists(st.integers(1, 399), max_size=60))
def test_any_tokens_of_a_byte_level_bpe(tokens: list[int]) -> None:
    tokenizer = trained()
    tokens = [token for token in tokens if token < tokenizer.get_vocab_size()]
    assert follow(tokenizer.decode, tokens)[-1] == tokenizer.decode(tokens)


@settings(max_examples=150, deadline=None)
@given(text=TEXTS)
def test_byte_fallback(text: str) -> None:
    tokenizer = fallback()
    tokens = tokenizer.encode("▁" + text.replace(" ", "▁")).ids
    assert tokenizer.decode(tokens) == text
    assert follow(tokenizer.decode, tokens)[-1] == text


@settings(max_examples=150, deadline=None)
@given(
    tokens=st.lists(
        st.one_of(st.integers(1 + 0x80, 271), st.sampled_from([1 + 0xF0, 1 + 0x9F, 1 + 0x98, 1 + 0x80])), max_size=60
    )
)
def test_any_tokens_of_a_byte_fallback(tokens: list[int]) -> None:
    """Bytes in any order: no crash, no stall, and every character that is no byte comes out in order."""
    tokenizer = fallback()
    shown = follow(tokenizer.decode, tokens)[-1]
    assert [c for c in shown if c in "bdeilnoprstw,."] == [c for c in tokenizer.decode(tokens) if c in "bdeilnoprstw,."]


LETTERS = st.text("ab", max_size=14)


@settings(max_examples=400, deadline=None)
@given(text=LETTERS, stops=st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=3))
def test_settled_never_shows_what_a_stop_would_cut(text: str, stops: list[str]) -> None:
    """Against every possible continuation: a shown character is never cut, and each hidden one could be."""
    decode = Pieces(byte_level)
    stream = TextStream(decode)
    for token in decode.add([letter.encode() for letter in text]):
        stream.push(token)
        if any(stop in stream.text for stop in stops):
            return
        settled = stream.settled(stops)
        could = [place for place in range(stream.size) if any(s.startswith(stream.text[place:]) for s in stops)]
        assert settled == min(could, default=stream.size)


def test_settled_looks_at_the_end_only() -> None:
    decode = Pieces(byte_level)
    stream = TextStream(decode)
    for token in decode.add([b"a", b"", b"b", b"ab", b"c"]):
        stream.push(token)
    assert stream.text == "ababc"
    assert stream.settled(()) == 5
    assert stream.settled(("x",)) == 5
    assert stream.settled(("cx",)) == 4
    assert stream.settled(("cx", "abcabc")) == 2
    assert stream.settled(("abc", "xxxxxx")) == 5, "a whole stop string that was let pass is not held"


@pytest.mark.parametrize("size", range(6))
def test_a_cut_goes_through_a_piece_and_drops_what_waits(size: int) -> None:
    decode = Pieces(byte_level)
    stream = TextStream(decode)
    for token in decode.add([b"ab", b"cde", b"\xf0\x9f"]):
        stream.push(token)
    stream.cut(size)
    stream.flush()
    assert (stream.text, stream.size) == ("abcde"[:size], size)


@settings(max_examples=200, deadline=None)
@given(text=TEXTS, cuts=st.lists(st.integers(1, 5), min_size=1, max_size=9), size=st.integers(0, 60))
def test_cut_and_since_are_slices(text: str, cuts: list[int], size: int) -> None:
    decode = Pieces(byte_level)
    stream = TextStream(decode)
    for token in decode.add(chop(text.encode(), cuts)):
        stream.push(token)
    whole = stream.text
    for start in range(-1, len(whole) + 2):
        assert stream.since(start) == whole[max(start, 0) :]
    stream.cut(size)
    stream.flush()
    assert stream.text == whole[:size], "nothing that waited comes out behind the cut"
    assert stream.size == len(stream.text)


class Counted(list[int]):
    """A list that notes how many of its items are copied."""

    copied = 0

    def __getitem__(self, place: Any) -> Any:
        found = super().__getitem__(place)
        self.copied += len(found) if isinstance(found, list) else 0
        return found


@pytest.mark.parametrize("length", [100, 1000])
def test_a_streamed_piece_costs_what_is_new_in_it(length: int) -> None:
    """Not what came before: nobody copies the whole answer for one more token."""
    decoded = list[int]()

    def decode(tokens: SequenceOf[int]) -> str:
        decoded.append(len(tokens))
        return "".join(chr(97 + token) for token in tokens)

    tokens = Counted([1, 2, 3])
    stream = TextStream(decode)
    sequence = Sequence(
        tokens, 3, SamplingParams(max_tokens=length, stop=("&&",)), max_length=3 + length, stream=stream
    )
    reader, text = PieceReader(sequence), ""
    for place in range(length):
        tokens.append(place % 20)
        sequence.sources.append("target")
        stream.push(place % 20)
        assert reader.moved
        piece = reader.read()
        assert (piece.num_output_tokens, piece.token_ids) == (place + 1, (place % 20,))
        text += piece.text
    assert not reader.moved
    assert tokens.copied == length
    assert text == stream.text == piece.output.text
    assert piece.output.token_ids == tuple(sequence.output)
    assert max(decoded) <= 16
