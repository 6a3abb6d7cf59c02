"""The proof at load: a right model is never refused, whatever it rounds; a wrong one always is. What is kept of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from selfdraft.errors import RunnerUnavailable, UnsupportedModel
from selfdraft.models import load
from selfdraft.models.attention import Scores
from selfdraft.models.identity import base_hash, config_hash, weights_hash, whole_hash
from selfdraft.models.load import load_model, open_target
from selfdraft.models.proof.kept import ProofStore, Record
from selfdraft.models.proof.whole_model import Report, prove
from selfdraft.models.proof.wide import Wide
from selfdraft.models.runner import kernel_build
from selfdraft.models.runner.trace_ops import Recorder
from selfdraft.models.target import HFTarget
from tests.models import tiny_llama
from tests.smollm2 import smollm2_or_skip
from tests.test_families import FAMILIES, build
from tests.wrongs import outliers, wrongs_of

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def family(name: str, dtype: str) -> PreTrainedModel:
    """A tiny member of a family with outliers."""
    one = FAMILIES[name]
    return outliers(build(one.config, one.options, one.model, torch.float32)).to(DTYPES[dtype])


def planted(model: PreTrainedModel, wrong: str) -> None:
    """Prove with a mistake in it; says which one was not seen."""
    prove(HFTarget(model), model)
    pytest.fail(f"{wrong} was not refused")


def compiled() -> bool:
    try:
        kernel_build.library()
    except RunnerUnavailable:
        return False
    return True


def target_of(model: PreTrainedModel) -> HFTarget:
    """On the fast runner where that works."""
    try:
        return HFTarget(model, fast=compiled())
    except RunnerUnavailable:
        return HFTarget(model)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FAMILIES)
def test_outliers_are_not_refused(name: str, dtype: str) -> None:
    model = family(name, dtype)
    if dtype == "float16" and not bool(model(torch.tensor([[7, 7, 3]])).logits.isfinite().all()):
        with pytest.raises(UnsupportedModel, match="overflows in float16: its own logits are not finite"):
            prove(HFTarget(model), model)
        return
    report = prove(HFTarget(model), model)
    assert report.exact is not None, "the wide pass works for every family"
    assert report.exact < 0.01
    if compiled() and not FAMILIES[name].experts and dtype != "float16":
        blocks = prove(HFTarget(model, fast=True), model).blocks
        assert blocks is not None
        assert blocks < 0.5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FAMILIES)
def test_wrongs_are_refused(name: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = family(name, dtype)
    for wrong, plant in wrongs_of(model).items():
        with monkeypatch.context() as patch:
            plant(patch)
            with pytest.raises(UnsupportedModel):
                planted(model, wrong)


RUNNER: dict[str, tuple[str, Callable[[list[Any]], None]]] = {
    "window": ("mistral", lambda told: told.__setitem__(4, told[4] + 1)),
    "scale": ("llama", lambda told: told.__setitem__(5, told[5] * 1.01)),
    "cap": ("gemma2", lambda told: told.__setitem__(6, 5.0)),
    "keys": ("qwen3", lambda told: told.__setitem__(2, told[3])),
}


@pytest.mark.skipif(not compiled(), reason="there is no C++ compiler on this machine")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("wrong", RUNNER)
def test_wrongs_of_the_runner_are_refused(wrong: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, change = RUNNER[wrong]
    model = family(name, dtype)
    right = Recorder.attend

    def attend(recorder: Recorder, *given: Any) -> Tensor:
        *operands, scores = given
        told = [*operands, scores.window, scores.scale, scores.cap, scores.sinks]
        change(told)
        layer, query, key, value, window, scale, cap, sinks = told
        said = right(recorder, layer, query, key, value, Scores(scale, window, cap, sinks))
        recorder.calls[-1] = (given[0], scores.window)
        return said

    monkeypatch.setattr(Recorder, "attend", attend)
    with pytest.raises(UnsupportedModel, match=r"computes block 0 otherwise|in its own dtype"):
        prove(HFTarget(model, fast=True), model)
    monkeypatch.undo()
    assert prove(HFTarget(model, fast=True), model).blocks is not None


@pytest.mark.parametrize("dtype", DTYPES)
def test_smollm2(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(smollm2_or_skip(), dtype=DTYPES[dtype])
    report = prove(target_of(model) if dtype != "float16" else HFTarget(model), model)
    assert report.exact is not None
    assert report.exact < 0.01
    for wrong, plant in wrongs_of(model).items():
        with monkeypatch.context() as patch:
            plant(patch)
            with pytest.raises(UnsupportedModel, match="in float64"):
                planted(model, wrong)


def test_noise_excuses_only_what_is_as_large() -> None:
    report = Report("Some")
    report.compare("its own dtype", 0.3, 0.1, lambda: 0.1)
    with pytest.raises(UnsupportedModel, match=r"differ by 0\.5 of their spread, and only 0\.4 would be rounding"):
        report.compare("its own dtype", 0.5, 0.1, lambda: 0.1)
    with pytest.raises(UnsupportedModel):
        report.compare("float64", float("nan"), 1e-6, lambda: 1e-14)


@torch.inference_mode()
def test_wide_is_the_float64_model() -> None:
    """Whatever dtype the code names: the same weights in float64 say the same."""
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    model = tiny_llama(torch.bfloat16)
    with Wide(torch.float64):
        said = model(ids, use_cache=False).logits
    weights = [parameter.dtype for parameter in model.parameters()]
    assert (said.dtype, {*weights}) == (torch.float64, {torch.bfloat16})
    twin = type(model)(model.config).double().eval()
    twin.load_state_dict({name: weight.double() for name, weight in model.state_dict().items()})
    torch.testing.assert_close(said, twin(ids, use_cache=False).logits, rtol=1e-5, atol=1e-6)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A line for every proof and every trial of blocks."""
    done: list[str] = []
    for name in ("prove", "probe_fast", "probe_shapes"):
        right = getattr(load, name)

        def noted(*given: Any, name: str = name, right: Callable[..., Any] = right) -> Any:
            done.append(name)
            return right(*given)

        monkeypatch.setattr(load, name, noted)
    return done


