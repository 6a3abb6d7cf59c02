"""Replay: the accepted counts of a live run, as integers, out of its tokens alone; the reference; bad logs."""

from __future__ import annotations

import json
from collections.abc import Sequence as SequenceOf
from pathlib import Path

import pytest

from selfdraft import cli
from selfdraft.core.rows import chain_rows
from selfdraft.core.sequence import Sequence, open_sequence
from selfdraft.core.tree import EMPTY, Draft
from selfdraft.core.verify import Result
from selfdraft.drafters import build
from selfdraft.engine.engine import Engine
from selfdraft.errors import OptionError, RequestError
from selfdraft.files.token_log import Logged, append, check_log, entry, read_logs
from selfdraft.models.exactness import NATURAL, Shapes
from selfdraft.replay.reliability import EDGES, Reliability
from selfdraft.replay.replay import LogTarget, Replayed, open_drafter, replay, time_of
from selfdraft.types import Budget, Clock, SamplingParams
from tests.models import tiny_target
from tests.outside import outside

TRACES = outside("data/traces-llama3.1-8b")
MOTIF = [17, 4, 33, 8, 51, 22, 9]
PROMPTS = [MOTIF * 8, list(range(0, 60, 3)), MOTIF[:1], [*MOTIF, 5, *MOTIF * 2]]
TOKEN_DRAFTERS: list[tuple[str, dict[str, object]]] = [
    ("none", {}),
    ("lookup", {}),
    ("suffix", {}),
    ("context", {"min_probability": 0.0}),
    ("merged", {"min_probability": 0.0, "memory": 80, "recycling": False}),
]


def traces(name: str, limit: int | None = None) -> list[Logged]:
    path = TRACES / f"{name}.jsonl"
    if not path.is_file():
        pytest.skip(f"needs the recorded answers in {TRACES}; see CONTRIBUTING.md")
    return read_logs([path], limit)


class FirstMatch:
    """Prompt lookup as vLLM's n-gram method: longest match of 5 down to 3 tokens, the first such place, 20 tokens."""

    def __init__(self) -> None:
        self.ends: dict[tuple[int, ...], int] = {}
        self.read = 0
        self.of: Sequence | None = None

    def draft(self, sequences: SequenceOf[Sequence], budgets: SequenceOf[Budget]) -> list[Draft]:
        (sequence,) = sequences
        if sequence is not self.of:
            self.ends, self.read, self.of = {}, 0, sequence
        tokens = sequence.tokens
        for stop in range(self.read, len(tokens)):
            for size in (3, 4, 5):
                if size <= stop:
                    self.ends.setdefault(tuple(tokens[stop - size : stop]), stop)
        self.read = len(tokens)
        places = [self.ends[key] for size in (5, 4, 3) if (key := tuple(tokens[-size:])) in self.ends]
        return [Draft.chain(tokens[places[0] : places[0] + 20], "first") if places else Draft()]

    def observe(self, sequences: SequenceOf[Sequence], results: SequenceOf[Result]) -> None:
        pass


@pytest.mark.parametrize(("name", "published"), [("sharegpt", 1.53), ("instructcoder", 2.75)])
def test_the_published_reference(name: str, published: float) -> None:
    found = replay(traces(name), FirstMatch(), 20)
    assert round(found.tokens_per_forward, 2) == published


# live and replayed


def live(
    name: str, options: dict[str, object], path: Path, shapes: Shapes, sampling: SamplingParams, chunk: int
) -> list[list[int]]:
    """Decode with the model, log the tokens; the accepted counts of every request's steps."""
    target = tiny_target(shapes=shapes)
    engine = Engine(target, build(name, target, options), chunk=chunk, nodes=12)
    counts = []
    for seed, prompt in enumerate(PROMPTS):
        sequence = open_sequence(prompt, sampling, seed=seed, eos=frozenset({7}), context=target.max_length)
        steps, written = [], 0
        for _, result in engine.generate([sequence]):
            if sequence.num_output_tokens > written:
                steps.append(min(sequence.num_output_tokens - written, len(result.path)))
                written = sequence.num_output_tokens
        counts.append(steps)
        ends = sequence.stop_ids
        append(path, entry(prompt, sequence.output, target, limit=sequence.max_length, ends=ends, chunk=chunk))
    return counts


