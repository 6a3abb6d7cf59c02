"""Training of mask adapters: what a user meets, and that a killed run ends as an undisturbed one."""

from __future__ import annotations

import copy
import inspect
import json
import os
import re
import resource
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from math import exp
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.fx.experimental import _config
from transformers import AutoModelForCausalLM

from selfdraft import LLM, SamplingParams
from selfdraft.cli import train as cli
from selfdraft.errors import OptionError
from selfdraft.models.adapters import CARD, CHECKPOINT, EMBEDDINGS, load_adapter
from selfdraft.train import head, loop, output, run, texts
from selfdraft.train import student as student_module
from selfdraft.train.head import Head, Shortlist, shortlist
from selfdraft.train.loop import draw, measure, train
from selfdraft.train.losses import row_losses
from selfdraft.train.settings import Settings
from selfdraft.train.student import Student
from selfdraft.train.texts import Text, read_prompts, read_texts, split
from tests import killing
from tests.far import FAR, Noted, watching
from tests.models import VOCAB, tiny_llama
from tests.terminal import Done, one_line, typed
from tests.test_device import Card, cards
from tests.test_families import model_of
from tests.test_llm import TEXTS, model, tokenizer

pytest.importorskip("peft", reason="PEFT is not installed: pip install selfdraft[train]")
accelerate_state = pytest.importorskip("accelerate.state", reason="accelerate is not installed")

