"""One-line bugs that real decoders have had, or might, and the quick tests that must catch every one of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

SOURCE = Path(__file__).parents[2] / "src"


@dataclass(frozen=True)
class Bug:
    name: str
    file: str
    """Below src/selfdraft."""
    old: str
    """Occurs exactly once in the file."""
    new: str
    what: str

    @property
    def compiled(self) -> bool:
        """Only kernels that were built can show it."""
        return self.file.startswith("models/runner/")

    @property
    def path(self) -> Path:
        return SOURCE / "selfdraft" / self.file

    @property
    def stale(self) -> bool:
        """The code has moved on: the bug must be rewritten."""
        return self.path.read_text().count(self.old) != 1


BUGS = (
    Bug(
        "depth-by-row",
        "core/tree.py",
        "depths.append(1 if parent == ROOT else depths[parent] + 1)",
        "depths.append(node + 1)",
        "a node's depth is its row number",
    ),
    Bug(
        "negative-ids",
        "core/tree.py",
        "or not 0 <= token < ids:",
        "or not token < ids:",
        "negative token ids reach the model",
    ),
    Bug(
        "position-by-row",
        "core/rows.py",
        "*(last + depth for depth in self.draft.depths)",
        "*range(last + 1, last + 1 + len(self.draft))",
        "siblings stand at different positions",
    ),
    Bug(
        "unasked",
        "core/verify.py",
        "child = children.get((node, token))",
        "child = children.get((node, token), next((c for (p, _), c in children.items() if p == node), None))",
        "a child is accepted though the target said something else",
    ),
    Bug(
        "no-bonus",
        "core/verify.py",
        "return path, tokens\n",
        "return path, tokens[:-1] or tokens\n",
        "the bonus token is thrown away",
    ),
    Bug(
        "old-path",
        "core/verify.py",
        "process(logits[node + 1], sampling, path_tokens,",
        "process(logits[node + 1], sampling, sequence.tokens,",
        "penalties see the committed tokens only, not the row's own path",
    ),
    Bug(
        "noise-by-step",
        "core/verify.py",
        "sequence.seed, len(path_tokens))",
        "sequence.seed, len(sequence.tokens))",
        "all rows of a step share their noise",
    ),
    Bug(
        "wrong-answer-row",
        "core/verify.py",
        "token = answers[node + 1]",
        "token = answers[max(node, 0)]",
        "greedy reads the row before",
    ),
    Bug(
        "noise-without-position",
        "core/noise.py",
        "_mix_int(seed & _MASK) ^ (position & _MASK)",
        "_mix_int(seed & _MASK)",
        "the noise is the same at every position",
    ),
    Bug(
        "noise-without-token",
        "core/noise.py",
        "tokens.to(torch.int64) ^ key",
        "(tokens.to(torch.int64) * 0) ^ key",
        "the noise is the same for every token",
    ),
    Bug("shared-seed", "core/noise.py", "_mix_int(seed & _MASK)", "_mix_int(seed & 1)", "two requests share a seed"),
    Bug(
        "signed-shift",
        "core/noise.py",
        "return (x >> bits) & ((1 << (64 - bits)) - 1)",
        "return x >> bits",
        "the shift keeps the sign",
    ),
    Bug("top-k-tie", "core/sampler.py", "scores < kept", "scores <= kept", "the last of the k likeliest is dropped"),
    Bug(
        "top-p-early",
        "core/sampler.py",
        "outside = before >= sampling.top_p",
        "outside = before + chances > sampling.top_p",
        "the token that reaches top_p is dropped",
    ),
    Bug(
        "last-argmax",
        "core/sampler.py",
        "token = int(scores.argmax())",
        "token = len(scores) - 1 - int(scores.flip(0).argmax())",
        "ties go to the highest id",
    ),
    Bug(
        "prompt-penalty",
        "core/sampler.py",
        "Counter(path[prompt_length:])",
        "Counter(path)",
        "presence and frequency count the prompt",
    ),
    Bug(
        "min-tokens-late",
        "core/sampler.py",
        "written < sampling.min_tokens",
        "written <= sampling.min_tokens",
        "the end is banned one token too long",
    ),
    Bug("in-place", "core/sampler.py", "copy=True", "copy=False", "a reader of logits changes them for the others"),
    Bug(
        "bad-word-in-prompt",
        "core/sampler.py",
        "before <= written and",
        "before <= len(path) and",
        "a bad word may begin in the prompt",
    ),
    Bug(
        "end-in-block",
        "core/commit.py",
        "_finish(sequence, token)",
        "_finish(sequence, result.tokens[-1])",
        "an end id within an accepted block is overlooked",
    ),
    Bug(
        "one-too-many",
        "core/commit.py",
        "if sequence.room <= 0:",
        "if sequence.room < 0:",
        "the limit is overrun",
    ),
    Bug(
        "counts-behind-the-end",
        "core/commit.py",
        "accepted = min(emitted, len(result.path))",
        "accepted = len(result.path)",
        "accepted tokens behind the stop are counted",
    ),
    Bug("keep-moves-nothing", "core/kv_cache.py", "if first is None:", "if True:", "accepted rows stay out of place"),
    Bug(
        "growth-forgets",
        "core/kv_cache.py",
        "kept = min(used, old.shape[2])",
        "kept = min(used, 1)",
        "a grown cache has lost what was in it",
    ),
    Bug(
        "stream-stops",
        "llm.py",
        "if output.finish_reason is not None:",
        "if output.finish_reason is None:",
        "a stream ends after its first piece",
    ),
    Bug(
        "error-of-another",
        "engine/shared.py",
        "self.errors[error.request] = error",
        "pass",
        "a request that failed looks as if it had been aborted",
    ),
    Bug(
        "wrong-rows",
        "engine/step.py",
        "for node in result.path[: max(emitted - 1, 0)]]",
        "for node in range(len(result.path[: max(emitted - 1, 0)]))]",
        "the first rows are kept instead of the accepted ones",
    ),
    Bug(
        "cached-behind-the-end",
        "engine/step.py",
        "sequence.cached += share + len(accepted)",
        "sequence.cached += share + len(result.path)",
        "rows behind the stop count as remembered",
    ),
    Bug(
        "keep-off-by-one",
        "engine/step.py",
        "target.keep(sequence.slot, sequence.cached, ",
        "target.keep(sequence.slot, sequence.cached + 1, ",
        "accepted rows are moved to the wrong place",
    ),
    Bug("shared-slot", "engine/scheduler.py", "free.pop()", "free[-1]", "two sequences get the same slot"),
    Bug(
        "siblings-visible",
        "models/attention.py",
        "ancestors[row] = ancestors[parent]",
        "ancestors[row, :row] = True",
        "a row sees its siblings",
    ),
    Bug(
        "window-off-by-one",
        "models/attention.py",
        "> self.queries[:, :, None] - window",
        ">= self.queries[:, :, None] - window",
        "a sliding window is one token too long",
    ),
    Bug(
        "lane-by-row",
        "models/attention.py",
        "= torch.tensor([span.base + row for row in path])",
        "= torch.arange(span.base, span.base + len(path))",
        "a lane reads the first rows instead of its own path",
    ),
    Bug(
        "blind-to-itself",
        "models/attention.py",
        "sees = places[:, None, :] <= at[:, :, None]",
        "sees = places[:, None, :] < at[:, :, None].clamp(min=1)",
        "a row does not see itself",
    ),
    Bug(
        "slot-zero",
        "models/attention.py",
        "cache.view(layer, group.slot, group.length)",
        "cache.view(layer, 0, group.length)",
        "everybody reads the first slot",
    ),
    Bug(
        "rounded-resumed",
        "models/target.py",
        "            self._early.forget(rows)\n        return logits",
        "            pass\n        return logits",
        "verification resumes behind blocks whose keys a rounded pass has overwritten",
    ),
)

LAW, ORACLE = "tests/test_law.py::test_", "tests/test_oracle.py::test_"
QUICK = (
    LAW + "penalties_by_hand",
    LAW + "bounds_by_hand",
    LAW + "processors_see_the_path_and_a_copy",
    LAW + "greedy_ties_go_to_the_lowest_id",
    LAW + "top_k",
    LAW + "top_p",
    LAW + "streams_do_not_know_each_other",
    LAW + "noise_is_a_function",
    LAW + "noise_is_uniform_along_every_axis",
    "tests/test_rounding.py::test_verification_takes_nothing_from_a_rounded_pass",
    ORACLE + "the_end_at_every_place_of_a_block",
    ORACLE + "logits_and_cache_at_every_position",
    ORACLE + "a_sliding_window",
    ORACLE + "the_cache_grows",
    "tests/test_threads.py::test_a_paused_stream_keeps_its_rest",
    "tests/test_threads.py::test_a_request_that_fails_is_named_and_the_others_are_answered[False-nan]",
    ORACLE + "a_drafter_that_knows_the_text_needs_the_fewest_steps",
    ORACLE + "adversaries[no_words-natural]",
    ORACLE + "adversaries[hidden-natural]",
    ORACLE + "adversaries[hidden-canonical]",
)
"""Seconds, not minutes; the cheapest first."""
