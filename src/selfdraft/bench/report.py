"""Rows of single prompts made into one record for each task and drafter. What each figure means: docs/bench.md."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from statistics import fmean

from selfdraft.bench.rows import Row
from selfdraft.bench.scores import pass_at_k
from selfdraft.types import JsonObject, Stats

KS = (1, 10, 100)
"""Of pass@k, where there are so many samples; and the number of samples itself."""
INSIDE = (
    *("tokens_per_pass", "draft_acceptance_rate", "acceptance_by_position", "draft_tokens_per_pass"),
    *("draft_passes_per_token", "time_split", "ms_per_step", "host_ms_per_step"),
    *("weights_bytes", "cache_bytes", "working_bytes", "extra_bytes", "peak_bytes", "memory_vs_plain"),
    "resident_bytes",
)
"""Figures that are only known of our own engine."""
OWN = (*("peer_file", "texts_equal_own_plain", "prompts_different_own_plain", "decode_speedup_vs_own_plain"),)
"""Figures that are only known of other engines."""


def records(name: str, rows: SequenceOf[Row], labels: SequenceOf[str], unscored: str = "") -> list[JsonObject]:
    """One record for each drafter (plain first) and peer, and the same for each group of a task that was run whole.

    `rows` hold every drafter of every prompt. `unscored` says why the task has no score. A peer wrote as many tokens
    as plain decoding, so its speed is compared even where rounding made its text another one.
    """
    made = _of_part(name, rows, labels, unscored)
    groups = list(dict.fromkeys(row["group"] for row in rows))
    if "/" not in name and len(groups) > 1:
        for group in groups:
            part = [row for row in rows if row["group"] == group]
            made += _of_part(f"{name}/{group}", part, labels, unscored)
    return made


def _of_part(name: str, rows: SequenceOf[Row], labels: SequenceOf[str], unscored: str) -> list[JsonObject]:
    by_label = {label: [row for row in rows if row["drafter"] == label] for label in labels}
    plain = by_label[labels[0]]
    if not plain:
        return []
    scores = scores_of(plain)
    made = []
    for label, own in by_label.items():
        if not own:  # a peer that was lost
            continue
        equal, peer = all(row["texts_equal"] for row in own), own[0].get("peer")
        record = {"task": name, "drafter": label, "peer": peer, "options": own[0]["options"], "prompts": len(own)}
        record |= _speed(own, comparable=equal or peer is not None) | _equality(own)
        record |= dict.fromkeys(INSIDE) if peer is not None else _acceptance(own) | memory_of(own, plain)
        record |= _own_plain(own) if peer is not None else dict.fromkeys(OWN)
        ratio, memory = record["speedup_vs_plain"], record["memory_vs_plain"]
        record["speed_memory_ratio"] = round(ratio / memory, 4) if ratio and memory else None
        record["scores"] = scores if equal and peer is None else None
        record["unscored"] = "" if scores else unscored
        record["load_average_max"] = max(row["load_average"] for row in own)
        record["cores"] = cores_of(own)
        record["conditions"] = own[0]["conditions"]
        made.append(record)
    return made


def cores_of(rows: SequenceOf[Row]) -> list[str]:
    """How far the cores were apart while these rows were timed, each distance once; rows of older files do not say."""
    return list(dict.fromkeys(row["cores"] for row in rows if row.get("cores")))


def _speed(rows: SequenceOf[Row], *, comparable: bool) -> JsonObject:
    """Times add up over the prompts, so a long answer weighs more than a short one."""
    tokens = sum(row["tokens"] for row in rows)
    seconds, plain = _sum(rows, "seconds"), _sum(rows, "plain_seconds")
    late = tokens - len(rows)
    decoding = seconds - _sum(rows, "first_token_seconds")
    plain_decoding = plain - _sum(rows, "plain_first_token_seconds")
    each = [row["plain_seconds"] / row["seconds"] for row in rows]
    return {
        "tokens": tokens,
        "seconds": round(seconds, 4),
        "tokens_per_second": round(tokens / seconds, 3),
        "plain_tokens_per_second": round(tokens / plain, 3) if comparable else None,
        "speedup_vs_plain": round(plain / seconds, 4) if comparable else None,
        "speedup_lowest": round(min(each), 4) if comparable else None,
        "speedup_highest": round(max(each), 4) if comparable else None,
        "decode_tokens_per_second": round(late / decoding, 3) if late and decoding > 0 else None,
        "decode_speedup_vs_plain": round(plain_decoding / decoding, 4)
        if comparable and late and decoding > 0
        else None,
        "first_token_seconds": round(_sum(rows, "first_token_seconds") / len(rows), 4),
        "prompt_tokens_per_second": _prompt_speed(rows),
    }


def _prompt_speed(rows: SequenceOf[Row]) -> float | None:
    """Prompt tokens by the seconds until the first token; None where rows of an older version do not know them."""
    if any("prompt_tokens" not in row for row in rows):
        return None
    seconds = _sum(rows, "first_token_seconds")
    return round(_sum(rows, "prompt_tokens") / seconds, 3) if seconds > 0 else None


def _own_plain(rows: SequenceOf[Row]) -> JsonObject:
    """A peer beside the same engine without speculation, after the first token; None each where that did not run."""
    drafted = [sum(row.get("drafts", (0, 0))[i] for row in rows) for i in (0, 1)]
    found: JsonObject = dict.fromkeys(OWN) | {"peer_file": rows[0].get("peer_file")}
    found["draft_acceptance_rate"] = round(drafted[1] / drafted[0], 4) if drafted[0] else None
    both = [row for row in rows if "texts_equal_own_plain" in row]
    if len(both) < len(rows):
        return found
    seconds = _sum(rows, "seconds") - _sum(rows, "first_token_seconds")
    plain = _sum(rows, "own_plain_seconds") - _sum(rows, "own_plain_first_token_seconds")
    equal = {row["key"]: row["texts_equal_own_plain"] for row in rows}
    if None not in equal.values():
        found["texts_equal_own_plain"] = all(equal.values())
        found["prompts_different_own_plain"] = [key for key, same in equal.items() if not same]
    found["decode_speedup_vs_own_plain"] = round(plain / seconds, 4) if seconds > 0 and plain > 0 else None
    return found


def _equality(rows: SequenceOf[Row]) -> JsonObject:
    """`equal_tokens`: those before the first difference of each text, out of `tokens`."""
    firsts = [(row.get("first_difference"), row["tokens"]) for row in rows]
    if any(row["texts_equal"] is None for row in rows):  # other weights or random numbers: not compared
        return {"texts_equal": None, "equal_tokens": None, "prompts_different": []}
    return {
        "texts_equal": all(row["texts_equal"] for row in rows),
        "equal_tokens": sum(tokens if first is None else first for first, tokens in firsts),
        "prompts_different": [row["key"] for row in rows if not row["texts_equal"]],
    }


def _acceptance(rows: SequenceOf[Row]) -> JsonObject:
    stats = Stats()
    for row in rows:
        stats.add(stats_of(row["stats"]))
    split = {name: _sum([row["split"] for row in rows], name) for name in rows[0]["split"]}
    total = sum(split.values())
    return {
        "tokens_per_pass": round(stats.mean_acceptance_length, 4),
        "draft_acceptance_rate": round(stats.draft_acceptance_rate, 4),
        "acceptance_by_position": [round(share, 4) for share in by_position(stats)],
        "draft_tokens_per_pass": round(stats.num_draft_tokens / stats.num_steps, 4) if stats.num_steps else 0.0,
        "draft_passes_per_token": round(stats.num_draft_passes / stats.num_output_tokens, 4),
        "time_split": {name: round(seconds / total, 4) for name, seconds in split.items()},
        "ms_per_step": {
            name: round(1000 * seconds / stats.num_steps, 4) if stats.num_steps else None
            for name, seconds in split.items()
            if name != "prefill"
        },
        "host_ms_per_step": round(1000 * split["rest"] / stats.num_steps, 4) if stats.num_steps else None,
    }


def memory_of(own: SequenceOf[Row], plain: SequenceOf[Row]) -> JsonObject:
    """Peak memory in bytes: weights, cache, work, and what the method needs beyond plain decoding.

    A method runs the same target, so it never needs less than plain decoding: what looks like it is noise of the gauge.
    """
    memory, base = _most(own), _most(plain)
    extra = memory["adapter"] + memory.get("copy", 0) + max(memory["working"] - base["working"], 0)
    plain_peak = memory["weights"] + memory["cache"] + base["working"]
    peak = plain_peak + extra
    return {
        "weights_bytes": memory["weights"],
        "cache_bytes": memory["cache"],
        "working_bytes": memory["working"],
        "extra_bytes": extra,
        "peak_bytes": peak,
        "memory_vs_plain": round(peak / plain_peak, 4) if plain_peak else None,
        "resident_bytes": memory.get("resident") or None,
    }


def _most(rows: SequenceOf[Row]) -> dict[str, int]:
    """The most of each kind of memory over the prompts; unknown counts as none."""
    return {name: max(row["memory"].get(name) or 0 for row in rows) for name in rows[0]["memory"]}


def by_position(stats: Stats) -> list[float]:
    """Share of the drafted steps in which the first d draft tokens on the path were all accepted, d = 1, 2, ...

    Ends with the deepest position that was ever accepted. vLLM's acceptance rate per position is the same share.
    """
    histogram, steps = stats.acceptance_histogram, stats.num_spec_steps
    deepest = max((accepted for accepted, times in histogram.items() if times), default=0)
    return [
        sum(times for accepted, times in histogram.items() if accepted >= depth) / steps
        for depth in range(1, deepest + 1)
    ]


def stats_of(counts: JsonObject) -> Stats:
    """The counts as they were before they went through JSON."""
    names = ("num_spec_steps", "num_steps", "num_draft_tokens", "num_accepted_draft_tokens", "num_output_tokens")
    stats = Stats(**{name: counts[name] for name in (*names, "num_draft_passes")})
    stats.acceptance_histogram = {int(accepted): times for accepted, times in counts["acceptance_histogram"].items()}
    return stats


def scores_of(plain: SequenceOf[Row]) -> dict[str, float]:
    """Means over the prompts of what their plain texts scored; code as pass@k."""
    scored = [row["scores"] for row in plain if row["scores"]]
    if not scored:
        return {}
    if "passed" not in scored[0]:
        return {name: round(fmean(score[name] for score in scored), 4) for name in scored[0]}
    samples = len(scored[0]["passed"])
    wanted = sorted({k for k in KS if k <= samples} | {samples})
    return {f"pass@{k}": round(fmean(pass_at_k(samples, sum(s["passed"]), k) for s in scored), 4) for k in wanted}


def _sum(rows: SequenceOf[JsonObject], name: str) -> float:
    return float(sum(row[name] for row in rows))
