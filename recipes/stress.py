"""Eight threads on one LLM for a minute: mixed options, streams left early, processors that raise. All is checked.

python recipes/stress.py [MODEL] [SECONDS]
"""

from __future__ import annotations

import random
import sys
import threading
import time
from collections import Counter

from selfdraft import LLM, SamplingParams
from selfdraft.errors import EngineError

PROMPTS = [
    "Write a haiku about rain.",
    "Repeat this list twice: red, green, blue, yellow.",
    "What is the capital of France, and why?",
    "def fibonacci(n):",
    "Translate to German: the cat sits on the mat.",
]
PARAMS = [
    SamplingParams(max_tokens=24),
    SamplingParams(max_tokens=16, temperature=0.8, seed=1),
    SamplingParams(max_tokens=16, temperature=1.2, top_p=0.9, seed=2, repetition_penalty=1.1),
    SamplingParams(max_tokens=12, logprobs=3),
]
THREADS = 8


def broken(_path, _scores):
    raise ZeroDivisionError("planted")


def work(llm, calls, wanted, number, end, counts):
    """One thread: random calls until `end`; what they come to is counted."""
    chance = random.Random(number)
    while time.monotonic() < end:
        which, kind = chance.randrange(len(calls)), chance.choice(["generate", "stream", "leave", "raise"])
        text, params = calls[which]
        if kind == "generate":
            same = llm.generate(text, params)[0].outputs[0].token_ids == wanted[which]
        elif kind == "stream":
            pieces = list(llm.stream(text, params))
            same = pieces[-1].output.token_ids == wanted[which] and pieces[-1].finish_reason is not None
            same = same and "".join(piece.text for piece in pieces) == pieces[-1].output.text
        elif kind == "leave":
            stream = llm.stream(text, params)
            next(stream)
            stream.close()
            same = True
        else:
            try:
                llm.generate(text, SamplingParams(logits_processors=(broken,)))
                same = False
            except EngineError:
                same = True
        counts[kind, "right" if same else "WRONG"] += 1


def main() -> None:
    model, seconds = (*sys.argv[1:], *("smollm2", "60")[len(sys.argv) - 1 :])[:2]
    llm = LLM(model, drafter="none", max_num_seqs=4)
    calls = [(text, params) for text in PROMPTS for params in PARAMS]
    wanted = [llm.generate(text, params)[0].outputs[0].token_ids for text, params in calls]
    llm.use("auto")
    counts: Counter[tuple[str, str]] = Counter()
    end = time.monotonic() + float(seconds)
    threads = [threading.Thread(target=work, args=(llm, calls, wanted, i, end, counts)) for i in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for (kind, what), count in sorted(counts.items()):
        print(f"{kind:10} {what:6} {count}")
    print(f"running {len(llm.engine.running)}, waiting {len(llm.engine.waiting)}")
    sys.exit(any(what == "WRONG" for _, what in counts))


if __name__ == "__main__":
    main()
