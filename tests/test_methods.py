"""Mistakes in options are told at once: the light table is the classes' own, and nothing heavy is imported."""

from __future__ import annotations

import subprocess
import sys

import pytest

from selfdraft import methods
from selfdraft.drafters import NAMES, options_of


def test_the_table_says_what_the_classes_take() -> None:
    assert {name: tuple(options_of(factory)) for name, factory in NAMES.items()} == methods.OPTIONS


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "--help"],
        ["generate", "hi", "--drafter", "nope"],
        ["generate", "hi", "--temperature", "-1"],
        ["generate", "hi", "--nope"],
        ["generate", "hi", "--dtype", "x"],
        ["generate", "hi", "--speculative-config", '{"method": "lookup", "x": 1}'],
        ["generate", "hi", "--model", "/nope"],
        ["generate"],
        ["chat", "--drafter", "nope"],
        ["verify", "--prompts", "x", "--drafters", "nope"],
        ["pull", "nope"],
        ["tune", "--help"],
        ["tune", "layer-skip", "--help"],
        ["tune", "nope"],
        ["tune", "--model", "/nope"],
        ["tune", "s3d", "--runs", "0"],
        ["tune", "--method", "lookahead", "--seed", "-1"],
    ],
)
def test_help_and_errors_of_options_import_no_torch(arguments: list[str]) -> None:
    program = (
        "import sys\nfrom selfdraft.cli import main\ntry:\n    main()\nexcept SystemExit as end:\n"
        "    print(end.code, sorted({'torch', 'transformers'} & {*sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)
    expected = "0 []" if "--help" in arguments else "2 []"
    assert done.stdout.splitlines()[-1] == expected, done.stderr
