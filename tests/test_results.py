"""The page of results: what is put together, what is kept apart, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from selfdraft.bench.heatmap import title_of
from selfdraft.bench.results import page, read_rows, sheets_of
from selfdraft.errors import RequestError
from tests.kept_rows import row, write
from tests.terminal import one_line, typed


def test_a_page_of_two_files(tmp_path: Path) -> None:
    one = write(tmp_path / "a.jsonl", row("none"), row("none", "2"), row("lookup"))
    other = write(tmp_path / "b.jsonl.gz", row("none", temperature=0.8), row("none", machine={"threads": 4}))
    sections = sheets_of(read_rows([one, other]))
    assert [len(sheets) for sheets in sections] == [2, 1]
    text = page(sections, {0: "p.png"})
    assert text.count("### Greedy") == 2
    assert "| lookup | 2.00x (2.00), 1 of 2 | 2.00x (2.00), 1 of 2 | yes, 1 |" in text
    assert "| plain, tokens/s | 8.0 | 8.0 | |" in text
    assert text.count("p.png") == 1


def test_pictures_of_one_page_say_in_what_they_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    machine = {"cpu_capability": "AVX512", "gpu": None}  # rows of earlier versions do not name the kernels
    cold = [row(name, machine=machine) for name in ("none", "lookup")]
    warm = [row(name, temperature=0.8, machine=machine | {"kernels": "AVX2"}) for name in ("none", "lookup")]
    rows = write(tmp_path / "rows.jsonl", *cold, *warm)
    place = tmp_path / "pictures"
    done = typed(monkeypatch, capsys, "results", rows, "--output", tmp_path / "page.md", "--pictures", place)
    assert done.code == 0, done.err
    pictures = [place / f"page-{number}.png" for number in (1, 2)]
    assert [picture.read_bytes()[:4] for picture in pictures] == [b"\x89PNG"] * 2
    assert all(f"](pictures/{picture.name})" in (tmp_path / "page.md").read_text() for picture in pictures)
    titles = [title_of(rows[0]["conditions"]) for rows in (cold, warm)]
    assert titles == [
        "tiny, bfloat16, greedy, at most 8 tokens\ntokens/s, plain = 1 (2 threads, AVX512)",
        "tiny, bfloat16, temperature 0.8, at most 8 tokens\ntokens/s, plain = 1 (2 threads, AVX2)",
    ]


BROKEN: dict[str, dict[str, Any]] = {
    "conditions is 5, not an object": {"conditions": 5},
    "conditions.machine is None, not an object": {"conditions": row()["conditions"] | {"machine": None}},
    "conditions.temperature is '0'": {"conditions": row()["conditions"] | {"temperature": "0"}},
    "seconds is 'a'": {"seconds": "a"},
    "plain_seconds is 0, not above 0": {"plain_seconds": 0},
    "seconds is inf, not above 0": {"seconds": float("inf")},
    "tokens is True": {"tokens": True},
    "stats is None, not an object": {"stats": None},
    "memory is 7": {"memory": 7},
}


@pytest.mark.parametrize("words", BROKEN)
def test_a_field_that_no_bench_writes_is_named(
    words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write(tmp_path / "rows.jsonl", row(), row("lookup") | BROKEN[words])
    done = typed(monkeypatch, capsys, "results", rows, "--output", tmp_path / "page.md")
    one_line(done, f"rows.jsonl:2: broken row: {words}; take the line out")
    assert not (tmp_path / "page.md").exists()


def test_rows_of_other_engines_have_no_counts(tmp_path: Path) -> None:
    other = row("vllm", peer="vllm 1", peer_file=None)
    del other["stats"]
    assert len(read_rows([write(tmp_path / "rows.jsonl", row(), other)])) == 2


def test_scores_say_how_many_answers_were_cut(tmp_path: Path) -> None:
    scored = [row("none", key, task="gsm8k", group=None, scores={"accuracy": 1.0}) for key in "123"]
    for one, reason in zip(scored, ("length", "stop", "length"), strict=True):
        one["finish_reason"] = reason
    text = page(sheets_of(read_rows([write(tmp_path / "a.jsonl", *scored)])), {})
    assert "how many of them were cut at the limit of tokens: gsm8k accuracy 1.000 (2 of 3)." in text
    for one in scored:
        one["finish_reason"] = "stop"
    assert "accuracy 1.000." in page(sheets_of(read_rows([write(tmp_path / "b.jsonl", *scored)])), {})


def test_what_papers_say_stands_beside_rows_of_the_same_text() -> None:
    """Only where there are such rows, a drafter with other options under its own label."""
    own = [row(name, key, group=None, task="xsum") for key in "12" for name in ("none", "space", "layer_skip searched")]
    bench = [row(name, group="mt-bench", task="spec-bench") for name in ("none", "space", "lookahead", "auto")]
    text = page(sheets_of([*own, *bench]), {})
    lines = text.partition("### Beside the papers")[2].splitlines()
    xsum, chat = "xsum, 2 prompts | 2.00 | 2.00", "spec-bench/mt-bench, 1 prompt | 2.00 | 2.00"
    assert [line for line in lines if line.startswith("| ")][1:] == [
        f"| layer_skip searched | XSum: LLaMA-2-13B, measured by LayerSkip's authors | 1.48 | - | {xsum} |",
        f"| lookahead | MT-Bench: LLaMA-2-chat-7B, A100-80G, float16 | 1.64 | - | {chat} |",
        f"| space | XSum: LLaMA-2-7B; hardware not said | 1.94 | 2.23 | {xsum} |",
        f"| space | CIP (chat): LLaMA-2-7B; hardware not said | 1.71 | 1.85 | {chat} |",
    ]
    assert "Beside the papers" not in page(sheets_of([row("none"), row("space"), row("auto")]), {})


def test_models_beside_bf16() -> None:
    """Speed and memory of every model against plain decoding in bf16, over the prompts that both have."""

    def of(model: str, dtype: str, *rows: dict[str, Any], weights: int) -> list[dict[str, Any]]:
        for one in rows:
            one["conditions"] |= {"model": model, "dtype": dtype}
            one["fingerprint"] += model
            memory = {"weights": weights * 2**20, "cache": 0, "working": 0, "adapter": 0, "resident": 900 * 2**20}
            one["memory"] = memory
        return [*rows]

    bf16 = of("/m/tiny", "bfloat16", row("none"), row("none", "2", seconds=9.0), row("lookup"), weights=400)
    small = of("/m/tiny.gguf", "bfloat16", row("none", seconds=0.25), row("lookup", seconds=0.2), weights=100)
    assert "Models beside" not in page(sheets_of(bf16), {})
    assert "Models beside" not in page(sheets_of([*bf16, *of("/m/b", "bfloat16", row("none"), weights=4)]), {})
    lines = page(sheets_of([*bf16, *small]), {}).splitlines()
    place = lines.index("## Models beside plain decoding in bf16")
    assert lines[place + 6 : place + 10] == [
        "| tiny | bfloat16 | plain | 1.6 | 400 | 400 | 900 | 1.00x | 1.00x | 1.00x |",
        "| tiny | bfloat16 | lookup | 16.0 | 400 | 400 | 900 | 2.00x | 1.00x | 2.00x |",
        "| tiny.gguf | bfloat16 | plain | 32.0 | 100 | 100 | 900 | 4.00x | 0.25x | 16.00x |",
        "| tiny.gguf | bfloat16 | lookup | 40.0 | 100 | 100 | 900 | 5.00x | 0.25x | 20.00x |",
    ]
    eight = of("/m/tiny", "bfloat16", row("none", seconds=0.5), weights=200)
    for one in eight:  # the same checkpoint in block weights is another model, and no reference
        one["conditions"] |= {"blocks": {"8 bits": 7}}
        one["fingerprint"] += "int8"
    assert "| tiny | bfloat16, 8 bits | plain | 16.0 | 200 | 200 | 900 | 2.00x | 0.50x | 4.00x |" in page(
        sheets_of([*bf16, *eight]), {}
    )


def test_the_distance_of_the_cores_stands_in_a_table() -> None:
    rows = [row("none", cores="near"), row("lookup", cores="near -> far"), row("suffix")]
    assert "Load average up to 1.0; cores near, near -> far." in page(sheets_of(rows), {})
    assert "Load average up to 1.0.\n" in page(sheets_of([row("none")]), {})


def test_no_ratio_where_a_text_differs() -> None:
    rows = [row("none"), row("lookup", texts_equal=False, first_difference=4)]
    assert "| lookup | texts differ (2.00) | texts differ (2.00) | NO: 0 of 1 |" in page(sheets_of(rows), {})
    rows[1]["peer"] = "engine 1"
    assert "| lookup | 2.00x | 2.00x | 0 of 1; 50 % of the tokens |" in page(sheets_of(rows), {})


def test_texts_over_other_weights_are_not_compared_with_ours() -> None:
    other: dict[str, Any] = {"peer": "engine 1", "peer_file": {"name": "m.gguf"}, "texts_equal": None}
    rows = [row("none"), row("engine", **other), row("engine-ngram", **other, texts_equal_own_plain=False)]
    rows += [row("none", "2"), row("engine-ngram", "2", **other, texts_equal_own_plain=True)]
    text = page(sheets_of(rows), {})
    assert "| engine | 2.00x, 1 of 2 | 2.00x, 1 of 2 | other weights |" in text
    assert "| engine-ngram | 2.00x | 2.00x | other weights; as its own plain text: 1 of 2 |" in text
    assert "Other engines: engine 1, over m.gguf (engine, engine-ngram)." in text
    sampled = [row("none", temperature=0.8), row("engine-ngram", temperature=0.8, **other, texts_equal_own_plain=None)]
    assert "| engine-ngram | 2.00x | 2.00x | other weights and random numbers |" in page(sheets_of(sampled), {})
    sampled[1]["peer_file"] = None
    assert "| engine-ngram | 2.00x | 2.00x | other random numbers |" in page(sheets_of(sampled), {})


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="measured twice under the same conditions"):
        sheets_of([row("none"), row("none", fingerprint="other")])
    path = tmp_path / "a.jsonl"
    path.write_text("{}\n")
    with pytest.raises(RequestError, match=r"a\.jsonl:1: not written by"):
        read_rows([path])
    with pytest.raises(RequestError, match="cannot be read: No such file"):
        read_rows([tmp_path / "none"])


def test_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", row("none"), row("lookup"))
    path.write_bytes(path.read_bytes()[:-5])
    assert [one["drafter"] for one in read_rows([path])] == ["none"]
