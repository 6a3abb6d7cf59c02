"""vLLM's batch rows as requests, on lists of tokens, without vLLM: who is who, what was accepted, who has ended."""

from __future__ import annotations

import random
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest

from selfdraft.core.sequence import Sequence
from selfdraft.core.tree import Draft
from selfdraft.core.verify import Result
from selfdraft.drafters import build
from selfdraft.errors import LoadError, OptionError, UnsupportedModel
from selfdraft.files.token_log import Logged
from selfdraft.integrations import vllm
from selfdraft.integrations.chains import Chains
from selfdraft.integrations.vllm import settings
from selfdraft.integrations.vllm.requests import PATIENCE, READING, Facts, Requests, verified
from selfdraft.integrations.vllm.worker import RunnerRequests
from selfdraft.replay.replay import LogTarget, open_drafter, replay
from selfdraft.types import Budget, JsonObject, SamplingParams

CONTEXT, DRAFTED, VOCAB = 256, 6, 50
METHODS = ("lookup", "suffix", "context", "prediction", "merged")


class Log:
    """A drafter that says the last token again, and writes down what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[Sequence, Result]] = []

    def draft(self, sequences: SequenceOf[Sequence], budgets: SequenceOf[Budget]) -> list[Draft]:
        return [
            Draft.chain(sequence.tokens[-1:] * min(2, budget.max_depth), "log")
            for sequence, budget in zip(sequences, budgets, strict=True)
        ]

    def observe(self, sequences: SequenceOf[Sequence], results: SequenceOf[Result]) -> None:
        self.told += zip(sequences, results, strict=True)


@dataclass
class Engine:
    """The batch of vLLM as its proposers see it: every request's tokens are known, and drafts are verified."""

    requests: Requests
    known: bool = False
    answers: dict[str, tuple[list[int], list[int]]] = field(default_factory=dict)
    """By name: the prompt, and the tokens that the model will choose behind it."""
    texts: dict[str, list[int]] = field(default_factory=dict)
    drafts: dict[str, list[int]] = field(default_factory=dict)
    accepted: dict[str, list[int]] = field(default_factory=dict)
    table: np.ndarray[tuple[int, ...], np.dtype[np.int32]] = field(
        default_factory=lambda: np.zeros((8, CONTEXT), dtype=np.int32)
    )
    row_names: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.known:
            self.requests.known = self

    def names(self) -> list[str]:
        return self.row_names

    def lives(self, name: str) -> bool:
        return name in self.answers and len(self.texts[name]) < self.end(name)

    def facts(self, name: str) -> Facts:
        return Facts(len(self.answers[name][0]), self.end(name), tuple(self.answers[name][1]))

    def end(self, name: str) -> int:
        return sum(map(len, self.answers[name]))

    def add(self, name: str, prompt: list[int], answer: list[int]) -> None:
        self.answers[name] = prompt, answer
        self.texts[name], self.accepted[name], self.drafts[name] = [*prompt], [], []

    def step(self, names: list[str], reading: tuple[str, ...] = ()) -> None:
        """A step with these requests in these rows; of those in `reading` the prompt is not read to its end yet."""
        self.row_names = names
        sampled, lengths = [], []
        for place, name in enumerate(names):
            prompt, answer = self.answers[name]
            rest = answer[len(self.texts[name]) - len(prompt) :]
            new: list[int] = []
            if name not in reading:
                right = 0
                for token, says in zip(self.drafts[name], rest, strict=False):
                    if token != says:
                        break
                    right += 1
                new = rest[: right + 1]
                self.accepted[name].append(len(new) - 1)
            self.texts[name] += new
            self.table[place] = 7  # what another request left
            self.table[place, : len(self.texts[name])] = self.texts[name]
            sampled.append(new)
            lengths.append(len(self.texts[name]))
        proposed = self.requests.propose(sampled, [*lengths, 99, 99], self.table)
        assert len(proposed) == len(names)
        self.drafts = dict(zip(self.answers, [[]] * len(self.answers), strict=True)) | dict(
            zip(names, proposed, strict=True)
        )

    def done(self, name: str) -> bool:
        return len(self.texts[name]) >= self.end(name)


