"""Memory of the key/value cache: only what was written is taken, also when it grows."""

from __future__ import annotations

import ctypes
import sys

import pytest
import torch
from torch import Tensor

from selfdraft.core.rows import pack
from selfdraft.core.sequence import Sequence
from selfdraft.core.tree import EMPTY
from selfdraft.errors import EngineError, RunnerUnavailable
from selfdraft.models.kv_cache import KVCache
from selfdraft.models.target import HFTarget
from selfdraft.types import SamplingParams
from tests.models import tiny_llama

PAGE = 4096
HEADS, WIDE = 8, 64
linux = pytest.mark.skipif(sys.platform != "linux", reason="asks Linux which pages are in memory")


def resident(tensor: Tensor) -> int:
    """Bytes of a tensor's memory that the system has given, in whole pages."""
    start = tensor.data_ptr() // PAGE * PAGE
    count = -(-(tensor.data_ptr() + tensor.nbytes - start) // PAGE)
    told = (ctypes.c_ubyte * count)()
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mincore(ctypes.c_void_p(start), ctypes.c_size_t(count * PAGE), told) == 0
    return PAGE * sum(byte & 1 for byte in told)


def write(cache: KVCache, slot: int, places: int) -> Tensor:
    rows = torch.randn(HEADS, places, WIDE)
    cache.write(0, slot, 0, rows, rows)
    return rows


@linux
def test_sixteen_slots_take_the_sum_of_what_is_in_them() -> None:
    cache = KVCache(16, 4096)
    lengths = {0: 100, 3: 700, 9: 1500, 15: 10}
    rows = {slot: write(cache, slot, places) for slot, places in lengths.items()}
    wanted = sum(2 * HEADS * places * WIDE * 4 for places in lengths.values())
    taken = resident(cache.keys[0]) + resident(cache.values[0])
    assert wanted <= taken <= 1.2 * wanted
    cache.reserve(5000)
    assert cache.places == 8192
    taken = resident(cache.keys[0]) + resident(cache.values[0])
    assert wanted <= taken <= 1.2 * wanted
    for slot, places in lengths.items():
        assert torch.equal(cache.keys[0][slot, :, :places], rows[slot])


@pytest.mark.parametrize("fast", [False, True])
def test_growing_keeps_what_a_pass_has_written(fast: bool) -> None:
    try:
        target = HFTarget(tiny_llama(torch.float32), slots=3, fast=fast)
    except RunnerUnavailable as error:
        pytest.skip(str(error))
    sequences = [Sequence([5 + i, *range(3, 40)], 38, SamplingParams(), slot=i) for i in (0, 2)]
    target.forward(pack([(sequence, 37, EMPTY) for sequence in sequences]))
    for sequence in sequences:
        sequence.num_cached = 37
    rows = pack([(sequence, 1, EMPTY) for sequence in sequences])
    before = target.forward(rows).clone()
    target.cache.reserve(target.cache.places + 1)
    assert torch.equal(target.forward(rows), before)
    assert not target.cache.keys[0][1].any(), "a slot that nobody used"


def test_what_does_not_fit_is_said_before_it_is_taken() -> None:
    cache = KVCache(16, 1 << 40)
    with pytest.raises(EngineError, match=r"no memory for the keys and values of 16 requests .* lower max_num_seqs"):
        cache.open(0, HEADS, WIDE, WIDE, torch.empty(0))