@pytest.mark.parametrize("sampling", [SamplingParams(max_tokens=70), SamplingParams(max_tokens=50, temperature=0.6)])
@pytest.mark.parametrize(("shapes", "chunk"), [(NATURAL, 256), (Shapes(4, 16), 5)], ids=["natural", "canonical"])
@pytest.mark.parametrize(("name", "options"), TOKEN_DRAFTERS)
def test_live_and_replayed_counts_are_equal(
    name: str, options: dict[str, object], shapes: Shapes, chunk: int, sampling: SamplingParams, tmp_path: Path
) -> None:
    log = tmp_path / "log.jsonl"
    counts = live(name, options, log, shapes, sampling, chunk)
    found = replay(read_logs([log]), open_drafter(name, options), 12)
    assert found.accepted == [count for steps in counts for count in steps]
    assert found.requests == len(PROMPTS)
    assert name == "none" or sampling.temperature or sum(found.accepted) > 20


def test_an_answer_that_something_else_ended_is_not_passed() -> None:
    """A log that stops short of its limit, as at a stop string: the walk ends where the log ends."""
    logged = Logged(tuple(MOTIF * 3), tuple(MOTIF[:3]), limit=500)
    found = replay([logged], open_drafter("suffix"), 64)
    assert (found.stats.num_output_tokens, found.accepted) == (3, [0, 2])


# figures


def test_acceptance_by_depth_rows_and_projection() -> None:
    logged = Logged(tuple(MOTIF * 3), tuple(MOTIF * 2), limit=35)
    found = replay([logged], open_drafter("lookup", {"num_speculative_tokens": 4}), 64)
    assert found.accepted == [0, 4, 4, 2]
    assert dict(found.rows) == {5: 2, 3: 1}
    assert found.by_depth == [1.0, 1.0, pytest.approx(2 / 3), pytest.approx(2 / 3)]
    found.host = [0.0] * 3
    assert found.speedup({1: 1.0}) == pytest.approx(13 / 3)
    assert found.speedup({1: 1.0, 5: 2.0}) == pytest.approx(13 / (2 + 2 + 1.5))
    found.host = [1.0, 0.0, 0.0]
    assert found.speedup({1: 1.0, 5: 2.0}) == pytest.approx(13 / (2 + 2 + 1.5 + 1))
    assert json.loads(json.dumps(found.as_dict()))["rows_per_step"] == round(13 / 3, 2)
    assert Replayed().as_dict()["tokens_per_forward"] == 0.0


def test_predicted_against_actual_acceptance() -> None:
    """Path chances, in classes, behind the first tokens; probes and drafts without chances do not count."""
    draft = Draft((5, 6, 7), (-1, 0, -1), ("x",) * 3, 3, (0.5, 0.5, 0.2))
    found = Reliability(behind=3)
    found.book(draft, (0, 1), 3)
    assert (found.nodes, found.ratio, found.tokens) == (0, None, 3)
    found.book(draft, (0,), 2)
    found.book(draft, (), 1)
    found.book(Draft((5,), (-1,), ("x",), 1), (0,), 2)
    found.book(draft.with_probes((1, 2), (-1, -3), "y"), (2,), 2)
    assert (found.tokens, found.nodes, found.accepted) == (10, 9, 2)
    assert found.predicted == pytest.approx(3 * (0.5 + 0.25 + 0.2))
    assert found.ratio == pytest.approx(2.85 / 2)
    said = [(round(one.predicted / one.nodes, 6), one.nodes, one.accepted) for one in found.bins if one.nodes]
    assert said == [(0.225, 6, 1), (0.5, 3, 1)]
    assert list(EDGES) == sorted(EDGES)


def test_a_replay_counts_what_was_predicted() -> None:
    logged = Logged(tuple(MOTIF * 30), tuple(MOTIF * 400), limit=10**5)
    found = replay([logged], open_drafter("context", {"min_probability": 0.0}), 8)
    said = found.reliability
    assert said.tokens == found.stats.num_output_tokens - 1  # the first one came with the prompt
    assert 0 < said.accepted < sum(found.accepted)
    assert said.ratio == pytest.approx(1.0, abs=0.05)
    assert found.as_dict()["predicted_by_actual"] == round(said.ratio or 0.0, 4)
    assert len(found.drafting) == len(found.host)
    assert all(one <= both for one, both in zip(found.drafting, found.host, strict=True))


