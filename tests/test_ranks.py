"""Lookahead parallelism: who runs what, one text by any number of ranks, and the end of all when one ends.

Ranks as threads are cheap and prove the text; real processes (`tests/ranks.py`) prove the rest.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.distributed_c10d import Store
from torch.distributed.tensor import DTensor, Shard

from selfdraft.core.rows import pack
from selfdraft.core.sequence import Sequence, open_sequence
from selfdraft.core.tree import EMPTY, ROOT, Draft
from selfdraft.drafters import build
from selfdraft.drafters.lookahead.window import window_parents
from selfdraft.engine.engine import Engine
from selfdraft.errors import OptionError, RankError, UnsupportedModel
from selfdraft.methods import splittable
from selfdraft.models.exactness import Shapes
from selfdraft.models.kv_cache import KVCache
from selfdraft.models.load import open_target
from selfdraft.models.target import HFTarget
from selfdraft.parallel import join
from selfdraft.parallel.lookahead import LookaheadRanks
from selfdraft.parallel.ranks import LOADING, PATIENCE, Ranks, Watch
from selfdraft.parallel.shares import probe_leaves, rows_of_share, split
from selfdraft.types import SamplingParams
from tests.models import VOCAB, run, tiny_llama, tiny_target

SIZES = {"window_size": 5, "ngram_size": 4, "guess_set_size": 5, "adaptive": False}
MOTIF = [17, 4, 33, 8, 51, 22, 9]
PROMPTS = [[*MOTIF, *MOTIF[:4]], [(i * i * 7 + 3) % VOCAB for i in range(9)], [5], [*MOTIF * 9, 40, *MOTIF[:2]]]
GREEDY = SamplingParams(max_tokens=32)
SAMPLED = SamplingParams(max_tokens=32, temperature=0.8, seed=3)
WAYS = ["1-greedy", "2-greedy", "2-sampled", "3-sampled", "4-greedy"]


def windowed(width: int, height: int, paths: SequenceOf[SequenceOf[int]]) -> Draft:
    """Candidates and a window whose cells have tokens of their own."""
    tokens = [100 + i for i in range(width * height - 1)]
    return Draft.branches(paths, "lookahead").with_probes(tokens, window_parents(width, height), "lookahead")


# who runs what


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
def test_the_shares_cover_a_draft_and_hold_their_ancestors(size: int) -> None:
    draft = windowed(5, 3, [[1, 2, 3], [1, 4, 5], [6, 7, 8], [9]])
    shares = split(draft, size)
    assert set().union(*(share.nodes for share in shares)) == set(range(len(draft)))
    for share in shares:
        own = share.of(draft)
        assert own.num_candidates == sum(node < draft.num_candidates for node in share.nodes)
        for node, parent in zip(share.nodes, own.parents, strict=True):
            above = ROOT if parent == ROOT else share.nodes[parent]
            assert above == draft.parents[node]
    assert [leaf for share in shares for leaf in share.leaves] == probe_leaves(draft)


def test_columns_go_in_equal_runs_and_need_the_base_row_on_their_left() -> None:
    draft = windowed(4, 3, [])
    first, second = split(draft, 2)
    assert [draft.tokens[leaf] for leaf in probe_leaves(draft)] == [107, 108, 109, 110]
    assert [draft.tokens[node] for node in first.nodes] == [100, 103, 104, 107, 108]
    assert [draft.tokens[node] for node in second.nodes] == [100, 101, 102, 105, 106, 109, 110]


def test_a_rank_without_columns_gets_the_candidates() -> None:
    draft = windowed(2, 2, [[1, 2], [3, 4]])
    shares = split(draft, 3)
    assert shares[2].leaves == ()
    assert [draft.tokens[node] for node in shares[2].nodes] == [1, 2]
    assert split(EMPTY, 3)[2].nodes == ()


def test_the_rows_of_a_share_keep_positions_and_pending_tokens() -> None:
    sequence = open_sequence([3, 1, 4, 1, 5], GREEDY, seed=0, eos=frozenset(), context=64)
    sequence.slot, sequence.num_cached = 2, 3
    rows = pack([(sequence, 2, windowed(3, 2, [[7, 8]]))])
    share = split(rows.spans[0].draft, 2)[1]
    own = rows_of_share(rows, [share])
    assert [*own.tokens] == [1, 5, *(rows.spans[0].draft.tokens[node] for node in share.nodes)]
    wanted = [3, 4, *(rows.spans[0].positions[2 + node] for node in share.nodes)]
    assert [*own.positions] == wanted
    assert own.logit_rows == tuple(range(1, len(own)))


@pytest.mark.parametrize("dtype", ["auto", "int8"])
def test_keys_and_values_travel_as_they_are_stored(dtype: str) -> None:
    sender, receiver = (KVCache(2, 8, "int8" if dtype == "int8" else "auto") for _ in range(2))
    draw = torch.Generator().manual_seed(1)
    with torch.inference_mode():
        for layer in range(3):
            key, value = (torch.randn(2, 6, 8, generator=draw) for _ in range(2))
            sender.write(layer, 1, 0, key, value)
            receiver.write(layer, 1, 0, key[:, :2], value[:, :2])
        receiver.unpack(1, 20, sender.packed(1, 2, 4))
    assert receiver.places >= 24
    for layer in range(3):
        for got, wanted in zip(receiver.view(layer, 1, 24), sender.view(layer, 1, 6), strict=True):
            assert torch.equal(got[:, :, 20:], wanted[:, :, 2:])
            assert torch.equal(got[:, :, :2], wanted[:, :, :2])


# one text by any number of ranks


class Threads:
    """Ranks that are threads of one process."""

    def __init__(self, size: int) -> None:
        self.size, self.barrier = size, threading.Barrier(size, timeout=60)
        self.told: list[Tensor] = [torch.empty(0)] * size
        self.errors: list[BaseException] = []


class ThreadRank:
    """What `Ranks` offers, among threads."""

    def __init__(self, all_ranks: Threads, rank: int) -> None:
        self.threads, self.rank, self.size = all_ranks, rank, all_ranks.size
        self.cache_bytes = self.messages = 0
        self.target: HFTarget | None = None

    def gather(self, message: Tensor) -> Tensor:
        self.messages += 1
        self.threads.told[self.rank] = message.clone()
        self.threads.barrier.wait()
        found = torch.stack(self.threads.told)
        self.threads.barrier.wait()
        return found

    def send(self, data: Tensor, source: int) -> None:
        self.cache_bytes += data.numel()
        self.threads.told[self.rank] = data
        self.threads.barrier.wait()
        data.copy_(self.threads.told[source].clone())
        self.threads.barrier.wait()

    @contextmanager
    def together(self) -> Iterator[None]:
        yield

    def leave(self, why: str) -> None:
        self.threads.barrier.abort()


def decoded(
    size: int, sampling: SamplingParams, *, slots: int = 1, shapes: Shapes | None = None, width: int = 5
) -> tuple[list[list[Sequence]], list[ThreadRank]]:
    """What each of `size` ranks makes of the prompts; a rank has its target."""
    threads = Threads(size)
    ranks = [ThreadRank(threads, rank) for rank in range(size)]
    found: list[list[Sequence]] = [[] for _ in ranks]

    def decode(rank: ThreadRank) -> None:
        try:
            target = rank.target = tiny_target(slots=slots, shapes=shapes)
            drafter = build("lookahead", target, {**SIZES, "window_size": width})
            shared = LookaheadRanks(target, target.cache, cast(Ranks, rank), width=width, size=4)
            engine = Engine(shared, drafter, slots=slots)
            engine.choose = shared.choose
            sequences = opened(target, sampling)
            for _ in engine.generate(sequences):
                pass
            found[rank.rank] = sequences
        except BaseException as error:
            threads.errors.append(error)
            threads.barrier.abort()

    running = [threading.Thread(target=decode, args=(rank,)) for rank in ranks]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    if threads.errors:
        raise threads.errors[0]
    return found, ranks


def opened(target: HFTarget, sampling: SamplingParams) -> list[Sequence]:
    return [
        open_sequence(prompt, sampling, seed=(sampling.seed or 0) + i, eos=frozenset(), context=target.max_length)
        for i, prompt in enumerate(PROMPTS)
    ]


@pytest.mark.parametrize(
    ("size", "sampling"), [(1, GREEDY), (2, GREEDY), (2, SAMPLED), (3, SAMPLED), (4, GREEDY)], ids=WAYS
)
def test_any_number_of_ranks_says_what_plain_decoding_says(size: int, sampling: SamplingParams) -> None:
    wanted = [one.output for one in run(tiny_target(), "none", PROMPTS, sampling)]
    alone = run(tiny_target(), build("lookahead", tiny_target(), SIZES), PROMPTS, sampling)
    found, ranks = decoded(size, sampling)
    for sequences in found:
        assert [one.output for one in sequences] == wanted
        assert [one.stats.num_steps for one in sequences] == [one.stats.num_steps for one in alone], "as one rank"
    assert (size > 1) == (ranks[0].cache_bytes > 0)
    assert any(one.stats.num_accepted_draft_tokens for one in found[0])


def test_all_ranks_remember_the_keys_and_values_of_plain_decoding() -> None:
    plain = tiny_target()
    last = run(plain, "none", PROMPTS, GREEDY)[-1]
    found, ranks = decoded(3, GREEDY)
    assert ranks[0].cache_bytes > 0
    for rank, sequences in zip(ranks, found, strict=True):
        assert rank.target is not None
        known = min(last.num_cached, sequences[-1].num_cached)
        for layer in range(4):
            pairs = zip(plain.cache.view(layer, 0, known), rank.target.cache.view(layer, 0, known), strict=True)
            assert all(torch.allclose(wanted, got, rtol=0, atol=1e-9) for wanted, got in pairs)


def test_batches_in_canonical_shapes() -> None:
    sampling = replace(SAMPLED, max_tokens=24)
    wanted = [one.output for one in run(tiny_target(), "none", PROMPTS, sampling)]
    found, _ = decoded(2, sampling, slots=3, shapes=Shapes(4, 64))
    assert all([one.output for one in sequences] == wanted for sequences in found)


def test_more_ranks_than_columns() -> None:
    wanted = [one.output for one in run(tiny_target(), "none", PROMPTS, GREEDY)]
    found, _ = decoded(4, GREEDY, width=2)
    assert all([one.output for one in sequences] == wanted for sequences in found)


# what is refused


def test_only_drafters_whose_rows_can_be_shared() -> None:
    assert splittable(None, None) == ("lookahead", {"adaptive": False})
    assert splittable(None, {"method": "lookahead", "window_size": 9})[1] == {"window_size": 9, "adaptive": False}
    assert splittable("none", None) == ("none", {})
    with pytest.raises(OptionError, match="'auto' has none to split"):
        splittable("auto", None)
    with pytest.raises(OptionError, match="follows the clock of each rank"):
        splittable("lookahead", {"adaptive": True})


def test_without_a_launcher_there_is_nobody_to_join(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(RankError, match="torchrun --nproc_per_node N"):
        join()


def test_weights_that_are_spread_over_processes_are_refused() -> None:
    model = copy.deepcopy(tiny_llama())
    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        layer = model.model.layers[0].mlp.down_proj
        layer.weight = torch.nn.Parameter(DTensor.from_local(layer.weight.detach(), mesh, [Shard(1)]))
        with pytest.raises(UnsupportedModel, match="split over several processes \\(tp_plan\\)"):
            open_target(model, slots=1)
    finally:
        dist.destroy_process_group()


# signs of life


class Table:
    """A store of ranks in memory."""

    def __init__(self) -> None:
        self.known: dict[str, bytes] = {}

    def set(self, name: str, value: str) -> None:
        self.known[name] = value.encode()

    def get(self, name: str) -> bytes:
        return self.known[name]

    def check(self, names: list[str]) -> bool:
        return all(name in self.known for name in names)


def test_a_rank_without_signs_of_life_is_found_by_the_clock_and_one_that_gives_some_is_not() -> None:
    table, now = Table(), [0.0]
    table.set("selfdraft/beat/1", "0")
    ranks = cast(Ranks, type("Two", (), {"rank": 0, "size": 2}))
    watch = Watch(ranks, cast(Store, table), lambda: now[0], end=lambda line: None)
    watch.stop()
    signs = {1: (b"", 0.0)}
    assert watch._look(signs) == ""
    now[0] = LOADING
    assert watch._look(signs) == ""
    watch.patience = PATIENCE
    signs[1], now[0] = (b"0", 0.0), PATIENCE
    assert watch._look(signs) == ""
    now[0] = PATIENCE + 0.1
    assert "rank 1 has given no sign of life" in watch._look(signs)
    table.set("selfdraft/beat/1", "1")
    assert watch._look(signs) == ""
    watch.tell("rank 1: no room on the disk")
    assert "no room on the disk" in watch._look(signs)


# real processes


@pytest.fixture(scope="module")
def seen() -> dict[str, list[dict[str, object]]]:
    """What became of the ranks of each scenario; one process imports everything, and the ranks are its forks."""
    if not hasattr(torch.distributed, "is_gloo_available") or not torch.distributed.is_gloo_available():
        pytest.skip("this build of torch has no gloo")
    wanted = ["texts:2", "faults:2", "killed:3", "first_killed:2", "stopped:2", "raises:2"]
    wanted += ["options_differ:2", "models_differ:2", "requests_differ:2", "answers:2", "wrong_drafter:2"]
    home = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-m", "tests.ranks", *wanted],
        cwd=home,
        env={**os.environ, "TORCH_CPP_LOG_LEVEL": "ERROR"},
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, list[dict[str, object]]] = json.loads(done.stdout)
    return found


def test_real_ranks_say_what_plain_decoding_says(seen: dict[str, list[dict[str, object]]]) -> None:
    said = [cast(dict[str, object], rank["said"]) for rank in seen["texts"]]
    assert [rank["code"] for rank in seen["texts"]] == [0, 0], [rank["err"] for rank in seen["texts"]]
    for one in said:
        assert one["wrong"] == []
        assert one == said[0], "the ranks have the same texts, steps and counts"
    messages, message_bytes, cache_bytes = cast(list[int], said[0]["sent"])
    assert 0 < message_bytes <= 4 * messages * cast(int, said[0]["a step"])
    assert cache_bytes > 0


def test_a_request_that_one_rank_cannot_answer_fails_on_all_and_the_others_go_on(
    seen: dict[str, list[dict[str, object]]],
) -> None:
    first, last = (cast(list[str], rank["said"]) for rank in seen["faults"])
    assert "rank 1 could not answer" in first[0]
    assert "broken here" in last[0]
    assert first[1] == last[1]
    assert len(first[1]) == 24


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("killed", "another rank has ended"),
        ("first_killed", "ends: "),
        ("stopped", "rank 1 has given no sign of life for 7 seconds"),
        ("raises", "another one has left (rank 1: ValueError: no room on the disk)"),
    ],
)
def test_a_rank_that_ends_ends_all_others_with_one_line(
    name: str, words: str, seen: dict[str, list[dict[str, object]]]
) -> None:
    broken = 0 if name == "first_killed" else len(seen[name]) - 1
    for number, rank in enumerate(seen[name]):
        if number != broken:
            lines = [line for line in cast(list[str], rank["err"]) if "Loading weights" not in line and line]
            assert rank["code"] == 1
            assert len(lines) == 1
            assert words in lines[0]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("options_differ", "the ranks differ in window_size: rank 0 has 6, rank 1 has 7"),
        ("models_differ", 'the ranks differ in the model\'s logits: rank 0 has "of rank 0", rank 1 has "of rank 1"'),
        ("requests_differ", "the ranks were given different requests"),
    ],
)
def test_ranks_that_differ_are_refused(name: str, words: str, seen: dict[str, list[dict[str, object]]]) -> None:
    for rank in seen[name]:
        assert rank["code"] == 1
        assert any(words in line for line in cast(list[str], rank["err"])), rank["err"]


def test_the_command_line_shows_the_text_once(seen: dict[str, list[dict[str, object]]]) -> None:
    first, second = seen["answers"]
    assert (first["code"], second["code"]) == (0, 0)
    document = json.loads(cast(str, first["out"]))
    assert len(document["results"][0]["token_ids"]) == 24
    assert document["ranks"]["size"] == 2
    assert document["ranks"]["message_bytes"] > 0
    assert (second["out"], second["err"]) == ("", [])


def test_a_drafter_without_a_window_is_refused_before_ranks_meet(seen: dict[str, list[dict[str, object]]]) -> None:
    for rank in seen["wrong_drafter"]:
        assert rank["code"] == 2
        assert [line for line in cast(list[str], rank["err"]) if "has none to split" in line]
