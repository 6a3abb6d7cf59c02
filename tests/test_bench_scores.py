"""Scores against figures worked out by hand, and by enumeration."""

from __future__ import annotations

import sys
from decimal import Decimal
from itertools import combinations

import pytest

from selfdraft.bench.scores import code_of, last_number, pass_at_k, rouge, same_number
from selfdraft.errors import OptionError


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She has 3 apples and 4 pears.", "4"),
        ("#### 1,234", "1234"),
        ("the answer is $1,234.50.", "1234.50"),
        ("it fell to -7", "-7"),
        ("about .5 of it", "0.5"),
        ("5-3", "-3"),
        ("42.", "42"),
        ("none at all", None),
        ("", None),
    ],
)
def test_last_number(text: str, number: str | None) -> None:
    assert last_number(text) == (None if number is None else Decimal(number))


def test_same_number() -> None:
    assert same_number("so it is 18.00 dollars", "16 - 3 - 4 = 9\n#### 18")
    assert not same_number("18, or rather 19", "#### 18")
    assert not same_number("eighteen", "#### 18")


@pytest.mark.parametrize("samples", [1, 2, 5, 7])
def test_pass_at_k_is_the_share_of_choices_with_a_pass(samples: int) -> None:
    for passed in range(samples + 1):
        for k in range(1, samples + 1):
            choices = list(combinations(range(samples), k))
            share = sum(min(choice) < passed for choice in choices) / len(choices)
            assert pass_at_k(samples, passed, k) == pytest.approx(share, abs=1e-12)


@pytest.mark.parametrize("numbers", [(3, 1, 4), (3, 1, 0), (3, 4, 1), (3, -1, 1)])
def test_pass_at_k_refuses_nonsense(numbers: tuple[int, int, int]) -> None:
    with pytest.raises(OptionError, match="pass@"):
        pass_at_k(*numbers)


def test_rouge() -> None:
    """3 of 4 words and 1 of 3 pairs are shared; the longest common subsequence is 'the cat sat'."""
    pytest.importorskip("rouge_score")
    found = rouge("the cat quietly sat", ["the cat sat down"])
    assert found["rouge1"] == pytest.approx(3 / 4)
    assert found["rouge2"] == pytest.approx(1 / 3)
    assert found["rougeL"] == pytest.approx(3 / 4)


def test_rouge_stems_and_takes_the_best_reference() -> None:
    pytest.importorskip("rouge_score")
    assert rouge("the dogs barked", ["the dog barks"])["rouge2"] == pytest.approx(1.0)
    assert rouge("the dog", ["a cat", "the dog"])["rougeL"] == pytest.approx(1.0)
    assert rouge("", ["a cat"]) == {"rouge1": 0.0, "rouge2": 0.0, "rougeL": 0.0}


def test_rouge_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rouge_score", None)
    with pytest.raises(OptionError, match=r"pip install 'selfdraft\[bench\]'"):
        rouge("a", ["a"])


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("Sure:\n```python\nx = 1\n```\nand\n```\ny\n```", "x = 1\n"),
        ("```\nx = 1\n```", "x = 1\n"),
        ("```py\nx = 1", "x = 1"),
        ("```Python\r\nx = 1\r\n```", "x = 1\r\n"),
        ("x = 1", None),
    ],
)
def test_code_of(text: str, code: str | None) -> None:
    assert code_of(text) == code