def engine(drafter: object = None, *, known: bool = False) -> Engine:
    return Engine(Requests(drafter or Log(), DRAFTED, CONTEXT), known)  # type: ignore[arg-type]


def looping(seed: int, size: int) -> list[int]:
    """Tokens that often repeat a phrase."""
    rng = random.Random(seed)
    phrases = [[rng.randrange(VOCAB) for _ in range(5)] for _ in range(3)]
    text: list[int] = []
    while len(text) < size:
        text += rng.choice(phrases) if rng.random() < 0.8 else [rng.randrange(VOCAB)]
    return text[:size]


def chains(method: str, target: LogTarget) -> Chains:
    options = {"num_speculative_tokens": DRAFTED}
    if method not in ("lookup", "suffix"):
        options["min_probability"] = 0.05  # type: ignore[assignment]
    if method == "merged":
        options["memory"] = 500
    return Chains(open_drafter(method, options, target), DRAFTED, VOCAB)


class Predicting(LogTarget):
    """A log in which every answer was foretold."""

    def open(self, logged: Logged) -> Sequence:
        sequence = super().open(logged)
        object.__setattr__(sequence.sampling, "prediction", logged.output)
        return sequence


@pytest.mark.parametrize("method", METHODS)
def test_accepted_tokens_are_those_of_a_replay(method: str) -> None:
    target = Predicting()
    live, recorded = engine(chains(method, target), known=True), chains(method, target)
    for number in range(4):
        name, text = str(number), looping(number, 120)
        live.add(name, text[:40], text[40:])
        while not live.done(name):
            live.step([name])
        replayed = replay([Logged(tuple(text[:40]), tuple(text[40:]), 120)], recorded, DRAFTED, target=target)
        assert live.accepted[name] == replayed.accepted
    assert sum(replayed.accepted) > 20


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("method", ["lookup", "suffix"])
def test_a_batch_that_is_mixed_up_at_every_step_changes_no_request(method: str, known: bool) -> None:
    rng, target = random.Random(3), LogTarget()
    live = engine(chains(method, target), known=known)
    texts = {str(number): looping(number, 60 + 7 * number) for number in range(6)}
    texts["twin"] = texts["3"]
    waiting = [*texts]
    running: list[str] = []
    while waiting or running:
        reading = ()
        if waiting and len(running) < 4:
            running.append(waiting.pop(0))
            live.add(running[-1], texts[running[-1]][:30], texts[running[-1]][30:])
            reading = (running[-1],) if rng.random() < 0.5 else ()  # type: ignore[assignment]
        rng.shuffle(running)
        live.step(running, reading)
        running = [name for name in running if not live.done(name)]
    for name, text in texts.items():
        logged = Logged(tuple(text[:30]), tuple(text[30:]), len(text))
        replayed = replay([logged], chains(method, target), DRAFTED, target=target)
        accepted = live.accepted[name]
        assert accepted == replayed.accepted
    assert len(live.requests) <= 4


def told(live: Engine) -> list[tuple[int, tuple[int, ...], tuple[int, ...]]]:
    """(which sequence, its accepted path, its tokens) for all that the drafter was told."""
    drafter = live.requests.drafter
    assert isinstance(drafter, Log)
    order = {id(sequence): place for place, sequence in reversed([*enumerate(s for s, _ in drafter.told)])}
    return [(order[id(sequence)], result.path, result.tokens) for sequence, result in drafter.told]


def test_a_request_grows_and_its_draft_is_judged() -> None:
    live = engine()
    live.add("a", [1, 2], [3, 3, 3, 4, 5])
    for _ in range(3):
        live.step(["a"])
    assert told(live) == [(0, (), (3,)), (0, (0, 1), (3, 3, 4)), (0, (), (5,))]