def test_time_of_goes_on_as_a_straight_line() -> None:
    times = {1: 1.0, 3: 2.0, 4: 4.0}
    assert [time_of(times, rows) for rows in (1, 2, 3, 4, 6)] == [1.0, 1.5, 2.0, 4.0, 8.0]
    assert time_of({4: 2.0}, 9) == 2.0
    assert time_of({2: 2.0, 4: 4.0}, 1) == 1.0


def test_the_clock_of_a_log_goes_on_with_its_passes() -> None:
    class Timed:
        def __init__(self, clock: Clock) -> None:
            self.clock, self.seen = clock, list[float]()

        def draft(self, sequences: SequenceOf[Sequence], budgets: SequenceOf[Budget]) -> list[Draft]:
            return [Draft.chain([1, 2], "timed")]

        def observe(self, sequences: SequenceOf[Sequence], results: SequenceOf[Result]) -> None:
            self.seen.append(self.clock())

    target = LogTarget({1: 0.5, 3: 2.0})
    drafter = Timed(target.extras.clock)
    replay([Logged((1, 2, 3), (4, 5, 6, 7, 8), 8)], drafter, 4, target=target)
    assert drafter.seen == [0.0, 2.0, 4.0, 5.25, 5.75]


# what is refused


def test_a_drafter_that_runs_the_model_is_refused() -> None:
    class Passing:
        def __init__(self, target: LogTarget) -> None:
            self.target = target

        def draft(self, sequences: SequenceOf[Sequence], budgets: SequenceOf[Budget]) -> list[Draft]:
            self.target.forward(chain_rows([(0, 0, 1)]))
            return [EMPTY]

        def observe(self, sequences: SequenceOf[Sequence], results: SequenceOf[Result]) -> None: ...

    target = LogTarget()
    with pytest.raises(OptionError, match="runs the model"):
        replay([Logged((1,), (2, 3), 3)], Passing(target), 4, target=target)


@pytest.mark.parametrize("name", ["lookahead", "layer_skip", "s3d", "space"])
def test_drafters_that_need_the_model_are_refused(name: str) -> None:
    with pytest.raises(OptionError, match=f"{name}.*a log holds tokens only"):
        open_drafter(name)


@pytest.mark.parametrize("nodes", [0, -1, 2**16 + 1])
def test_a_number_of_nodes_out_of_range_is_refused(nodes: int) -> None:
    with pytest.raises(OptionError, match=f"max_nodes={nodes}"):
        replay([Logged((1,), (2,), 2)], open_drafter("lookup"), nodes)


GOOD = {"prompt_token_ids": [1, 2], "generated_token_ids": [3, 4]}


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"prompt_token_ids": [1, 2], "generated', "log.jsonl:2: broken JSON"),
        ("[1, 2]", "log.jsonl:2: "),
        ("[" * 10**5, "log.jsonl:2: JSON nested too deeply"),
        ('{"generated_token_ids": [' + "9" * 5000 + "]}", "log.jsonl:2: a number of thousands of digits"),
        (json.dumps({"prompt_token_ids": [1]}), "log.jsonl:2: generated_token_ids"),
        (json.dumps({**GOOD, "prompt_token_ids": []}), "log.jsonl:2: prompt_token_ids"),
        (json.dumps({**GOOD, "generated_token_ids": [3, -4]}), "log.jsonl:2: .*-4.*no token id"),
        (json.dumps({**GOOD, "generated_token_ids": [3, "x"]}), "log.jsonl:2: .*'x'.*no token id"),
        (json.dumps({**GOOD, "limit": 3}), "log.jsonl:2: limit 3 is below the 4 tokens"),
        (json.dumps({**GOOD, "edge": 0}), "log.jsonl:2: edge is 0"),
    ],
)
def test_a_broken_line_is_named(line: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + line + "\n")
    with pytest.raises(RequestError, match=says):
        read_logs([path])
    assert len(read_logs([path], 1)) == 1


def test_missing_and_empty_logs_are_named(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"no log file .*none\.jsonl"):
        read_logs([tmp_path / "none.jsonl"])
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(RequestError, match="holds no request"):
        read_logs([tmp_path / "empty.jsonl"])


