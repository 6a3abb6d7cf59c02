"""What `make demo` runs: the pocket model answers three prompts, each compared with plain decoding."""

import subprocess
import sys

PROMPTS = (
    (
        "--chat",
        "Repeat the following text exactly.\nThe little dog ran over the hill to see the big red barn by the river.",
    ),
    ("--chat", "Write a Python function that returns the sum of a list of numbers."),
    ("", "Once upon a time, there was a little girl who"),
)

for flag, prompt in PROMPTS:
    command = ["generate", prompt, "--model", "pocket", "--max-new-tokens", "96", "--compare"]
    line = " ".join(repr(part) if " " in part else part for part in [*command, flag]).strip()
    print(f"\n$ selfdraft {line}", flush=True)
    code = subprocess.run(
        [sys.executable, "-m", "selfdraft", *command, *([flag] if flag else [])], check=False
    ).returncode
    if code:
        sys.exit(code)
