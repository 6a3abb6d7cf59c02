"""What `make demo` runs: a small real model answers three prompts, each compared with plain decoding.

The last one is answered once more without the 4-bit copy of the model that drafts, too, where this machine gains by it.

The model is SmolLM2-135M-Instruct, downloaded once (93 MB); without a network the tests' toy model takes its place.
"""

import subprocess
import sys

COPY = (
    "Correct the spelling mistakes and repeat the text: Last sumer we went to the lake with our frends. We swam every "
    "day, and in the evning we sat around the fire and told storys. My brother cought three fish, and my sister found "
    "a beautifull shell on the beach. We want to go back next year."
)
CODE = "Write a Python function that returns the largest and the smallest number of a list, with a docstring."
OPEN = "Why is the sky blue? Explain it to a child in a few sentences."
WITHOUT_COPY = ("--speculative-config", '{"method": "auto", "bits": false}')


def selfdraft(*arguments: str) -> int:
    """Run a command line as a user would, show it first, and return its exit code."""
    print("\n$ selfdraft " + " ".join(repr(part) if " " in part else part for part in arguments), flush=True)
    return subprocess.run([sys.executable, "-m", "selfdraft", *arguments], check=False).returncode


model = "smollm2"
if selfdraft("pull", model):
    model = "pocket"
    print(
        "\nThe real model cannot be downloaded now. The toy model `pocket` (5.5 million weights, for tests) takes its "
        "place:\nits texts are poor, and its figures say nothing about real models.",
        flush=True,
    )
runs: list[tuple[str, ...]] = [(COPY,), (CODE,), (OPEN,)]
if model == "smollm2":  # passes of the toy are all overhead: there is no copy of it
    runs.append((OPEN, *WITHOUT_COPY))
for run in runs:
    code = selfdraft("generate", *run, "--chat", "--model", model, "--max-new-tokens", "128", "--compare")
    if code:
        sys.exit(code)