def test_a_log_that_cannot_be_written_is_said_before(tmp_path: Path) -> None:
    for path in (tmp_path / "no" / "log.jsonl", tmp_path):
        with pytest.raises(RequestError, match="cannot be written"):
            check_log(path)
        with pytest.raises(RequestError, match="cannot be written"):
            append(path, GOOD)
    check_log(tmp_path / "log.jsonl")
    assert not list(tmp_path.iterdir())


# the command line


def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.argv", ["selfdraft", *map(str, words)])
    with pytest.raises(SystemExit) as ending:
        cli.main()
    said = capsys.readouterr()
    return int(ending.value.code or 0), said.out, said.err


def test_the_verb(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    append(path, {"prompt_token_ids": MOTIF * 3, "generated_token_ids": MOTIF * 2})
    words = ["replay", path, "--drafter", "lookup", "--max-nodes", 4, "--step-times", "[1.0, 1.0]"]
    code, out, _ = call(monkeypatch, capsys, *words, "--json")
    assert code == 0
    said = json.loads(out)
    assert (said["num_steps"], said["max_nodes"], said["drafter"]) == (4, 4, "lookup")
    assert said["projected_speedup"] > 4
    code, out, _ = call(monkeypatch, capsys, *words)
    assert code == 0
    assert "3.500 tokens per forward" in out
    assert "projected speed-up" in out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--drafter", "layer_skip"], "a log holds tokens only"),
        (["--max-nodes", "0"], "max-nodes"),
        (["--step-times", "soon"], "--step-times must be a JSON list or object"),
        (["--step-times", "[]"], "step times are empty"),
        (["--step-times", "[0.0]"], "step time of 1 rows=0.0 is out of range"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str],
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    path = tmp_path / "log.jsonl"
    append(path, GOOD)
    code, _, err = call(monkeypatch, capsys, "replay", path, *words)
    assert code == 2
    assert says in err
    assert len(err.strip().splitlines()) == 1


def test_the_picture_of_predicted_against_actual(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    log, picture = tmp_path / "log.jsonl", tmp_path / "reliability.png"
    append(log, {"prompt_token_ids": MOTIF * 30, "generated_token_ids": [*MOTIF, *range(40, 60)] * 90})
    words = ["replay", log, "--drafter", "context", "--speculative-config", '{"min_probability": 0.0}']
    code, out, _ = call(monkeypatch, capsys, *words, "--reliability", picture)
    assert code == 0
    assert "predicted by actual acceptance: " in out
    assert picture.read_bytes().startswith(b"\x89PNG")
    for wrong, says in (
        ([*words, "--reliability", tmp_path], "cannot be written: a folder"),
        ([*words, "--reliability", "/dev/full"], "cannot be written: a folder, or no regular file"),
        (["replay", log, "--drafter", "merged", "--memory", tmp_path / "no" / "m"], "cannot be written: no folder"),
        (["replay", log, "--drafter", "merged", "--memory", tmp_path], "cannot be written: a folder"),
        (["replay", log, "--drafter", "merged", "--memory", "/dev/full"], "cannot be written: no regular file"),
        ([*words, "--reliability", tmp_path / "no" / "x.png"], "cannot be written: no folder"),
        (["replay", log, "--drafter", "lookup", "--reliability", tmp_path / "x.png"], "the drafter gives no chances"),
        ([*words, "--limit", 0, "--reliability", tmp_path / "x.png"], "--limit"),
    ):
        code, _, err = call(monkeypatch, capsys, *wrong)
        assert code == 2
        assert says in err
        assert len(err.strip().splitlines()) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"log.jsonl", "reliability.png"}


def test_generate_writes_a_log_that_can_be_replayed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from tests.test_llm import TEXTS, model, tokenizer

    folder, path = tmp_path / "model", tmp_path / "log.jsonl"
    model().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    words = ["generate", TEXTS[0], "--model", folder, "--drafter", "suffix", "--max-new-tokens", 40, "--log", path]
    counts = []
    for _ in range(2):
        code, out, _ = call(monkeypatch, capsys, *words, "--json")
        assert code == 0
        counts.append(json.loads(out)["results"][0])
    found = replay(read_logs([path]), open_drafter("suffix"), 128)
    assert found.stats.num_output_tokens == sum(count["num_output_tokens"] for count in counts)
    assert sum(found.accepted) == sum(count["num_accepted_draft_tokens"] for count in counts)