def test_a_preempted_request_goes_on_and_one_that_left_for_long_is_read_anew() -> None:
    live = engine()
    live.add("a", [1, 2], [3, 4, 5, 6, 7, 8])
    live.add("b", [9], [1] * 100)
    live.step(["a", "b"])
    for _ in range(PATIENCE - 1):
        live.step(["b"])
    live.step(["b", "a"])
    assert told(live)[-1][0] == told(live)[0][0]  # the same sequence
    for _ in range(PATIENCE + 1):
        live.step(["b"])
    assert len(live.requests) == 1
    live.step(["b", "a"])
    assert told(live)[-1][0] != told(live)[0][0]
    assert live.requests._rows[1] is not None
    assert live.requests._rows[1].sequence.tokens == live.texts["a"]


def test_an_aborted_request_is_forgotten_at_once_where_names_are_known() -> None:
    drafter = build("merged", LogTarget(), {"memory": 100, "recycling": False})
    live = engine(drafter, known=True)
    live.add("a", [1, 2], [3, 4, 5, 6, 7, 8])
    live.add("b", [9], [1] * 100)
    live.step(["a", "b"])
    del live.answers["a"]
    live.step(["b"])
    assert len(live.requests) == 1
    assert len(drafter.tree) == 1  # type: ignore[attr-defined]
    assert drafter.memory.size == 1  # type: ignore[attr-defined]


def test_a_row_of_another_text_is_another_request() -> None:
    live = engine()
    live.add("a", [1, 2, 3], [4] * 10)
    live.add("b", [1, 2, 9], [4] * 10)  # differs at one token of the prompt
    live.add("c", [1, 2, 3, 4, 8], [4] * 10)  # begins with all of `a`, and goes on
    live.step(["a"])
    live.step(["b"])
    live.step(["c"])
    assert [place for place, _, _ in told(live)] == [0, 1, 2]


def test_a_step_in_which_nobody_asked_is_no_growth() -> None:
    live = engine()
    live.add("a", [1, 2], [3, 3, 3, 4, 5, 6])
    live.step(["a"])
    live.texts["a"] += [3, 3]  # near the end of the context vLLM does not ask
    live.drafts["a"] = []
    live.step(["a"])
    assert [place for place, _, _ in told(live)] == [0, 1]


def test_a_prompt_that_is_read_in_pieces_gets_no_draft_and_times_nothing() -> None:
    live = engine()
    live.add("a", [1, 2], [3, 3, 3])
    live.step(["a"], reading=("a",))
    assert live.drafts["a"] == []
    drafter = live.requests.drafter
    assert isinstance(drafter, Log)
    assert drafter.told[0][0] is READING
    assert not drafter.told[0][1].tokens


def test_a_draft_ends_before_the_limit_of_the_request_and_of_the_room() -> None:
    live = engine(known=True)
    live.add("a", [1], [5, 5, 5, 5])
    live.step(["a"])
    assert live.drafts["a"] == [5, 5]
    live.step(["a"])
    assert live.drafts["a"] == []  # one token is left, and the target chooses it
    short = Engine(Requests(Log(), DRAFTED, CONTEXT, room=lambda sequence: 1))
    short.add("a", [1], [5, 5, 5, 5])
    short.step(["a"])
    assert short.drafts["a"] == [5]


def test_what_was_cut_off_a_draft_is_not_accepted() -> None:
    draft = Draft.chain([4, 5, 6], "x")
    assert verified(draft, [4, 5]).path == (0,)  # the last one is the target's own
    assert verified(draft, [4, 9]).path == (0,)
    assert verified(draft, [9]).path == ()
    assert verified(draft, [4, 5, 6, 7]).path == (0, 1, 2)