def test_the_second_start_proves_nothing(tmp_path: Path, counted: list[str]) -> None:
    model, store = tiny_llama(torch.float32), ProofStore(tmp_path)
    for runner in ("auto", "plain"):
        first = open_target(model, slots=1, runner=runner, proofs=store)
        assert "prove" in counted
        counted.clear()
        again = open_target(model, slots=2, runner=runner, proofs=store)
        assert counted == []
        assert (again.exactness, again.shapes, again.runs) == (first.exactness, first.shapes, first.runs)
        assert (again.runner is None) == (first.runner is None)
    open_target(model, slots=1, exactness="token", proofs=store)
    assert counted, "another level is another proof"
    counted.clear()
    open_target(model, slots=1)
    assert counted, "without a store nothing is read"


def test_another_model_is_proved_itself(tmp_path: Path, counted: list[str]) -> None:
    store = ProofStore(tmp_path)
    open_target(tiny_llama(torch.float32), slots=1, proofs=store)
    for other in (tiny_llama(torch.float32, seed=1), tiny_llama(torch.bfloat16)):
        counted.clear()
        open_target(other, slots=1, proofs=store)
        assert "prove" in counted
    assert len([*tmp_path.iterdir()]) == 3


def test_each_hash_of_a_model_answers_its_own_question() -> None:
    """What a change makes useless, of all that is kept by the names in `identity.py`."""
    hashes = {"config": config_hash, "base": base_hash, "weights": weights_hash, "whole": whole_hash}

    def noticed(change: Callable[[PreTrainedModel], object]) -> set[str]:
        model = build("Llama", {}, dtype=torch.float32)
        before = {name: of(model) for name, of in hashes.items()}
        with torch.no_grad():
            change(model)
        return {name for name, of in hashes.items() if of(model) != before[name]}

    assert noticed(lambda model: model.eval()) == set()
    assert noticed(lambda model: setattr(model.config, "_name_or_path", "elsewhere")) == set()
    assert noticed(lambda model: setattr(model.config, "rms_norm_eps", 1e-2)) == {"config", "whole"}
    assert noticed(lambda model: model.model.layers[0].mlp.up_proj.weight.mul_(2)) == {"weights", "whole"}
    assert noticed(lambda model: model.model.norm.weight.mul_(2)) == {"base", "weights", "whole"}
    assert noticed(lambda model: model.double()) == {"weights", "whole"}


def test_hash_sees_weights_configuration_and_modules() -> None:
    def changed(change: Callable[[PreTrainedModel], None]) -> str:
        model = build("Llama", {}, dtype=torch.float32)
        with torch.no_grad():
            change(model)
        return whole_hash(model)

    def other_head(model: PreTrainedModel) -> None:
        model.lm_head.weight.mul_(1.001)

    def other_norm(model: PreTrainedModel) -> None:
        model.config.rms_norm_eps = 1e-2

    def other_module(model: PreTrainedModel) -> None:
        model.model.layers[1].self_attn = torch.nn.Identity()

    same = changed(lambda _: None)
    assert same == changed(lambda _: None)
    assert len({same, changed(other_head), changed(other_norm), changed(other_module)}) == 4


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"identity": 1}', '{"proof": {"level": "bitwise", "why": "", "shapes": [1]}}']
)
def test_broken_records_are_made_anew(text: str, tmp_path: Path, counted: list[str]) -> None:
    model, store = tiny_llama(torch.float32), ProofStore(tmp_path)
    open_target(model, slots=1, proofs=store)
    (place,) = tmp_path.iterdir()
    whole = json.loads(place.read_text())
    broken = text
    if text.startswith('{"proof"'):
        broken = json.dumps({**whole, **json.loads(text)})
    place.write_text(broken)
    counted.clear()
    open_target(model, slots=1, proofs=store)
    assert "prove" in counted
    assert json.loads(place.read_text()) == whole


def test_an_unwritable_folder_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = ProofStore(tmp_path / "file" / "proofs")
    assert open_target(tiny_llama(torch.float32), slots=1, proofs=store).exactness.level
    assert not store.keep({"a": 1}, Record("token", "", (1, 0, 1), "fast"))


def test_a_refused_model_leaves_no_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(HFTarget, "keep", lambda *_: None)
        with pytest.raises(UnsupportedModel):
            open_target(tiny_llama(torch.float32), slots=1, proofs=ProofStore(tmp_path))
    assert not [*tmp_path.iterdir()]
