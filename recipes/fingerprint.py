"""How well an observer of the network recognises a prompt by the sizes of a stream's parts: a 1-nearest-neighbour test.

python recipes/fingerprint.py URL [RUNS]

Twenty prompts are asked RUNS times each (20 unless said otherwise) at temperature 0.3, 48 tokens. The observer sees the
bytes of each part, encrypted or not. Each stream is then given the prompt of the stream that is most like it, itself
left out. Prints the share that is right; guessing has 5 %. Ask a server that was started with and without
`--stream-pace`. Source of the attack: arXiv 2411.01076.
"""

from __future__ import annotations

import random
import sys

import httpx

THINGS = ("rain", "a bridge", "bread", "the moon", "a violin", "salt", "a library", "wolves", "glass", "a lighthouse")
ASKED = ("Explain in a few sentences what {} is.", "List three things that one can do with {}.")
PROMPTS = [form.format(thing) for form in ASKED for thing in THINGS]


def sizes_of(client: httpx.Client, url: str, prompt: str, seed: int) -> list[int]:
    """Bytes of each part of one streamed answer, as they came."""
    body = {
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": 48,
        "temperature": 0.3,
        "seed": seed,
        "stream": True,
        "ignore_eos": True,
    }
    with client.stream("POST", f"{url}/v1/chat/completions", json=body) as answer:
        answer.raise_for_status()
        return [len(part) for part in answer.iter_raw()]


def distance(one: list[int], other: list[int]) -> int:
    """How unlike two streams are: the differences of their parts, place by place."""
    longest = max(len(one), len(other))
    pairs = zip(one + [0] * (longest - len(one)), other + [0] * (longest - len(other)), strict=True)
    return sum(abs(a - b) for a, b in pairs)


def recognised(streams: list[tuple[int, list[int]]]) -> float:
    """Share of the streams whose nearest other one is of the same prompt; of equally near ones one is drawn."""
    draw, right = random.Random(0), 0
    for number, (prompt, sizes) in enumerate(streams):
        others = [
            (distance(sizes, seen), draw.random(), of) for place, (of, seen) in enumerate(streams) if place != number
        ]
        right += min(others)[2] == prompt
    return right / len(streams)


def main() -> None:
    url, runs = sys.argv[1].rstrip("/"), int(sys.argv[2]) if len(sys.argv) > 2 else 20
    with httpx.Client(timeout=600) as client:
        streams = [
            (number, sizes_of(client, url, prompt, 1000 * number + run))
            for run in range(runs)
            for number, prompt in enumerate(PROMPTS)
        ]
    kinds = len({tuple(sizes) for _, sizes in streams})
    print(f"{len(streams)} streams, {kinds} different: {100 * recognised(streams):.1f} % recognised; guessing has 5 %")


if __name__ == "__main__":
    main()