WEIGHTS = "adapter_model.safetensors"
FILES = {CARD, EMBEDDINGS, WEIGHTS, "adapter_config.json"}
OWN = {"own_texts.jsonl", "own_texts.origin.json"}
SMALL = {
    "masks": 2,
    "rank": 2,
    "link": 3,
    "groups": 3,
    "batch-size": 2,
    "max-length": 48,
    "steps": 6,
    "every": 2,
}
DISTILL = ["--distill", "--distill-tokens", "12"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random checkpoint."""
    path = tmp_path_factory.mktemp("tiny")
    model().save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    words = [text[i:] for i in range(4) for text in TEXTS]
    path.write_text("".join(json.dumps({"prompt": word, "response": word * 2}) + "\n" for word in words), "utf-8")
    return path


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """And without the accelerator of the test before, which is kept for the whole process."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    accelerate_state.AcceleratorState._reset_state(True)
    yield
    accelerate_state.AcceleratorState._reset_state(True)


def options(folder: Path, data: Path, *more: object, **changes: object) -> list[str]:
    """`selfdraft train` with small sizes, without its output."""
    sizes = {**SMALL, **{name.replace("_", "-"): value for name, value in changes.items()}}
    pairs = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    return ["--model", str(folder), "--data", str(data), *pairs, *map(str, more)]


@pytest.fixture
def selfdraft(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """Runs `selfdraft` with arguments, errors and exit code included."""
    return partial(typed, monkeypatch, capsys)


def names(folder: Path) -> set[str]:
    return {*killing.contents(folder)}


@pytest.mark.parametrize("recipe", ["space", "s3d"])
def test_trained_then_used(selfdraft: Any, folder: Path, data: Path, tmp_path: Path, recipe: str) -> None:
    out = tmp_path / "deep" / "adapter"
    done = selfdraft("train", *options(folder, data, recipe=recipe), "--output", out)
    assert done.code == 0, done.err
    assert names(out) == FILES
    assert len({(out / name).stat().st_mode for name in FILES}) == 1, "who may read one may read all"
    lines = done.err.splitlines()
    assert [line.partition(":")[0] for line in lines[:-1]] == [f"step {step} of 6" for step in (2, 4, 6)]
    places = 2 + (recipe == "s3d")
    card = json.loads((out / CARD).read_text())
    assert card["method"] == recipe
    assert card["texts"] == 12
    assert card["held_out_texts"] >= 1
    assert card["settings"]["steps"] == 6
    assert len(card["held_out_acceptance"]) == places
    assert all(0.0 <= share <= 1.0 for share in card["held_out_acceptance"])
    assert lines[-2].endswith(" ".join(f"{share:.2f}" for share in card["held_out_acceptance"]))
    assert lines[-1].endswith(f"--drafter {recipe} --adapter {out}")
    said = [
        selfdraft("generate", TEXTS[0], "--model", folder, "--max-new-tokens", 12, *more)
        for more in ([], ["--drafter", recipe, "--adapter", out])
    ]
    assert [one.code for one in said] == [0, 0]
    assert said[0].out == said[1].out
    before = killing.contents(out)
    (out / "unfinished").mkdir()  # as a kill after the last renaming leaves it
    (out / CHECKPOINT).touch()
    again = selfdraft("train", *options(folder, data, recipe=recipe), "--output", out)
    assert (again.code, again.err.count("\n")) == (0, 1)
    assert "holds this adapter already" in again.err
    assert killing.contents(out) == before
    assert not (out / "unfinished").exists()


def test_it_learns(folder: Path, data: Path, tmp_path: Path) -> None:
    """The loss falls, and masks come to say what the model says."""
    settings = replace(SPACE, rank=4, steps=80, batch_size=4, groups=8, learning_rate=0.02, hard_share=1.0)
    own = copy.deepcopy(model()).float()
    lessons = read_texts([data], LLM(own, tokenizer=tokenizer()).encode, 48)
    seen = list(run.run(own, tokenizer(), lessons, settings, tmp_path, run.accelerator_for(own), every=40))
    assert [progress.step for progress in seen] == list(range(1, 81))
    assert sum(p.loss for p in seen[-10:]) < 0.9 * sum(p.loss for p in seen[:10])
    assert [bool(progress.acceptance) for progress in seen] == [step % 40 == 0 for step in range(1, 81)]
    share = seen[-1].acceptance
    assert seen[-1].mean_acceptance_length == pytest.approx(1 + share[0] + share[0] * share[1])
    assert json.loads((tmp_path / CARD).read_text())["held_out_acceptance"] == [round(one, 4) for one in share]


@pytest.fixture(scope="module")
def trained(folder: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of `space` for the tiny checkpoint."""
    out = tmp_path_factory.mktemp("trained")
    own = model()
    lessons = read_texts([data], LLM(own, tokenizer=tokenizer()).encode, 48)
    settings = replace(SPACE, rank=4, link=4, steps=20, groups=8, learning_rate=0.02)
    list(run.run(own, tokenizer(), lessons, settings, out, run.accelerator_for(own)))
    return out


@pytest.mark.parametrize("recipe", ["space", "s3d"])
def test_a_training_begins_where_another_one_ended(
    selfdraft: Any, folder: Path, data: Path, trained: Path, tmp_path: Path, recipe: str
) -> None:
    """With a learning rate of nothing the tensors are those it began with; the card names them by a hash."""
    out = tmp_path / "second"
    given = ["--start-from", trained, "--recipe", recipe, "--output", out]
    done = selfdraft("train", *options(folder, data, *given, rank=4, link=4, learning_rate="1e-30"))
    assert done.code == 0, done.err
    first, second = (load_adapter(place, model()) for place in (trained, out))
    assert torch.equal(first.embeddings, second.embeddings)
    assert first.link is not None
    assert second.link is not None
    assert all(torch.equal(*pair) for pair in zip(first.link, second.link, strict=True))
    shared = first.layers.keys() & second.layers.keys()
    assert len(shared) == len(second.layers) > 0
    assert all(
        torch.equal(*pair) for path in shared for pair in zip(first.layers[path], second.layers[path], strict=True)
    )
    card = json.loads((out / CARD).read_text())
    assert str(trained) not in json.dumps(card)
    assert len(card["settings"]["start"]) == 24
    again = selfdraft("train", *options(folder, data, *given, rank=4, link=4, learning_rate="1e-30"))
    assert "holds this adapter already" in again.err
    fresh = selfdraft("train", *options(folder, data, *given[2:], rank=4, link=4, learning_rate="1e-30"))
    one_line(fresh, "was trained with start=")


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"rank": 8, "link": 4}, "rank=8, but the adapter to start from has 4: give --rank 4"),
        ({"rank": 4, "link": 0}, "link=0, but the adapter to start from has 4: give --link 4"),
    ],
)
def test_a_start_of_other_sizes(
    selfdraft: Any, folder: Path, data: Path, trained: Path, tmp_path: Path, sizes: dict[str, object], words: str
) -> None:
    flags = ["--start-from", trained, "--output", tmp_path / "out"]
    one_line(selfdraft("train", *options(folder, data, *flags, **sizes)), words)


@pytest.mark.parametrize("recipe", ["space", "s3d"])
def test_killed_at_any_moment(folder: Path, data: Path, tmp_path: Path, recipe: str) -> None:
    """SIGKILL: the same bytes as undisturbed. Ten kills and more: python -m tests.killing."""
    more = DISTILL if recipe == "s3d" else []
    report = killing.compare(options(folder, data, *more, recipe=recipe), tmp_path, kills=3, stride=3)
    assert {*report["files"]} == (FILES | OWN if more else FILES)
    assert report["kills_before_renamings"] >= 2
    assert report["different"] == []


def student_and(settings: Settings, seed: int = 0) -> tuple[Student, list[Text], Any]:
    """A fresh student of a tiny model, random lessons and an accelerator."""
    draw = torch.Generator().manual_seed(seed)
    lessons = [Text(tuple(torch.randint(0, VOCAB, (9 + i,), generator=draw).tolist()), start=i % 9) for i in range(12)]
    own = tiny_llama()
    return run.make_student(own, settings), lessons, run.accelerator_for(own)


SPACE = Settings(recipe="space", masks=2, rank=2, link=3, steps=7, batch_size=3, groups=4, max_length=48)


def test_a_resumed_run_repeats_at_most_an_interval(tmp_path: Path) -> None:
    losses: list[list[tuple[int, float]]] = []
    for stops in ((), (1, 5, 6)):
        path, seen = tmp_path / f"{len(stops)}.pt", []
        for stop in (*stops, None):
            student, lessons, accelerator = student_and(SPACE)
            for progress in train(student, lessons, SPACE, accelerator, path, every=2):
                seen.append((progress.step, progress.loss))
                if progress.step == stop:
                    break
        losses.append(seen)
    once = dict(losses[0])
    assert [step for step, _ in losses[1]] == [1, 1, 2, 3, 4, 5, 5, 6, 7]
    assert all(once[step] == loss for step, loss in losses[1])


def test_a_run_killed_after_its_last_step_says_the_same(tmp_path: Path) -> None:
    last = []
    for _ in range(2):
        student, lessons, accelerator = student_and(SPACE)
        *_, progress = train(student, lessons, SPACE, accelerator, tmp_path / CHECKPOINT, every=2)
        last.append(progress)
    assert last[0] == last[1]


CHANGES: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "settings": (lambda: {"settings": replace(SPACE, groups=5)}, "groups=4, not 5"),
    "texts": (lambda: {"lessons": student_and(SPACE, seed=1)[1]}, "texts='"),
    "model": (lambda: {"student": run.make_student(tiny_llama(seed=1), SPACE)}, "model='"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_checkpoint_of_another_training_is_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / CHECKPOINT
    student, lessons, accelerator = student_and(SPACE)
    next(iter(train(student, lessons, SPACE, accelerator, path, every=1)))
    change, words = CHANGES[name]
    asked = {"student": student, "lessons": lessons, "settings": SPACE, **change()}
    with pytest.raises(OptionError, match=words):
        next(iter(train(asked["student"], asked["lessons"], asked["settings"], accelerator, path)))


@pytest.mark.parametrize("content", [b"", b"PK\3\4 torn", None])
def test_a_broken_checkpoint_is_refused(content: bytes | None, tmp_path: Path) -> None:
    torch.save([1], tmp_path / CHECKPOINT)
    if content is not None:
        (tmp_path / CHECKPOINT).write_bytes(content)
    student, lessons, accelerator = student_and(SPACE)
    with pytest.raises(OptionError, match=r"cannot be read: .*; delete it to start again"):
        next(iter(train(student, lessons, SPACE, accelerator, tmp_path / CHECKPOINT)))


def test_own_texts_go_on_where_they_were_torn(selfdraft: Any, folder: Path, data: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    assert selfdraft("train", *options(folder, data, *DISTILL), "--output", whole).code == 0
    wanted = killing.contents(whole)
    content = wanted["own_texts.jsonl"]
    assert content.count(b"\n") == 12
    ends = [i + 1 for i, byte in enumerate(content) if byte == ord("\n")]
    # inside the first line, before its end, inside a batch of four, just before and after a batch
    for size in (3, ends[0] - 1, ends[5] + 7, ends[7] - 1, ends[7]):
        torn = tmp_path / f"torn{size}"
        torn.mkdir()
        (torn / "own_texts.jsonl").write_bytes(content[:size])
        (torn / "own_texts.origin.json").write_bytes(wanted["own_texts.origin.json"])
        done = selfdraft("train", *options(folder, data, *DISTILL, steps=1), "--output", torn)
        assert done.code == 0, done.err
        assert (torn / "own_texts.jsonl").read_bytes() == content
    (torn / CARD).unlink()
    one_line(
        selfdraft("train", *options(folder, data, *DISTILL, "--distill-temperature", 0.5), "--output", torn),
        "own_texts.jsonl was made with distill_temperature=0.8, not 0.5; go on with the same options",
    )
    assert (torn / "own_texts.jsonl").read_bytes() == content


@pytest.mark.parametrize(("total", "lines", "kept"), [(9, 3, 0), (9, 5, 4), (9, 8, 8), (9, 9, 9), (8, 8, 8), (5, 5, 5)])
def test_only_whole_batches_are_kept(total: int, lines: int, kept: int, tmp_path: Path) -> None:
    """With other neighbours a near-tie could fall otherwise."""
    path = tmp_path / "own.jsonl"
    for torn in ("", "{'torn"):
        path.write_text("{}\n" * lines + torn)
        assert texts._finished_lines(path, 4, total) == kept
        assert path.read_text() == "{}\n" * kept


def test_own_texts_are_what_the_model_says(selfdraft: Any, folder: Path, data: Path, tmp_path: Path) -> None:
    """Every second one sampled, each from its own seed; the others greedy."""
    assert selfdraft("train", *options(folder, data, *DISTILL, seed=5, steps=1), "--output", tmp_path).code == 0
    llm = LLM(folder, drafter="none")
    records = [json.loads(line) for line in (tmp_path / "own_texts.jsonl").read_text().splitlines()]
    for number, (record, line) in enumerate(zip(records, data.read_text().splitlines(), strict=True)):
        prompt = llm.encode(json.loads(line)["prompt"])
        assert record["prompt_token_ids"] == prompt[-36:]
        heat = SamplingParams(max_tokens=12, temperature=0.8 if number % 2 else 0.0, seed=5 + number)
        (answer,) = llm.generate(record["prompt_token_ids"], heat)
        assert record["generated_token_ids"] == list(answer.outputs[0].token_ids)


def test_two_processes_are_one_training(folder: Path, data: Path, tmp_path: Path) -> None:
    """Started as a launcher starts them. Both end; the same losses step by step; the adapter loads."""
    said: list[list[float]] = []
    asked = options(folder, data, every=1, batch_size=3)
    for processes in (1, 2):
        out = tmp_path / str(processes)
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]

        def join(rank: int, processes: int = processes, port: int = port) -> None:
            signal.alarm(120)  # if one fails, the other would wait for it
            places: dict[str, object] = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_PORT": port}
            places |= {"OMP_NUM_THREADS": 1, "MASTER_ADDR": "127.0.0.1"}
            os.environ.update({name: str(place) for name, place in places.items()})
            real = loop.draw

            def told(*asked: Any) -> Any:
                if asked[5:]:
                    print("share", *asked[5:])
                return real(*asked)

            loop.draw = told  # type: ignore[assignment]

        children = [killing.start(asked, out, partial(join, rank)) for rank in range(processes)]
        assert [killing.ends(child) for child in children] == [True] * processes
        log = out.with_suffix(".log").read_text()
        said.append([float(loss) for loss in re.findall(r"of 6: loss (\S+),", log)])
        assert {*re.findall(r"share (\d) (\d)", log)} == {(str(rank), str(processes)) for rank in range(processes)}
        assert names(out) == FILES
        assert load_adapter(out, model()).method == "space"
    assert len(said[0]) == 6
    assert said[1] == pytest.approx(said[0], abs=2e-3)
    one, two = (json.loads((tmp_path / name / CARD).read_text()) for name in "12")
    assert one["settings"] == two["settings"]


def test_tuning_the_model_itself(selfdraft: Any, folder: Path, data: Path, tmp_path: Path) -> None:
    """SPACE's own way: a new checkpoint that loads by itself with its masks, and drafts its own text."""
    before = killing.contents(folder)
    done = selfdraft("train", "--sar-sft", *options(folder, data, steps=20, learning_rate=0.02), "--output", tmp_path)
    assert done.code == 0, done.err
    made = tmp_path / "model"
    assert done.err.splitlines()[-1].endswith(f"--drafter space --model {made}")
    assert killing.contents(folder) == before
    assert WEIGHTS not in names(tmp_path), "the adapter is in the new weights"
    assert (made / "selfdraft_space" / EMBEDDINGS).read_bytes() == (tmp_path / EMBEDDINGS).read_bytes()
    old, new = (load_file(place / "model.safetensors") for place in (folder, made))
    assert {name.rsplit(".", 2)[1] for name in new if not torch.equal(old[name], new[name])} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }
    stock = AutoModelForCausalLM.from_pretrained(made)
    prompt = tokenizer()(TEXTS[0], return_tensors="pt")
    wanted = stock.generate(**prompt, max_new_tokens=16, do_sample=False, pad_token_id=0)[
        0, prompt["input_ids"].shape[1] :
    ]
    for adapters in ([], [tmp_path]):
        llm = LLM(made, drafter="space", adapters=adapters)
        assert llm.target.extras.masks_for("space").ids
        (answer,) = llm.generate(TEXTS[0], SamplingParams(max_tokens=16, ignore_eos=True))
        assert list(answer.outputs[0].token_ids) == wanted.tolist()


def test_bfloat16(selfdraft: Any, folder: Path, data: Path, tmp_path: Path) -> None:
    """Mixed precision: the model's passes in bfloat16, what is learned in float32."""
    done = selfdraft("train", *options(folder, data, "--dtype", "bfloat16"), "--output", tmp_path)
    assert done.code == 0, done.err
    learned = {**load_file(tmp_path / WEIGHTS), **load_file(tmp_path / EMBEDDINGS)}
    assert {value.dtype for value in learned.values()} == {torch.float32}
    assert all(value.isfinite().all() for value in learned.values())
    for dtype in ("bfloat16", "float32"):
        plain, drafted = (
            selfdraft("generate", TEXTS[1], "--model", folder, "--dtype", dtype, "--max-new-tokens", 12, *more)
            for more in ([], ["--drafter", "space", "--adapter", tmp_path])
        )
        assert (plain.code, drafted.code) == (0, 0)
        assert plain.out == drafted.out


# --- where it runs ----------------------------------------------------------------------------------------------


def test_a_device_that_is_named(selfdraft: Any, folder: Path, data: Path, tmp_path: Path) -> None:
    """That of accelerate may be named as well; another one is an error, and so is what no verb knows."""
    asked = options(folder, data, *DISTILL, steps=1)
    assert selfdraft("train", "--output", tmp_path / "auto", *asked).code == 0
    assert selfdraft("train", "--output", tmp_path / "cpu", "--device", "cpu", *asked).code == 0
    assert killing.contents(tmp_path / "auto") == killing.contents(tmp_path / "cpu")
    one_line(
        selfdraft("train", "--output", tmp_path / "out", "--device", "cuda", *asked),
        "device='cuda': accelerate was told to use the CPU, here cpu; leave out --device",
    )
    one_line(
        selfdraft("train", "--output", tmp_path / "out", "--device", "mps", *asked),
        "device 'mps' is unknown; there are auto, cpu, cuda and cuda:NUMBER",
    )
    assert not (tmp_path / "out").exists()


def test_without_a_gpu_the_error_is_that_of_all_verbs(
    selfdraft: Any, folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    asked = ["--output", tmp_path / "out", *options(folder, data, steps=1)]
    one_line(selfdraft("train", *asked, "--device", "cuda"), "was built without CUDA; install a CUDA build")
    assert selfdraft("train", *asked, "--device", "cpu").code == 0


def test_one_process_trains_where_the_option_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    taken: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    wanted = torch.device("cuda", 1)
    assert run.place_of("cuda:1", lambda: wanted) == wanted
    assert taken == [wanted]
    assert run.accelerator_for(tiny_llama(torch.float32)).device == wanted


def test_several_processes_train_where_accelerate_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    state = run._processes()
    state.num_processes, state.device = 2, torch.device("cuda", 1)

    def alone() -> torch.device:
        raise AssertionError("several processes were asked for the device of one")

    assert run.place_of("auto", alone) == run.place_of("cuda", alone) == state.device
    for name in ("cuda:0", "cuda:1", "cpu"):
        words = f"device='{name}': accelerate gives each of 2 processes its device, here cuda:1; leave out --device"
        with pytest.raises(OptionError, match=words):
            run.place_of(name, alone)


@pytest.mark.parametrize(("flags", "slots", "runner"), [((), 1, "plain"), (DISTILL, 2, "auto")])
def test_a_gpu_is_not_filled_with_keys_and_values(
    selfdraft: Any, folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str],
    slots: int, runner: str,
) -> None:  # fmt: skip
    """Steps need the memory. Texts are decoded where the model is trained, and in the dtype of that device."""
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    cards(monkeypatch, Card(), Card())
    asked: list[dict[str, Any]] = []

    def opened(*given: Any, **named: Any) -> LLM:
        asked.append(named)
        raise OptionError("enough was seen")

    monkeypatch.setattr(cli, "open_llm", opened)
    for device in ("auto", "cuda:1"):
        done = selfdraft("train", "--output", tmp_path, *options(folder, data, *flags, "--device", device))
        one_line(done, "enough was seen")
    assert [one["device"] for one in asked] == ["cuda:0", "cuda:1"]
    for one in asked:
        assert (one["engine"].slots, one["engine"].max_model_len, one["runner"]) == (slots, 48, runner)


@pytest.mark.parametrize("how", ["space", "s3d", "tuned", "large vocabulary"])
def test_a_step_runs_on_another_device(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One without contents: the whole loop, where nothing of the host is mixed with what is there."""
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    monkeypatch.setattr(head, "WORTH", 8 if how == "large vocabulary" else 8192)
    settings = replace(SPACE, recipe="s3d" if how == "s3d" else "space", sar_sft=how == "tuned")
    settings = replace(settings, masks=7, steps=2)  # answers are below 7
    lessons, noted = student_and(SPACE)[1], Noted()
    accelerate_state.AcceleratorState._reset_state(True)
    assert run.place_of("auto", lambda: torch.device(FAR)).type == FAR
    with watching(noted), _config.patch(meta_nonzero_assume_all_nonzero=True):  # type: ignore[attr-defined]
        own = copy.deepcopy(tiny_llama()).to(FAR)
        student = run.make_student(own, settings)
        accelerator = run.accelerator_for(own)
        noted.waits.clear()
        *_, last = train(student, lessons, settings, accelerator, tmp_path / CHECKPOINT, every=2)
    assert last.step == 2
    assert noted.mixes == {}
    assert {parameter.device.type for parameter in student.trainable()} == {FAR}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_precision_follows_the_model(dtype: torch.dtype) -> None:
    own = tiny_llama(dtype)
    student = run.make_student(own, SPACE)
    accelerator = run.accelerator_for(own)
    assert accelerator.mixed_precision == {torch.float32: "no", torch.bfloat16: "bf16"}[dtype]
    lessons = student_and(SPACE)[1] if dtype is torch.float32 else [Text(tuple(range(20)))]
    kinds = set()
    name = next(name for name, _ in student.named_modules() if name.endswith("lora_B.default"))
    student.get_submodule(name).register_forward_hook(lambda _m, _i, said: kinds.add(said.dtype))
    with accelerator.autocast():
        student(draw(lessons, SPACE, 0, None, accelerator.device))
    assert kinds == {dtype}


def test_float16_needs_a_gpu(selfdraft: Any, folder: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    one_line(
        selfdraft("train", *options(folder, data, "--dtype", "float16"), "--output", out), "float16 cannot be trained"
    )
    assert not out.exists()


def test_texts_are_held_out_by_lot() -> None:
    lessons = [Text((i, i + 1, *range(8))) for i in range(2000)]
    learned, measured = split(lessons)
    assert sorted([*learned, *measured], key=lessons.index) == lessons
    assert 20 <= len(measured) <= 60
    assert split(list(reversed(lessons)))[1] == measured[::-1], "whatever else is there"
    few = learned[:5]
    learned, measured = split([*few, *few])
    assert len(measured) == 2, "one, and its double"
    assert measured[0] == measured[1]
    assert not {*learned} & {*measured}
    assert split(few[:1]) == (few[:1], few[:1])


def encode(text: str) -> list[int]:
    return list(text.encode())


def test_nothing_of_a_text_is_lost(tmp_path: Path) -> None:
    """But a tail of less than 8 tokens, and the beginning of a prompt that leaves no room for the answer."""
    path = tmp_path / "story.txt"
    path.write_text("".join(chr(97 + i % 26) for i in range(107)))
    pieces = read_texts([path], encode, 25)
    assert [len(piece.tokens) for piece in pieces] == [25, 25, 25, 25]
    assert bytes(token for piece in pieces for token in piece.tokens) == path.read_bytes()[:100]
    records = tmp_path / "records.jsonl"

    def read(prompt: int, answer: int) -> list[Text]:
        ids = list(range(prompt + answer))
        record = {"prompt_token_ids": ids[:prompt], "generated_token_ids": ids[prompt:]}
        records.write_text(json.dumps(record))
        return read_texts([records], encode, 24)

    assert read(15, 9) == [Text(tuple(range(24)), 15)], "what fits is whole"
    assert read(20, 4) == [Text(tuple(range(24)), 0)], "no room for a group behind the prompt"
    assert read(30, 20) == [Text(tuple(range(18, 42)), 12), Text(tuple(range(42, 50)), 0)]
    assert read(4, 30) == [Text(tuple(range(24)), 4), Text(tuple(range(24, 34)), 0)]


def test_what_a_record_is(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text(
        json.dumps([{"instruction": "Say it", "output": "It is said."}, {"text": "no answer"}, {"turns": ["a" * 9]}])
    )
    assert read_texts([path], encode, 99) == [
        Text(tuple(b"Say it\nIt is said."), 6),
        Text(tuple(b"no answer"), 0),
        Text((97,) * 9, 0),
    ]
    assert read_prompts([path], encode) == [encode("Say it"), encode("no answer"), [97] * 9]


def test_the_parts_of_a_step_are_the_step() -> None:
    lessons = [Text(tuple(range(i, i + 9 + i)), start=i % 5) for i in range(12)]
    cpu = torch.device("cpu")
    for step in range(20):
        whole = draw(lessons, SPACE, step, None, cpu)
        assert whole.tokens.shape[0] == 3
        rows = {}
        for part in range(5):  # more processes than texts: two have nothing of their own
            mine = draw(lessons, SPACE, step, None, cpu, part, 5)
            for i, length in enumerate(mine.lengths.tolist()):
                if length:
                    rows[part + 5 * i] = (mine.tokens[i, :length].tolist(), mine.anchors[i].tolist())
                else:
                    assert part >= 3
        assert rows == {
            i: (whole.tokens[i, :length].tolist(), whole.anchors[i].tolist())
            for i, length in enumerate(whole.lengths.tolist())
        }
        for (tokens, anchors), text in (
            (row, next(t for t in lessons if t.tokens == (*row[0],))) for row in rows.values()
        ):
            assert all(max(text.start - 1, 0) <= anchor <= len(tokens) - 2 for anchor in anchors)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_loss_in_plain_words(share: float) -> None:
    noise = torch.Generator().manual_seed(2)
    said, wanted = (torch.randn(9, 7, generator=noise, dtype=torch.float64) for _ in range(2))
    said[0], wanted[1] = wanted[0], said[1] + 1.0  # agreement costs nothing but the hard half
    found = row_losses(said, wanted, share)
    for row in range(9):
        logs, goals = said[row].log_softmax(0), wanted[row].log_softmax(0)
        overlap = float(torch.minimum(logs.exp(), goals.exp()).sum())
        divergence = float((goals.exp() * (goals - logs)).sum())
        early = exp(-3.0 * overlap)
        soft = early * divergence + (1 - early) * (1 - overlap)
        assert float(found[row]) == pytest.approx((1 - share) * soft - share * float(logs[goals.argmax()]), abs=1e-5)
        assert row > 1 or soft == pytest.approx(0.0, abs=1e-9)
    tokens = row_losses(said, wanted.argmax(-1), share)
    torch.testing.assert_close(tokens, row_losses(said, wanted, 1.0))


def test_a_list_of_tokens_stands_for_the_vocabulary() -> None:
    """Losses over it are those over all tokens, but for chance; every likely token is in it, and counts once."""
    noise = torch.Generator().manual_seed(4)
    said, wanted = (torch.randn(6, 40_000, generator=noise) for _ in range(2))
    few = shortlist(wanted, torch.Generator().manual_seed(1))
    assert few is not None
    assert {*wanted.topk(16).indices.flatten().tolist()} <= {*few.ids.tolist()}
    assert len(few.ids) <= 6 * 16 + 2048
    assert float(few.weight.exp().sum()) == pytest.approx(40_000, rel=1e-4)
    whole = row_losses(said, wanted, 0.5)
    short = row_losses(said[:, few.ids], wanted[:, few.ids], 0.5, few.weight)
    torch.testing.assert_close(short, whole, rtol=0.05, atol=0.0)
    assert shortlist(wanted[:, :8192], torch.Generator()) is None, "a small vocabulary is looked at whole"


def test_the_short_list_gives_the_logits_of_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the link, whose shift goes through the same layer."""
    student, lessons, accelerator = student_and(SPACE)
    with torch.no_grad():
        student.link_up.normal_(generator=torch.Generator().manual_seed(3))
    batch = draw(lessons, SPACE, 0, None, accelerator.device)
    few = Shortlist(torch.tensor([3, 5, 11]), torch.tensor([0.0, 0.5, 1.5]))
    monkeypatch.setattr(student_module, "shortlist", lambda wanted, chance: few)
    with torch.no_grad():
        whole, short = student(batch), student(batch, torch.Generator())
    torch.testing.assert_close(short.said, whole.said[:, few.ids], rtol=0, atol=1e-5)
    torch.testing.assert_close(short.wanted, whole.wanted[:, few.ids], rtol=0, atol=1e-5)
    assert short.weight is few.weight


def test_logits_that_are_more_than_a_product_are_taken_whole() -> None:
    """Gemma 2 bends its logits: there the model's own answer is what is learned from."""
    bent, plain = (Head.of(one) for one in (model_of("gemma2"), tiny_llama()))
    assert bent is None
    assert plain is not None


@pytest.mark.parametrize(("thinning", "sizes"), [(1.0, (3, 3, 3, 3)), (0.5, (3, 2, 1, 1)), (1e-9, (3, 1, 1, 1))])
def test_sizes_of_groups(thinning: float, sizes: tuple[int, ...]) -> None:
    assert replace(SPACE, masks=3, thinning=thinning).sizes(4) == sizes


@pytest.mark.parametrize(("modules", "count"), [("all", 7), ("attention", 4), ("output", 1)])
def test_layers_with_an_adapter(modules: Any, count: int, tmp_path: Path) -> None:
    settings = replace(SPACE, modules=modules)
    student = run.make_student(tiny_llama(), settings)
    output.write_adapter(tmp_path, student, tiny_llama(), settings, {})
    layers = load_adapter(tmp_path, tiny_llama()).layers
    assert len(layers) == 4 * count
    assert modules != "output" or all(path.endswith("o_proj") for path in layers)


def test_acceptance_is_counted() -> None:
    """Against a plain count over the same groups; rows behind the end of a text do not count."""
    settings = replace(SPACE, groups=40)
    student, lessons, accelerator = student_and(settings)
    right, total = [0, 0], [0, 0]
    for number in range(loop.HELD_OUT_BATCHES):
        batch = draw(lessons, replace(settings, thinning=1.0), -1 - number, None, accelerator.device)
        with torch.no_grad():
            answers = student(batch)
        named = torch.cat([answers.groups, answers.places[:, None]], 1).tolist()
        said = {tuple(name): row for name, row in zip(named, answers.said, strict=True)}
        for i, length in enumerate(batch.lengths.tolist()):
            with torch.no_grad():
                stock = tiny_llama()(batch.tokens[i : i + 1, :length]).logits[0]
            for group, anchor in enumerate(batch.anchors[i].tolist()):
                for j in range(2):
                    if anchor + j + 1 < length - 1:
                        total[j] += 1
                        right[j] += int(said[i, group, j].argmax() == stock[anchor + j + 1].argmax())
    assert 0 < sum(right) < sum(total)
    found = measure(student, lessons, settings, None, accelerator)
    assert found == pytest.approx([r / t for r, t in zip(right, total, strict=True)])


MISTAKES: dict[str, tuple[dict[str, object], str]] = {
    "steps 0": ({"steps": 0}, "steps=0 is out of range: it must be at least 1"),
    "masks 0": ({"masks": 0}, "masks=0 is out of range: it must be at least 1, at most 32"),
    "masks 99": ({"masks": 99}, "masks=99 is out of range"),
    "groups 0": ({"groups": 0}, "groups=0 is out of range"),
    "groups absurd": ({"groups": 10**9}, "groups=1000000000 is out of range: it must be at least 1, at most 4096"),
    "batch 0": ({"batch_size": 0}, "batch_size=0 is out of range"),
    "batch absurd": ({"batch_size": 10**9}, "batch_size=1000000000 is out of range"),
    "rank -1": ({"rank": -1}, "rank=-1 is out of range: it must be at least 0"),
    "rank absurd": ({"rank": 10**6}, "rank=1000000 is out of range"),
    "link absurd": ({"link": 10**6}, "link=1000000 is out of range"),
    "rate nan": ({"learning_rate": "nan"}, "learning_rate=nan is not a number"),
    "rate 0": ({"learning_rate": 0}, "learning_rate=0.0 is out of range: it must be above 0.0"),
    "rate negative": ({"learning_rate": "-1e-3"}, "learning_rate=-0.001 is out of range"),
    "rate inf": ({"learning_rate": "inf"}, "learning_rate=inf is out of range"),
    "hard share": ({"hard_share": 1.5}, "hard_share=1.5 is out of range"),
    "seed": ({"seed": 10**30}, "is out of range"),
    "seed -1": ({"seed": -1}, "seed=-1 is out of range"),
    "short": ({"max_length": 4}, "max_length=4 is out of range: it must be at least 16"),
    "long": (
        {"max_length": 5000},
        "max_length=5000 with 2 masks does not fit into the context of 256; give --max-length",
    ),
    "every 0": ({"every": 0}, "'--every': Input should be greater than or equal to 1"),
    "no number": ({"steps": "many"}, "'--steps': Input should be a valid integer"),
    "widths of space": ({"skip_widths": 2}, "skip_widths belongs to recipe 's3d'"),
    "widths": ({"recipe": "s3d", "skip_widths": "2,x"}, "--skip-widths '2,x' is not a list of whole numbers"),
    "wide": ({"recipe": "s3d", "skip_widths": 4}, "skip_width=4 is out of range: it must be at least 1, at most 3"),
    "thinning": ({"thinning": 0}, "thinning=0.0 is out of range: it must be above 0.0"),
    "modules": ({"modules": "some"}, "'some' is not one of"),
    "recipe": ({"recipe": "medusa"}, "'medusa' is not one of"),
    "dtype": ({"dtype": "int3"}, "dtype 'int3' is unknown"),
    "model": ({"model": "/nowhere/at/all"}, "there is no such folder"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(selfdraft: Any, folder: Path, data: Path, tmp_path: Path, name: str) -> None:
    changes, words = MISTAKES[name]
    out = tmp_path / "out"
    one_line(selfdraft("train", "--output", out, *options(folder, data, **changes)), words)
    assert not out.exists()


FLAGS: dict[str, tuple[SequenceOf[object], str]] = {
    "tuned s3d": (["--sar-sft", "--recipe", "s3d"], "sar_sft belongs to recipe 'space'"),
    "tuned bare": (["--sar-sft", "--rank", 0], "rank=0 leaves nothing to tune"),
    "hot": ([*DISTILL, "--distill-temperature", "nan"], "distill_temperature=nan is not a number"),
    "cold": (
        [*DISTILL, "--distill-temperature", 0],
        "distill_temperature=0.0 is out of range: it must be above 0.0",
    ),
    "no room": (["--distill", "--distill-tokens", 41], "distill_tokens=41 leaves no room for a prompt"),
    "no start": (["--start-from", "/nowhere"], "start_from='/nowhere' is no folder that 'selfdraft train' has written"),
    "none comes": (["--start-from", "bundled"], "start_from='bundled': no adapter for this model comes with selfdraft"),
    "tuned start": (["--start-from", "bundled", "--sar-sft"], "sar_sft tunes the model itself"),
}


@pytest.mark.parametrize("name", FLAGS)
def test_more_mistakes(selfdraft: Any, folder: Path, data: Path, tmp_path: Path, name: str) -> None:
    flags, words = FLAGS[name]
    one_line(selfdraft("train", "--output", tmp_path / "out", *options(folder, data, *flags)), words)
    assert not (tmp_path / "out").exists()


DATA: dict[str, tuple[str, bytes | None, str]] = {
    "missing": ("a.jsonl", None, "cannot be read: No such file or directory"),
    "missing text": ("a.txt", None, "there is no data file"),
    "empty": ("a.jsonl", b"", "no text of at least 8 tokens in there"),
    "empty text": ("a.txt", b"", "no text of at least 8 tokens in there"),
    "blank lines": ("a.jsonl", b"\n\n \n", "no text of at least 8 tokens in there"),
    "short": ("a.txt", b"a b", "no text of at least 8 tokens in there"),
    "broken line": ("a.jsonl", b'{"text": "abcdefghij"}\n{"text": \n', "a.jsonl:2: broken JSON"),
    "no record": (
        "a.jsonl",
        b'{"text": "abcdefghij"}\n\n{"name": "x"}\n',
        "a.jsonl:3: no prompt; a record needs one of",
    ),
    "a list": ("a.jsonl", b"[1]\n", "a.jsonl:1: a record must be an object"),
    "no ids": (
        "a.jsonl",
        b'{"prompt_token_ids": "x", "generated_token_ids": [1]}',
        "a.jsonl:1: prompt_token_ids is not",
    ),
    "odd id": (
        "a.jsonl",
        b'{"prompt_token_ids": [1], "generated_token_ids": [2, 300]}',
        "a.jsonl:1: 300 in generated_token_ids is no token id below 300",
    ),
    "no UTF-8": ("a.txt", b"abc\xff\xfe", "is not UTF-8 text"),
    "no gzip": ("a.jsonl.gz", b"abc", "is a broken gzip file"),
}


@pytest.mark.parametrize("distill", [False, True], ids=["given", "distilled"])
@pytest.mark.parametrize("name", DATA)
def test_data_that_cannot_be_read(selfdraft: Any, folder: Path, tmp_path: Path, name: str, distill: bool) -> None:
    file, content, words = DATA[name]
    path, out = tmp_path / file, tmp_path / "out"
    if content is not None:
        path.write_bytes(content)
    if distill:
        words = words.replace("no text of at least 8 tokens in there", "no record with one of prompt, turns")
        words = words.replace("300 in generated_token_ids is no token id below 300", "no prompt; a record needs")
        words = "not plain text" if file.endswith(".txt") else words
    done = selfdraft("train", "--output", out, *options(folder, path, *(DISTILL if distill else ())))
    if name == "odd id" and distill:  # only its prompt is read
        assert done.code == 0
        return
    one_line(done, words)
    assert not out.exists()
    assert {entry.name for entry in tmp_path.iterdir()} <= {file}


def test_an_output_that_cannot_be_made(selfdraft: Any, folder: Path, data: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    for out in (file, file / "deeper"):
        one_line(selfdraft("train", "--output", out, *options(folder, data)), f"{file} is a file")
    for more in ([], DISTILL):
        one_line(selfdraft("train", "--output", "/proc/out", *options(folder, data, *more)), "cannot be made")
    if os.geteuid():
        (tmp_path / "locked").mkdir(mode=0o500)
        one_line(selfdraft("train", "--output", tmp_path / "locked" / "x", *options(folder, data)), "is not writable")
    assert file.read_text() == "mine"


def test_an_output_that_holds_another_adapter(
    selfdraft: Any, folder: Path, data: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    assert selfdraft("train", "--output", tmp_path, *options(folder, data, steps=1)).code == 0
    before = killing.contents(tmp_path)
    one_line(
        selfdraft("train", "--output", tmp_path, *options(folder, data, steps=2)),
        "holds a finished adapter that was trained with steps=1, not 2; choose another --output",
    )
    other = tmp_path_factory.mktemp("other")
    stranger = copy.deepcopy(model())
    stranger.get_input_embeddings().weight.data.mul_(2)
    stranger.save_pretrained(other)
    tokenizer().save_pretrained(other)
    one_line(
        selfdraft("train", "--output", tmp_path, *options(other, data, steps=1)),
        "holds a finished adapter of another model; choose another --output",
    )
    one_line(
        selfdraft("generate", "hi", "--model", other, "--drafter", "space", "--adapter", tmp_path),
        "this adapter was trained for another model",
    )
    assert killing.contents(tmp_path) == before


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file can grow beyond `size` bytes."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def fill_at(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, size: int, calls: int = 0) -> None:
    """The disk is full while `name` runs, from its call number `calls` on."""
    real, count = getattr(module, name), [0]

    def limited(*arguments: Any, **named: Any) -> Any:
        count[0] += 1
        if count[0] <= calls:
            return real(*arguments, **named)
        with full_disk(size):
            return real(*arguments, **named)

    def limited_steps(*arguments: Any) -> Iterator[Any]:
        with full_disk(size):
            yield from real(*arguments)

    monkeypatch.setattr(module, name, limited_steps if inspect.isgeneratorfunction(real) else limited)


PLACES: dict[str, tuple[Any, str, int, int, SequenceOf[str], str]] = {
    "first checkpoint": (loop, "save", 0, 0, [], "training.pt cannot be written"),
    "third checkpoint": (loop, "save", 20_000, 2, [], "training.pt cannot be written"),
    "adapter": (run, "write_adapter", 0, 0, [], "the adapter cannot be written into"),
    "adapter's tensors": (run, "write_adapter", 5_000, 0, [], "the adapter cannot be written into"),
    "model": (run, "write_model", 5_000, 0, ["--sar-sft"], "the model cannot be written into"),
    "masks of a model": (run, "write_adapter", 0, 0, ["--sar-sft"], "the adapter cannot be written into"),
    "own texts": (
        texts,
        "_append_own",
        700,
        0,
        DISTILL,
        "own_texts.jsonl cannot be written: File too large; what it holds",
    ),
    "origin": (texts, "_check_origin", 5, 0, DISTILL, "own_texts.jsonl cannot be written: File too large"),
}


@pytest.mark.parametrize("name", PLACES)
def test_a_full_disk(
    selfdraft: Any, folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """One line; nothing that could be taken for a result; with room again it goes on and ends as undisturbed."""
    module, function, size, calls, more, words = PLACES[name]
    asked = options(folder, data, *more)
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert selfdraft("train", "--output", whole, *asked).code == 0
    with monkeypatch.context() as patched:
        fill_at(patched, module, function, size, calls)
        done = selfdraft("train", "--output", out, *asked)
    *reports, complaint = done.err.splitlines()
    assert done.code == 2
    assert complaint.startswith("error: ")
    assert words in complaint
    assert all(report.startswith("step ") for report in reports)
    assert not {*names(out)} - {CHECKPOINT, *OWN} - {file for file in names(out) if file.startswith("model/")}
    assert not (out / "unfinished").exists()
    assert CARD not in names(out)
    one_line(
        selfdraft("generate", "hi", "--model", folder, "--drafter", "space", "--adapter", out),
        "training has not ended" if CHECKPOINT in names(out) else f"{CARD} is missing",
    )
    assert selfdraft("train", "--output", out, *asked).code == 0
    assert killing.contents(out) == killing.contents(whole)


@pytest.mark.parametrize("number", range(4))
def test_a_renaming_that_fails(
    selfdraft: Any, folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    rename, count = os.replace, [0]

    def replace(source: Any, goal: Any) -> None:
        count[0] += 1
        if count[0] == number + 3:  # behind two checkpoints: the third, then the adapter's files
            raise OSError(28, "No space left on device")
        rename(source, goal)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", replace)
        done = selfdraft("train", "--output", tmp_path, *options(folder, data))
    assert done.code == 2
    assert done.err.splitlines()[-1].startswith("error: the ")
    assert "No space left on device" in done.err
    assert CARD not in names(tmp_path)
    assert not {file for file in names(tmp_path) if "part" in file or "unfinished" in file}
    assert selfdraft("train", "--output", tmp_path, *options(folder, data)).code == 0
    assert names(tmp_path) == FILES


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_checkpoint_on_a_full_device(selfdraft: Any, folder: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "training.part").symlink_to("/dev/full")
    one_line(selfdraft("train", "--output", tmp_path, *options(folder, data)), "training.pt cannot be written")
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (
            lambda *_: torch.tensor([torch.nan]),
            "the loss is nan: give a lower --learning-rate than 0.003",
        ),
        (lambda *_: torch.empty(2**50), "do not fit into memory; lower --groups, --batch-size or --max-length"),
    ],
)
def test_a_step_that_fails(
    selfdraft: Any, folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Any, words: str
) -> None:
    monkeypatch.setattr(loop, "row_losses", fault)
    one_line(selfdraft("train", "--output", tmp_path / "out", *options(folder, data)), words)
    assert names(tmp_path / "out") == set()


def test_train_extra_is_named(
    selfdraft: Any, folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    one_line(selfdraft("train", "--output", tmp_path / "out", *options(folder, data)), "pip install 'selfdraft[train]'")
    assert not (tmp_path / "out").exists()


def test_what_a_kill_leaves_is_tidied(tmp_path: Path) -> None:
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / CARD).write_text("{}")
    (tmp_path / CHECKPOINT).touch()
    (tmp_path / CARD).write_text("{}")
    output.tidy(tmp_path)
    assert names(tmp_path) == {CARD}
