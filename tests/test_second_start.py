"""The second start: the kept pass over mapped weights has the bits of the first one; what is odd is passed over."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import selfdraft
from selfdraft import LLM, SamplingParams
from selfdraft.core.rows import pack
from selfdraft.core.sequence import Sequence
from selfdraft.core.tree import EMPTY, Draft
from selfdraft.drafters import table
from selfdraft.drafting.cost_model import Profile
from selfdraft.errors import LoadError, RunnerUnavailable
from selfdraft.files.arrays import read_arrays, write_arrays
from selfdraft.files.atomic import cache_folder
from selfdraft.models.facts import Stock
from selfdraft.models.load import load_model
from selfdraft.models.pocket import POCKET
from selfdraft.models.runner import kernel_build
from selfdraft.models.runner.packing import Packer
from selfdraft.models.start import opening, tape_file
from selfdraft.models.start.weights import MappedWeights
from selfdraft.models.target import HFTarget
from tests.smollm2 import smollm2_or_skip
from tests.test_families import FAMILIES, build

HEAVY = ("transformers.modeling_utils", "transformers.models.llama.modeling_llama", "torch._dynamo", "sympy")
"""Modules that the stock model needs, and a kept start does not."""
PROMPT = "Once upon a time there was a little"
GREEDY = SamplingParams(max_tokens=24)


def compiled() -> bool:
    try:
        kernel_build.library()
    except RunnerUnavailable:
        return False
    return True


pytestmark = pytest.mark.skipif(not compiled(), reason="there is no C++ compiler on this machine")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of this test's own, but for the built kernels, and the folder of kept starts in it."""
    kernels = tmp_path / "cache" / "kernels"
    kernels.parent.mkdir()
    real = cache_folder("kernels").resolve()
    real.mkdir(parents=True, exist_ok=True)
    kernels.symlink_to(real)
    monkeypatch.setenv("SELFDRAFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "starts"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the pocket model that a test may change."""
    copied = tmp_path / "pocket"
    shutil.copytree(POCKET, copied, ignore=shutil.ignore_patterns("__pycache__"))
    return copied


def opened(model: str | Path, **options: object) -> LLM:
    return LLM(model, **{"drafter": "none", "max_num_seqs": 2, **options})  # type: ignore[arg-type]


def from_kept(llm: LLM) -> bool:
    """Whether the stock model has not been loaded."""
    return not llm._stock.loaded


def logits_of(target: HFTarget) -> list[Tensor]:
    """Of a prompt, of the next token, and of a tree behind it."""
    tokens = [(11 * i + 5) % target.vocab for i in range(20)]
    sequence = Sequence(tokens, len(tokens), SamplingParams(max_tokens=4), slot=1)
    said = [target.forward(pack([(sequence, 19, EMPTY)]))]
    sequence.num_cached = 19
    said.append(target.forward(pack([(sequence, 1, EMPTY)])))
    tree = Draft.branches([[5, 6, 7], [5, 8], [9]], "test")
    said.append(target.forward(pack([(sequence, 1, tree)])))
    for masks in target.extras.mask_tokens.values():
        probed = tree.with_probes(masks.ids, [-4, *range(len(masks.ids) - 1)], "test")
        said.append(target.forward(pack([(sequence, 1, probed)])))
        shift = masks.shift(tokens[3], torch.arange(5, 30))
        said += [] if shift is None else [shift]
    return said


def same_bits(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def text_of(llm: LLM, prompt: str = PROMPT) -> str:
    return llm.generate(prompt, GREEDY)[0].outputs[0].text


SCRIPT = """
import json, sys
from selfdraft.cli import main
options = ["--model", sys.argv[1], "--chat", "--max-new-tokens", "8", "--json"]
sys.argv = ["selfdraft", "generate", "Why is the sky blue?", *options]
try:
    main()
except SystemExit as end:
    assert not end.code
print(json.dumps(sorted(sys.modules)))
"""


def run(model: str | Path) -> tuple[str, set[str]]:
    """(the answer of the command line, all modules that it took) in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(model)],
        env={**os.environ, "PYTHONPATH": str(Path(selfdraft.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=True,
    )
    answer, modules = done.stdout.strip().splitlines()
    return json.loads(answer)["results"][0]["text"], set(json.loads(modules))


def test_the_default_drafter_needs_no_stock_model_on_a_slow_machine(
    cache: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where rows are dear, too, masks are left out, and what is left might draft."""
    slow = Profile((1, 64), (0.1, 6.4), (0.0, 0.0))
    monkeypatch.setattr("selfdraft.llm.profile_of", lambda *_, **__: slow)
    for _ in range(2):
        llm = opened(folder, drafter="auto")
        assert llm.target.profile is slow
        text_of(llm)
    assert from_kept(llm)


def test_a_second_start_takes_no_modelling_code(cache: Path, folder: Path) -> None:
    first, taken = run(folder)
    assert set(HEAVY) <= taken
    again, taken = run(folder)
    assert taken.isdisjoint(HEAVY)
    assert first == again


@pytest.mark.parametrize("name", ["pocket", "smollm2"])
def test_bits_are_equal(cache: Path, name: str) -> None:
    model = smollm2_or_skip() if name == "smollm2" else POCKET
    first, second = opened(model), opened(model)
    assert not from_kept(first)
    assert from_kept(second)
    assert second.target.num_mask_ids > 0
    assert same_bits(logits_of(first.target), logits_of(second.target))
    assert from_kept(second)
    assert (first.exactness, first.eos, first.target.runs) == (second.exactness, second.eos, second.target.runs)
    assert first.target.facts == second.target.facts
    assert first.fingerprint == second.fingerprint
    assert first.default_sampling_params() == second.default_sampling_params()


def test_the_trial_of_bits_can_tell(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight that is one row off is seen before anything is written."""
    right = tape_file._seen

    def wrong(whole: Tensor, skip: int, dtype: str, shape: list[int], steps: list[int]) -> Tensor:
        return right(whole, skip, dtype, shape, steps).roll(1, 0)

    monkeypatch.setattr(tape_file, "_seen", wrong)
    opened(POCKET)
    assert not cache.exists()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", [name for name, one in FAMILIES.items() if not one.experts])
def test_families(tmp_path: Path, name: str, dtype: str) -> None:
    one = FAMILIES[name]
    build(one.config, one.options, one.model, getattr(torch, dtype)).save_pretrained(tmp_path)
    model = load_model(tmp_path, dtype=None)
    try:
        target = HFTarget(model, slots=2, fast=True)
    except RunnerUnavailable as error:
        pytest.skip(str(error))
    assert target.traced is not None
    assert target.runner is not None
    kept = tape_file.packed(target.traced, model, MappedWeights(tmp_path), target.runner.packer)
    traced = tape_file.unpacked(kept, MappedWeights(tmp_path), packer := Packer())
    again = HFTarget(Stock.of(model), slots=2, fast=True, traced=traced, packer=packer)
    assert same_bits(logits_of(target), logits_of(again))


MODEL_READERS = {"layer_skip", "s3d"}
"""Drafters whose passes are other views of the stock model."""
COPIES = {"quantised", "cascade"}
"""Those that make their view when they are made, unless an earlier start has kept it."""
DRAFTERS = [name for name in table() if name != "prediction"]


def test_every_drafter_says_the_same(cache: Path) -> None:
    opened(POCKET)
    plain = text_of(opened(POCKET, cache=False))
    for name in DRAFTERS:
        first = name in COPIES and not [*(cache.parent / "copies").glob("*")]
        llm = opened(POCKET, drafter=name)
        assert from_kept(llm) == (not first), name
        assert text_of(llm) == plain, name
        assert from_kept(llm) == (name not in MODEL_READERS and not first), name


def test_the_stock_model_comes_late_over_the_same_weights(cache: Path) -> None:
    opened(POCKET)
    llm = opened(POCKET)
    before = logits_of(llm.target)
    model = llm.model
    assert not from_kept(llm)
    assert llm.target.traced is not None
    addresses = {tensor.data_ptr() for tensor in llm.target.traced.tape.kept}
    assert {weight.data_ptr() for weight in model.parameters()} <= addresses
    assert not any(weight.is_inference() for weight in model.parameters())
    assert same_bits(before, logits_of(llm.target))
    assert same_bits(before, logits_of(HFTarget(model, slots=2, fast=True, adapters=llm.target.adapters)))


def test_a_checkpoint_that_changed_meanwhile_is_not_taken(cache: Path, folder: Path) -> None:
    opened(folder)
    llm = opened(folder)
    assert from_kept(llm)
    touched(folder / "model.safetensors")
    with pytest.raises(LoadError, match="have changed since it was opened"):
        _ = llm.model


def touched(file: Path) -> None:
    """Change one weight, and nothing else that can be seen from outside."""
    about = file.stat()
    with file.open("r+b") as opened_file:
        opened_file.seek(about.st_size // 4 * 2)  # amid the weights of a layer: adapters know their model by its norms
        opened_file.write(b"\x00\x42")
    os.utime(file, ns=(about.st_atime_ns, about.st_mtime_ns))
    assert file.stat().st_size == about.st_size


def test_a_changed_weight_is_noticed(cache: Path, folder: Path) -> None:
    opened(folder)
    touched(folder / "model.safetensors")
    llm = opened(folder)
    assert not from_kept(llm)
    assert same_bits(logits_of(llm.target), logits_of(opened(folder, cache=False).target))
    assert from_kept(opened(folder)), "and it is kept anew"


def test_a_changed_configuration_is_noticed(cache: Path, folder: Path) -> None:
    before = opened(folder).eos
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": 77}))
    assert opened(folder).eos == before | {77}


def test_a_file_that_is_missing_is_an_error_as_before(cache: Path, folder: Path) -> None:
    opened(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(LoadError, match="the weights are missing"):
        opened(folder)


def test_weights_that_do_not_fit_are_an_error_as_before(cache: Path, folder: Path) -> None:
    opened(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 13}))
    with pytest.raises(LoadError, match="the configuration says 13 layers and the file has 12"):
        opened(folder)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def flipped(file: Path) -> None:
    held = bytearray(file.read_bytes())
    held[len(held) // 2] ^= 1
    file.write_bytes(bytes(held))


def emptied(file: Path) -> None:
    file.write_bytes(b"")


def other(part: str, change: Callable[[object], object]) -> Callable[[Path], None]:
    """A whole file with other facts in it."""

    def written(file: Path) -> None:
        found = read_arrays(file)
        assert found is not None
        facts, arrays = found
        facts[part] = change(facts[part])
        write_arrays(file, facts, arrays)

    return written


def elsewhere(file: Path) -> None:
    """A whole file whose pointers point behind the weights."""
    found = read_arrays(file)
    assert found is not None
    facts, arrays = found
    for _, place in facts["tape"]["weights"]:
        place["start"] += 1 << 40
    write_arrays(file, facts, arrays)


def outside(file: Path) -> None:
    """A whole file with a pointer behind its tensor."""
    found = read_arrays(file)
    assert found is not None
    facts, arrays = found
    arrays["pointers"][3, 2] += 1 << 30
    write_arrays(file, facts, arrays)


ODD: dict[str, Callable[[Path], None]] = {
    "cut": cut,
    "flipped": flipped,
    "emptied": emptied,
    "gone": Path.unlink,
    "version": other("identity", lambda identity: {**identity, "torch": "0.1"}),  # type: ignore[dict-item]
    "adapters": other("adapters", lambda _: []),
    "facts": other("facts", lambda _: {}),
    "proof": other("proof", lambda _: None),
    "tokenizer": other("tokenizer", lambda _: ["transformers.nowhere", "Nothing"]),
    "elsewhere": elsewhere,
    "outside": outside,
}


@pytest.mark.parametrize("oddity", ODD)
def test_what_is_odd_is_passed_over_and_written_anew(cache: Path, oddity: str) -> None:
    right = logits_of(opened(POCKET).target)
    (file,) = cache.iterdir()
    ODD[oddity](file)
    llm = opened(POCKET)
    assert not from_kept(llm)
    assert same_bits(right, logits_of(llm.target))
    assert from_kept(opened(POCKET))
    assert [*cache.iterdir()] == [file]


def test_options_have_starts_of_their_own(cache: Path) -> None:
    opened(POCKET)
    assert not from_kept(opened(POCKET, exactness="token"))
    assert opened(POCKET, exactness="token").exactness.level == "token"
    assert opened(POCKET).exactness.level == "bitwise"
    assert opened(POCKET, max_model_len=64).target.max_length == 64
    assert opened(POCKET, max_model_len=64).target.max_length == 64
    assert opened(POCKET).target.max_length > 64


@pytest.mark.parametrize("options", [{"cache": False}, {"runner": "plain"}, {"dtype": "float32"}])
def test_starts_that_are_not_kept(cache: Path, options: dict[str, object]) -> None:
    """Without the cache, without a tape, and where the files hold weights of another type."""
    opened(POCKET, **options)
    assert not cache.exists()
    opened(POCKET)
    assert not from_kept(opened(POCKET, **options))


def test_a_cache_that_cannot_be_written_is_none(cache: Path) -> None:
    cache.write_text("a file where the folder would be")
    assert text_of(opened(POCKET)) == text_of(opened(POCKET))


def test_the_tokenizer_is_the_same(cache: Path) -> None:
    first, second = (opened(POCKET).tokenizer for _ in range(2))
    assert first is not None
    assert second is not None
    assert type(first) is type(second)
    assert opening._traits(first) == opening._traits(second)
