"""Task profiles: what was learned comes back from its file and changes no text, and broken files are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from selfdraft import LLM
from selfdraft.drafters import build, learned_by
from selfdraft.drafting.context_tree import ContextTree
from selfdraft.drafting.mixing import CLASSES, KEPT, Counts, Credit
from selfdraft.drafting.sources import Contexts, Copies, Reader, Source
from selfdraft.errors import OptionError
from selfdraft.files.task_profiles import read_task_profile, write_task_profile
from selfdraft.types import SamplingParams
from tests.models import run, tiny_target

FREE = {"min_probability": 0.0}
DEAR = {"min_probability": 0.2}
"""A fixed price of a row: trees do not depend on a clock, and what was learned decides how large they are."""


def sources() -> list[Source]:
    own = Reader(ContextTree(), own=True)
    return [Contexts("context", own), Copies("copy", own)]


def taught(steps: int = 30) -> Credit:
    """A credit for which the first kind of the first source is always right, and the second source never."""
    credit, (context, copies) = Credit(), sources()
    for one, right in ((context, 7), (copies, 8)):
        counts = credit.counts_of(one)
        for _ in range(steps):
            counts.observe({7: 0}, 0, right)
    key = credit.counts_of(context).levels[0][0] + credit.counts_of(copies).levels[0][0]
    for _ in range(steps):
        credit.observe({7: key}, 7)
    credit.paths.observe([1.0] * CLASSES, 3)
    return credit


def test_what_was_learned_comes_back(tmp_path: Path) -> None:
    credit = taught()
    write_task_profile(tmp_path / "task.json", credit.learned(), name="code")
    again = Credit(read_task_profile(tmp_path / "task.json"))
    for one in sources():
        mine, theirs = credit.counts_of(one), again.counts_of(one)
        assert (mine.unit, mine.levels) == (theirs.unit, theirs.levels)
    fresh = Credit()
    for one in sources():
        fresh.counts_of(one)
    keys = [int(cell) for cell, *_ in credit.learned().together]
    assert keys
    for key in keys:
        assert again.chance(key) == pytest.approx(credit.chance(key), abs=1e-4)
        assert abs(fresh.chance(key) - credit.chance(key)) > 0.01, "it learned something"
        assert again.names(key) == credit.names(key) == "context+copy"
    assert again.paths.ratios == pytest.approx(credit.paths.ratios, abs=1e-4)
    assert again.learned().alone.keys() == credit.learned().alone.keys()


def test_sources_keep_their_places_in_any_order() -> None:
    """Keys of joint cells count sources by place: a run that meets them in another order must read the same."""
    credit = taught()
    again = Credit(credit.learned())
    for one in reversed(sources()):
        assert again.counts_of(one).unit == credit.counts_of(one).unit
    assert again.counts_of(Contexts("memory", Reader(ContextTree()))).unit not in {
        credit.counts_of(one).unit for one in sources()
    }


def test_text_of_another_kind_is_soon_followed() -> None:
    """What was learned weighs as much as KEPT measurements, however long it was learned."""
    before = taught(3000).learned()
    (_, _, _, weight), *_ = before.alone["context"]
    assert weight > 2 * KEPT
    context = sources()[0]
    mean = Counts(context.beliefs, 1, before.alone["context"])
    assert max(cell[3] for cell in mean.learned()) == pytest.approx(KEPT)


def test_a_kind_that_a_source_does_not_have_is_left_out() -> None:
    context = sources()[0]
    counts = Counts(context.beliefs, 1, [(len(context.beliefs) * CLASSES, 0.5, 1.0, 2.0)])
    assert counts.learned() == []


@pytest.mark.parametrize("name", ["merged", "auto", "cascade"])
def test_texts_are_the_same_and_steps_are_fewer(name: str, tmp_path: Path) -> None:
    target = tiny_target()
    prompt = [5, 6, *([17, 4, 33, 8] * 3)]
    params = SamplingParams(max_tokens=40)
    first = build("merged", target, FREE)
    (plain,) = run(target, "none", [prompt], params)
    run(target, first, [prompt], params)
    path = tmp_path / "task.json"
    write_task_profile(path, learned_by(first))
    options = {"task_profile": path, **(DEAR if name == "merged" else {})}
    (with_it,) = run(target, build(name, target, options), [prompt], params)
    assert with_it.output == plain.output
    if name == "merged":
        (without,) = run(target, build(name, target, DEAR), [prompt], params)
        assert with_it.stats.num_steps < without.stats.num_steps


def test_an_llm_keeps_it(tmp_path: Path) -> None:
    llm = LLM("pocket", drafter="merged", speculative_config={"method": "merged", **FREE})
    params = SamplingParams(max_tokens=24)
    (output,) = llm.generate("Once upon a time", params)
    path = tmp_path / "task.json"
    llm.save_task_profile(path, "stories")
    value = json.loads(path.read_text("utf-8"))
    assert (value["name"], value["tokens"]) == ("stories", llm.stats.num_output_tokens)
    llm.use("auto", {"task_profile": str(path)})
    assert llm.generate("Once upon a time", params)[0].outputs[0].token_ids == output.outputs[0].token_ids
    llm.use("lookup")
    with pytest.raises(OptionError, match="keeps no task profile; take auto, merged or cascade"):
        llm.save_task_profile(path)


def test_broken_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "task.json"
    write_task_profile(path, taught().learned())
    good = json.loads(path.read_text("utf-8"))
    texts = {
        "is no JSON": path.read_text("utf-8")[:-20],
        "no task profile of this version": "[]",
        "format \\[2\\]": json.dumps({**good, "selfdraft_task_profile": [2]}),
        "is broken": json.dumps({**good, "paths": [[1.0], [1.0]]}),
        "is no chance": json.dumps({**good, "together": [[3, 0.5, 7.0, 2.0]]}),
        "number of a cell": json.dumps({**good, "together": [[-3, 0.5, 1.0, 2.0]]}),
        "names no source": json.dumps({**good, "together": [[3, 0.5, 1.0, 2.0]]}),
        "has no attribute 'items'": json.dumps({**good, "alone": []}),
        "above 0": json.dumps({**good, "paths": [[0.0] * CLASSES, [1.0] * CLASSES]}),
        "is broken \\('alone'\\)": json.dumps({key: value for key, value in good.items() if key != "alone"}),
    }
    target = tiny_target()
    for says, text in texts.items():
        path.write_text(text)
        with pytest.raises(OptionError, match=says):
            build("merged", target, {"task_profile": path})
    with pytest.raises(OptionError, match="cannot be read: No such file"):
        build("auto", target, {"task_profile": tmp_path / "none.json"})
    with pytest.raises(OptionError, match="is no path"):
        build("cascade", target, {"task_profile": 3})