def test_trees_grow_as_chains_where_only_chains_can_be_run() -> None:
    text = [1, 2, 3, 1, 2, 4, 1, 2, 3, 1, 2, 4, 1, 2]
    sequence = Sequence([*text], 1, SamplingParams(), max_length=99)
    drafter = build("context", LogTarget(), {"min_probability": 0.0})
    (tree,) = drafter.draft([sequence], [Budget(8, 8, 0)])
    (chain,) = Chains(drafter, 8, VOCAB).draft([sequence], [Budget(99, 8, 0)])
    assert len(set(tree.parents)) < len(tree)
    assert chain.parents == tuple(range(-1, len(chain) - 1))
    assert len(chain) == 8  # clipping a tree would have left fewer
    (low,) = Chains(drafter, 8, 2).draft([sequence], [Budget(8, 8, 0)])
    assert all(token < 2 for token in low.tokens)


def test_a_tree_is_cut_to_the_first_path() -> None:
    tree = Draft((1, 2, 3, 4), (-1, -1, 0, 1), ("x",) * 4, 4)
    assert tree.clip(Budget(9, 9, 9, chain=True), VOCAB)[0].tokens == (1, 3)
    assert tree.clip(Budget(9, 9, 9), VOCAB)[0] is tree


def test_a_step_without_tokens_teaches_nothing() -> None:
    drafter = build("context", LogTarget(), {"min_probability": 0.0})
    sequence = Sequence([1, 2, 1, 2, 1], 1, SamplingParams(), max_length=99)
    (draft,) = drafter.draft([sequence], [Budget(8, 8, 0)])
    paths = drafter.tree.credit.paths  # type: ignore[attr-defined]
    before = [*paths._foretold]
    drafter.observe([sequence], [Result(draft)])
    assert paths._foretold == before


def config(most: int = 8, extra: object = None, **changed: object) -> object:
    """As much of vLLM's configuration as is looked at."""
    model = {"is_hybrid": False, "is_attention_free": False, "architectures": ["Some"], "max_model_len": 128}
    sizes = {"tensor_parallel_size": 1, "pipeline_parallel_size": 1, "data_parallel_size": 1}
    return SimpleNamespace(
        additional_config={"selfdraft": extra} if extra is not None else {},
        speculative_config=SimpleNamespace(num_speculative_tokens=most),
        model_config=SimpleNamespace(**{name: changed.get(name, value) for name, value in model.items()}),
        parallel_config=SimpleNamespace(**{name: changed.get(name, value) for name, value in sizes.items()}),
        lora_config=changed.get("lora_config"),
    )


@pytest.mark.parametrize(
    ("method", "given", "words"),
    [
        ("merged", config(300), "num_speculative_tokens=300 is out of range"),
        ("merged", config(0), "num_speculative_tokens=0 is out of range"),
        ("merged", config(200, max_model_len=100), "leaves no place for a prompt in max_model_len=100"),
        ("merged", config(extra={"recycling": True}), "recycling=True reads logits"),
        ("merged", config(extra={"masks": True}), "masks=True reads logits"),
        ("merged", config(extra=[1]), 'additional_config["selfdraft"]=[1] is no object'),
        ("suffix", config(extra={"factr": 1}), "drafter 'suffix' has no option 'factr'"),
        ("suffix", config(extra={"num_speculative_tokens": 4}), "belongs into speculative_config"),
        ("layer_skip", config(tensor_parallel_size=2), "tensor_parallel_size=2 needs more"),
        ("layer_skip", config(pipeline_parallel_size=2), "pipeline_parallel_size=2 needs more"),
        ("layer_skip", config(lora_config=object()), "LayerSkip cannot draft with vLLM's LoRA adapters"),
        ("lookup", config(is_hybrid=True), "Some keeps a recurrent state"),
        ("lookup", config(is_attention_free=True), "Some keeps a recurrent state"),
    ],
)
def test_what_cannot_be_had_is_refused_in_a_line(method: str, given: object, words: str) -> None:
    with pytest.raises((OptionError, UnsupportedModel)) as refused:
        settings.Settings.of(method, given)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_options_go_through() -> None:
    made = settings.Settings.of("suffix", config(5, {"factor": 2.0}, tensor_parallel_size=4))
    assert (made.num_speculative_tokens, made.options) == (5, {"factor": 2.0})


