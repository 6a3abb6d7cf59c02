"""Fetching weights ahead by hand: the bits stay, the clock decides, and the answer is kept."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from selfdraft.errors import RunnerUnavailable
from selfdraft.models.runner import fetching, kernel_build


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    try:
        kernel_build.library()
    except RunnerUnavailable as error:
        pytest.skip(str(error))
    monkeypatch.setattr(fetching, "BYTES", 1 << 16)
    monkeypatch.setattr(fetching, "cache_folder", lambda kind: tmp_path / kind)
    fetching.ahead.cache_clear()
    yield
    fetching.ahead.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2])
def test_both_ways_have_the_same_bits(dtype: torch.dtype, rows: int) -> None:
    layer = fetching.Layer(dtype)
    generator = torch.Generator().manual_seed(1)
    layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator))
    layer.given.copy_(torch.randn(layer.given.shape, generator=generator))
    plain = layer.run(rows, 0).clone()
    layer.said.zero_()
    assert torch.equal(layer.run(rows, rows), plain)
    wanted = layer.given[:rows].double() @ layer.weight.double().T
    assert torch.allclose(plain.double(), wanted, atol=0.5, rtol=0.02)


class Timed:
    """A clock by which the runs take so many seconds in turn: one row each way, then two rows each way."""

    def __init__(self, *seconds: float) -> None:
        one, other, third, last = seconds
        runs = [one, other] * fetching.ROUNDS + [third, last] * fetching.ROUNDS
        self.readings = [reading for took in runs for reading in (0.0, took)][::-1]

    def __call__(self) -> float:
        return self.readings.pop()


@pytest.mark.parametrize(
    ("seconds", "ahead"),
    [((2, 1, 2, 1), 3), ((1, 2, 1, 2), 0), ((2, 1, 1, 2), 1), ((1, 2, 2, 1), 2), ((1, 0.99, 1, 0.99), 0)],
)
def test_the_clock_decides_for_each_number_of_rows(seconds: tuple[float, ...], ahead: int) -> None:
    assert fetching.measure(torch.float32, Timed(*seconds)) == ahead


def test_it_is_measured_once_for_a_machine_and_a_broken_file_is_measured_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[torch.dtype] = []

    def measure(dtype: torch.dtype) -> int:
        asked.append(dtype)
        return 2

    monkeypatch.setattr(fetching, "measure", measure)
    for _ in range(2):
        fetching.ahead.cache_clear()
        assert fetching.ahead(torch.bfloat16) == 2
    [place] = (tmp_path / "kernels").iterdir()
    assert asked == [torch.bfloat16]
    record = json.loads(place.read_text("utf-8"))
    for broken in ("", json.dumps(record | {"ahead": 7}), json.dumps(record | {"identity": {}})):
        place.write_text(broken, "utf-8")
        fetching.ahead.cache_clear()
        assert fetching.ahead(torch.bfloat16) == 2
    assert len(asked) == 4


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("", "utf-8")
    monkeypatch.setattr(fetching, "cache_folder", lambda _: tmp_path / "file")
    monkeypatch.setattr(fetching, "measure", lambda _: 1)
    assert fetching.ahead(torch.float32) == 1
