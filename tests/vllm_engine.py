"""Runs vLLM in the Python that has it: settings as JSON on the standard input, what it did as JSON on the output.

{"engine": arguments of vllm.LLM, "count": tokens of each answer, "alone": [[ids], ...] prompts that are answered
 one after the other, "together": [[ids], ...] prompts that are answered at once, "predictions": one for each prompt
 of both, "sampling": further sampling parameters, "whole": layer skipping that skips nothing}
"""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence as SequenceOf

    from selfdraft.core.sequence import Sequence
    from selfdraft.core.tree import Draft
    from selfdraft.core.verify import Result
    from selfdraft.integrations.vllm.proposers import Proposer
    from selfdraft.types import Budget, JsonObject

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # so that the proposer can be looked at
os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ["VLLM_NO_USAGE_STATS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"


class Record:
    """Stands before a drafter and writes down what each step of each request brought."""

    def __init__(self, proposer: Proposer) -> None:
        self.steps: list[list[tuple[int, int, int]]] = []
        """By request, in the order in which they came: candidates, accepted ones and tokens of every step."""
        self._places: dict[int, int] = {}
        self._seen: list[Sequence] = []
        self._inner = proposer.requests.drafter
        proposer.requests.drafter = self

    def draft(self, sequences: SequenceOf[Sequence], budgets: SequenceOf[Budget]) -> list[Draft]:
        return self._inner.draft(sequences, budgets)

    def observe(self, sequences: SequenceOf[Sequence], results: SequenceOf[Result]) -> None:
        for sequence, result in zip(sequences, results, strict=True):
            if result.tokens:
                if id(sequence) not in self._places:
                    self._places[id(sequence)] = len(self.steps)
                    self._seen.append(sequence)  # or its number might be another's
                    self.steps.append([])
                counts = result.draft.num_candidates, len(result.path), len(result.tokens)
                self.steps[self._places[id(sequence)]].append(counts)
        self._inner.observe(sequences, results)


def run(asked: JsonObject) -> JsonObject:
    from vllm import LLM, SamplingParams

    llm = LLM(generation_config="vllm", enforce_eager=True, disable_log_stats=False, **asked["engine"])
    runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    record = None
    if "selfdraft" in (asked["engine"].get("speculative_config") or {}).get("model", ""):
        if asked.get("whole"):
            from selfdraft.types import Skip

            runner.drafter.requests.drafter.drafter.skip = Skip()
        record = Record(runner.drafter)
    alone, together = asked.get("alone", []), asked.get("together", [])
    prompts = [{"prompt_token_ids": prompt} for prompt in [*alone, *together]]
    sampling = [
        SamplingParams(
            **{"temperature": 0.0, "max_tokens": asked["count"], "ignore_eos": True} | asked.get("sampling", {}),
            detokenize=False,
            extra_args={"selfdraft_prediction": one} if one else None,
        )
        for one in asked.get("predictions") or [None] * len(prompts)
    ]
    outputs = []
    for place in range(len(alone)):
        outputs += llm.generate([prompts[place]], [sampling[place]], use_tqdm=False)
    if together:
        outputs += llm.generate(prompts[len(alone) :], sampling[len(alone) :], use_tqdm=False)
    counters = {metric.name: getattr(metric, "value", None) for metric in llm.get_metrics()}
    return {
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "drafted": counters.get("vllm:spec_decode_num_draft_tokens"),
        "accepted": counters.get("vllm:spec_decode_num_accepted_tokens"),
        "steps": record.steps if record is not None else [],
        "remembered": len(runner.drafter.requests) if record is not None else 0,
    }


def main() -> None:
    asked = json.loads(sys.stdin.readline())
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        said = run(asked)
    except Exception as error:
        said = {"error": f"{type(error).__name__}: {error}"}
    answers.write(json.dumps(said) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