def there_is(monkeypatch: pytest.MonkeyPatch, version: str | None) -> None:
    """Make believe that this version of vLLM is installed, or none."""
    monkeypatch.setattr(settings, "find_spec", lambda name: None if version is None else name)
    monkeypatch.setattr(settings, "import_module", lambda name: SimpleNamespace(__version__=version))


@pytest.mark.parametrize(
    ("version", "words"),
    [
        (None, "vLLM is not installed here: pip install vllm==0.32.0"),
        ("0.31.0", "vLLM 0.31.0 is not supported"),
        ("0.33.0", "vLLM 0.33.0 is not supported"),
        ("1.0", "vLLM 1.0 is not supported"),
    ],
)
def test_another_version_is_refused(monkeypatch: pytest.MonkeyPatch, version: str | None, words: str) -> None:
    there_is(monkeypatch, version)
    with pytest.raises(LoadError, match=words):
        vllm.engine_args("merged")
    with pytest.raises(LoadError, match=words):
        vllm.Merged(config())


def test_arguments_for_an_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    there_is(monkeypatch, "0.32.1+cpu")
    made: JsonObject = vllm.engine_args("suffix", num_speculative_tokens=5, factor=2.0)
    assert made["speculative_config"] == {"model": "selfdraft.integrations.vllm.Suffix", "num_speculative_tokens": 5}
    assert made["additional_config"] == {"selfdraft": {"factor": 2.0}}
    assert vllm.engine_args("LayerSkip")["worker_cls"] == "selfdraft.integrations.vllm.Worker"
    with pytest.raises(OptionError, match="there is no drafter 'suffx'; did you mean 'suffix'"):
        vllm.engine_args("suffx")
    with pytest.raises(OptionError, match="drafter 'lookahead' cannot draft in vLLM; there are: lookup, suffix"):
        vllm.engine_args("lookahead")
    with pytest.raises(OptionError, match="num_speculative_tokens=1000 is out of range"):
        vllm.engine_args("lookup", num_speculative_tokens=1000)


def test_every_proposer_is_there_and_others_are_refused_by_name() -> None:
    for name, method in settings.PROPOSERS.items():
        assert getattr(vllm, name).method == method
    with pytest.raises(OptionError, match="there is no proposer 'Mergd' for vLLM; did you mean 'Merged'"):
        _ = vllm.Mergd
    assert not hasattr(vllm, "__wrapped__")


def test_the_worker_is_needed_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    there_is(monkeypatch, "0.32.0")
    given = config()
    given.model_config.get_vocab_size = lambda: VOCAB  # type: ignore[attr-defined]
    vllm.Merged(given).load_model()
    with pytest.raises(OptionError, match="Prediction needs our worker: give worker_cls="):
        vllm.Prediction(given).load_model()


def test_a_prediction_that_cannot_be_read_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    def facts(given: object) -> Facts:
        sampling = SimpleNamespace(max_tokens=7, extra_args={"selfdraft_prediction": given})
        state = SimpleNamespace(sampling_params=sampling, num_prompt_tokens=3)
        model = SimpleNamespace(skip_tokenizer_init=True)
        runner = SimpleNamespace(requests={"a": state}, max_model_len=CONTEXT, model_config=model)
        return RunnerRequests(runner).facts("a")

    assert facts([5, 6]) == Facts(3, 10, (5, 6))
    assert facts(None) == Facts(3, 10)
    assert not caplog.records
    for wrong in ([5, -1], [5, "x"], 7, {"a": 1}, "a text, and no tokenizer"):
        assert facts(wrong) == Facts(3, 10)
    assert len(caplog.records) == 5
