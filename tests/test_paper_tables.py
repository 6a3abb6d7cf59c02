"""The recipe for the papers' tables: its own drafters, a record that goes on, texts that are compared."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
from recipes import paper_tables
from recipes.paper_tables import PLAIN, FewerMasks, Jacobi, Way, complete, fixed, law, read, run, table

from selfdraft.bench.charts import scaling_law
from selfdraft.core.sequence import Sequence, open_sequence
from selfdraft.core.verify import Result
from selfdraft.drafters import build
from selfdraft.drafting.mask_prediction import MaskTokens
from selfdraft.engine.engine import Engine
from selfdraft.models.target import HFTarget
from selfdraft.protocols import DraftExtras
from selfdraft.replay.replay import LogTarget
from selfdraft.testing import check_drafter
from selfdraft.tune.lookahead import Point, counted
from selfdraft.types import Budget, SamplingParams
from tests.models import VOCAB, tiny_llama

WAYS = {
    PLAIN: Way(lambda llm: llm.engine_for("none")),
    "1/3/1": Way(fixed((1, 3, 1)), (1, 3, 1)),
    "5/4/5": Way(fixed((5, 4, 5)), (5, 4, 5)),
    "15/5/1": Way(fixed((15, 5, 1)), greedy=True),
}


def asked() -> Sequence:
    return open_sequence([1, 2, 3], SamplingParams(max_tokens=9), seed=0, eos=frozenset(), context=99)


def test_rows_of_a_prompt_are_not_counted() -> None:
    target = HFTarget(tiny_llama())
    sequence = open_sequence([3, 1, 4] * 5, SamplingParams(max_tokens=9), seed=0, eos=frozenset(), context=99)
    assert counted(Engine(target, build("none", target, {}), chunk=4), [sequence]) == (9, 9, 9)


def test_jacobi_is_exact() -> None:
    check_drafter(Jacobi, num_speculative_tokens=4)


def test_jacobi_guesses_what_was_answered_behind_the_text() -> None:
    drafter = Jacobi(HFTarget(tiny_llama()), num_speculative_tokens=3)
    sequence, room = asked(), Budget(8, 8, 8)
    (draft,) = drafter.draft([sequence], [room])
    assert draft.tokens == (1, 2, 3)  # nothing is known yet
    sequence.tokens += [4, 5]
    drafter.observe([sequence], [Result(draft, path=(0,), tokens=(4, 5), argmax=(4, 5, 6, 7))])
    assert drafter.draft([sequence], [room])[0].tokens == (6, 7, 3)


@pytest.mark.parametrize("masks", [1, 2])
def test_a_group_has_no_more_masks_than_wanted(masks: int) -> None:
    target = LogTarget()
    target.extras = DraftExtras(mask_tokens={"space": MaskTokens(range(VOCAB, VOCAB + 3))})
    drafter = FewerMasks(target, masks=masks, branches=2)
    sequence = asked()
    (draft,) = drafter.draft([sequence], [Budget(8, 8, 8)])
    assert draft.tokens == tuple(range(VOCAB, VOCAB + masks))


@pytest.fixture
def given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Namespace:
    monkeypatch.setattr(paper_tables, "TOKENS", 12)
    return Namespace(
        model="pocket", data_dir=None, prompts=2, numbers=[1], temperatures=[0.0, 0.8], record=tmp_path / "record.jsonl"
    )


def test_a_run_that_was_ended_goes_on(given: Namespace) -> None:
    run(given, WAYS)
    whole = given.record.read_text()
    assert len(whole.splitlines()) == len(paper_tables.TASKS) * (2 * len(WAYS) - 1)
    given.record.write_text(whole[:-9])  # killed while it wrote
    run(given, WAYS)
    assert given.record.read_text() == whole


def test_a_text_that_differs_ends_the_run(given: Namespace) -> None:
    run(given, {PLAIN: WAYS[PLAIN]})
    rows = [json.loads(line) for line in given.record.read_text().splitlines()]
    rows[-1]["text"][-1] += 1
    given.record.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(SystemExit, match=r"'gsm8k', 1, 0.8, '1/3/1'.*differs"):
        run(given, WAYS)


def test_tables_are_made_of_prompts_that_were_decoded_all_ways(given: Namespace) -> None:
    def row(task: str, number: int, way: str, steps: int) -> dict[str, object]:
        key = {"task": task, "prompt": number, "temperature": 0.0, "way": way}
        return {**key, "tokens": 64, "steps": steps, "rows": 4 * steps}

    counts = {PLAIN: 64, "1/3/1": 40, "5/4/5": 32, "15/5/1": 64}
    rows = [row(task, 0, way, steps) for task in paper_tables.TASKS for way, steps in counts.items()]
    rows += [row("gsm8k", 1, "5/4/5", 1)]
    given.record.write_text("".join(json.dumps(one) + "\n" for one in rows))
    (found,) = complete(read(given.record), WAYS).values()
    assert [*table(found, WAYS)][-2] == "| 5/4/5 | 2.00 / 4 | 2.00 / 4 | 2.00 / 4 | 2.00 / 4 |"
    assert "gsm8k, 1 prompts" in next(table(found, WAYS))
    points, said = law(found, WAYS)
    assert [point.tokens_per_pass for point in points] == [1.6, 2.0]
    assert said.startswith("tokens per pass = ")


def test_the_picture_has_the_fitted_line() -> None:
    pytest.importorskip("matplotlib")
    points = [Point(1, 3, 1, 64, 40, 80, 0.0), Point(5, 4, 5, 64, 32, 320, 0.0)]  # 1.6 and 2 tokens, 2 and 10 rows
    axes = scaling_law({"greedy": points}, "conditions").axes[0]
    assert axes.lines[-1].get_xydata() == pytest.approx(np.array([[2, 1.6], [10, 2.0]]))
    assert axes.get_title() == "greedy: 1.43 + 0.249 ln(rows), r = 1.00"
