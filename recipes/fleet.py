"""How many replicas, and what they cost: a simulation from measured passes and kept rows, and its check on real ones.

    python -m recipes.fleet batch --profile PROFILE.json --rows ROWS.jsonl
    python -m recipes.fleet plan --profile PROFILE.json --rows ROWS.jsonl --replicas 1000 --rates 0.2,0.4,0.6
    python -m recipes.fleet table PLAN.out ... --plot FLEET.png
    python -m recipes.fleet costs --pid PID --profile PROFILE.json --rows ROWS.jsonl --output HOST.json
    python -m recipes.fleet check LOAD.json ... --profile PROFILE.json --rows ROWS.jsonl --replicas 2 --host HOST.json

`PROFILE.json`: what `selfdraft tune machine --json` prints, or the profile that it has kept. `ROWS.jsonl`: what
`selfdraft bench --drafters auto --output` wrote: lengths of prompts and answers, and what became of drafts.
`batch` says at which batch drafting stops paying. `plan` runs a fleet with and without drafting, routed by
conversation and in turn: tokens per second, times, cost per million tokens; `table` puts several such runs together.
`costs` measures what a running server takes of the processors beside its passes. `check` puts `selfdraft bench serve
--json` of real replicas beside the simulation of the same requests, with `--host` on one machine with all these costs.
Needs `pip install 'selfdraft[fleet]'`. Results: docs/scaling.md.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path

from recipes.fleet_costs import LENGTHS, Passes, at_rest, host_from, under_load
from recipes.fleet_host import Host, as_json, read_host
from recipes.fleet_simulation import Fleet, Kind, Serving, chats, kind_of, steady_speed

from selfdraft.bench.charts import draw_load
from selfdraft.bench.load.arrivals import Ask, Point, plan
from selfdraft.bench.load.conditions import client_machine
from selfdraft.bench.load.figures import Round, figures
from selfdraft.bench.results import read_rows
from selfdraft.bench.tasks import Item, load, names_of
from selfdraft.drafting.cost_model import Profile
from selfdraft.errors import SelfdraftError
from selfdraft.types import JsonObject

BATCHES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
HOUR, MILLION = 3600.0, 1e6
APART = 0.005
"""Seconds between the first requests of two clients, where nothing is known of what a client does."""


def profile_from(path: Path) -> Profile:
    """A profile of `selfdraft tune machine`, as it was printed (--json) or kept."""
    try:
        given = json.loads(path.read_text("utf-8"))["profile"]
        lists = {name: tuple(given.pop(name)) for name in ("rows", "seconds", "per_token")}
        return Profile(**(given | lists))
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise SystemExit(f"{path} is no profile: give what 'selfdraft tune machine --json' prints ({error})") from error


def kinds_from(paths: SequenceOf[Path], drafter: str) -> dict[str, Kind]:
    """The answers of a drafter in kept rows, by the names that `bench serve` has for their prompts.

    Of a prompt that was answered several times the longest answer counts, of equal ones the last: requests shorten it.
    """
    found: dict[str, Kind] = {}
    for row in read_rows(paths):
        if row["drafter"] == drafter:
            group, kind = f"/{row['group']}" if row["group"] else "", kind_of(row)
            name = f"{row['task']}{group} {row['key']}"
            if name not in found or kind.output >= found[name].output:
                found[name] = kind
    if not found:
        raise SystemExit(f"no rows of the drafter {drafter!r} in {', '.join(map(str, paths))}")
    return found


def serving_of(given: argparse.Namespace) -> Serving:
    beside = profile_from(given.beside) if given.beside else None
    sizes = {"slots": given.max_batch, "chunk": given.prefill_chunk, "queue": given.max_queue}
    host = read_host(given.host) if given.host else None
    return Serving(profile_from(given.profile), host=host, pace=given.stream_pace, beside=beside, **sizes)


def told(fleet: Fleet) -> JsonObject:
    """The figures of a run, as `bench serve` counts them, and what the replicas did."""
    round_ = Round("", Point(), 1, fleet.answers, 0.0, whole=True)
    found, replicas = figures([round_], {}), fleet.replicas.values()
    steps = sum(one.steps for one in replicas)
    found["replicas"], found["busy_seconds"] = len(replicas), sum(one.busy for one in replicas)
    found["busy_share"] = found["busy_seconds"] / (len(replicas) * fleet.env.now)
    found["answers_per_step"] = sum(one.decoded for one in replicas) / steps
    return found


# Batch


def batch(given: argparse.Namespace) -> None:
    """The speed-up of steps that draft, by the answers in a step; prompts are not read meanwhile."""
    serving = serving_of(given)
    kinds = [*kinds_from(given.rows, given.drafter).values()]
    remembered = sum(kind.prompt + kind.output // 2 for kind in kinds) // len(kinds)
    print(f"{len(kinds)} kinds of answers, each behind {remembered} cached tokens")
    print("| answers in a step | plain, tokens/s | all draft | those for which it pays |")
    print("|---:|---:|---:|---:|")
    for count in BATCHES:
        servings = [replace(serving, policy=policy) for policy in ("none", "always", "pays")]
        plain, always, pays = (steady_speed(one, kinds, count, remembered) for one in servings)
        print(f"| {count} | {plain:.1f} | {always / plain:.2f}x | {pays / plain:.2f}x |")


# Plan


def plan_fleet(given: argparse.Namespace) -> None:
    """Fleets under the same conversations: with and without drafting, routed by conversation and in turn."""
    kinds = [*kinds_from(given.rows, given.drafter).values()]
    serving, records = serving_of(given), list[JsonObject]()
    for rate in map(float, given.rates.split(",")):
        sizes = {"turns": given.turns, "think": given.think, "most": given.context}
        asked = chats(kinds, rate * given.replicas, given.seconds, given.seed, **sizes)
        for policy, routing in product(given.policies.split(","), given.routings.split(",")):
            fleet = Fleet(given.replicas, replace(serving, policy=policy), routing=routing, seed=given.seed)
            fleet.arriving(asked)
            found = told(fleet)
            found |= {"server": f"{POLICY[policy]}, {ROUTING[routing]}", "rate": rate, "concurrency": None}
            hours = found["busy_seconds"] / HOUR  # of the steps: a fleet is sized so that little time is idle
            found["cost_per_million"] = given.price * hours * MILLION / max(found["tokens"], 1)
            records.append(found)
            print(json.dumps(found), flush=True)
    show(records, given)


def read_plans(given: argparse.Namespace) -> None:
    """The table and the picture of what `plan` has printed."""
    lines = [line for path in given.files for line in path.read_text("utf-8").splitlines()]
    show([json.loads(line) for line in lines if line.startswith("{")], given)


def show(records: SequenceOf[JsonObject], given: argparse.Namespace) -> None:
    print("\n".join(table(records)))
    if given.plot:
        draw_load(records, given.plot, [f"{records[0]['replicas']} replicas; rates are of one replica; {given.about}"])


POLICY = {"none": "plain", "always": "all draft", "pays": "drafting where it pays"}
ROUTING = {"conversation": "by conversation", "round-robin": "in turn", "fewest": "to the fewest"}


def table(records: Iterable[JsonObject]) -> Iterator[str]:
    yield (
        "| requests/s of a replica | | refused | prompt found | TTFT p50 / p95 / p99, s "
        "| time per token p50 / p95 / p99, ms | seconds of a replica per 1,000 tokens | cost per million tokens |"
    )
    yield "|---:|---|---:|---:|---:|---:|---:|---:|"
    for one in records:
        ttft = " / ".join(f"{one['ttft_ms'][name] / 1e3:.2f}" for name in ("p50", "p95", "p99"))
        tpot = " / ".join(f"{one['tpot_ms'][name]:.0f}" for name in ("p50", "p95", "p99"))
        share = 1 - one["answered"] / one["requests"]
        yield (
            f"| {one['rate']:g} | {one['server']} | {share:.1%} | {one['cached_share']:.0%} | {ttft} | {tpot} "
            f"| {one['busy_seconds'] / one['tokens'] * 1e3:.1f} | {one['cost_per_million']:.2f} |"
        )


# Costs


def costs(given: argparse.Namespace) -> None:
    """What a server takes beside its passes; see recipes/fleet_costs.py. One request at a time, without drafts."""
    kinds, serving = kinds_from(given.rows, given.drafter), serving_of(given)
    if given.pid is None or given.output is None:
        raise SystemExit("costs needs --pid, the process of 'selfdraft serve', and --output, where to write them")
    loads = [under_load(given.url, given.pid, size, given.dataset, given.requests) for size in LENGTHS]
    rest = at_rest(given.pid, given.rest)  # last: a server that has just started is still at work

    def busy(asks: SequenceOf[tuple[str, Kind]]) -> float:
        fleet = Fleet(given.replicas, serving)
        fleet.closed(asks, 1)
        return sum(one.busy for one in fleet.replicas.values())

    (few, asks), (many, others) = loads
    short = kinds_of(asks, kinds, given.dataset)
    prompts = busy([(key, replace(kind, output=1)) for key, kind in short])
    rows = sum(kind.prompt - 1 for _, kind in short)
    passes = Passes(busy(short), busy(kinds_of(others, kinds, given.dataset)), prompts, rows)
    host = host_from(rest, few, many, given.processors, passes)
    measured = [asdict(one) for one in (rest, few, many)]
    document = {"host": as_json(host), "measured": measured, "passes": asdict(passes), "client": client_machine()}
    given.output.write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    print("\n".join(told_costs(host)))


def told_costs(host: Host) -> Iterator[str]:
    yield "| process | ms of a request | ms of a part |"
    yield "|---|---:|---:|"
    for name, cost in [("replica, beside passes", host.replica), *host.way, ("others", host.beside)]:
        yield f"| {name} | {1e3 * cost.request:.1f} | {1e3 * cost.part:.2f} |"
    always = f"{host.always:.2f} of {host.processors:g} cores are taken all the time"
    steps = (
        f"an answer adds {1e3 * host.per_answer:.2f} ms to a step, a row of a prompt saves {1e3 * host.unasked:.2f} ms"
    )
    yield f"{always}; {steps}."


# Check


def check(given: argparse.Namespace) -> None:
    """The requests of real runs (`bench serve --json`), simulated, beside what was measured."""
    kinds = kinds_from(given.rows, given.drafter)
    serving = serving_of(given)
    print("| server | requests at a time | | measured | simulated | simulated / measured |")
    print("|---|---:|---|---:|---:|---:|")
    for path in given.files:
        document = json.loads(path.read_text("utf-8"))
        conditions = document["conditions"]
        asks = kinds_of(asked_in(conditions), kinds, conditions["dataset"])
        options = {one["name"]: one["options"] for one in conditions["servers"]}
        for point in document["points"]:
            plain = options[point["server"]].get("speculative_config", {}).get("method") == "none"
            found = simulated(replace(serving, policy="none" if plain else "pays"), given, point, asks)
            for name, real, ours in compared(point, found):
                words = f"{real:.1f} | {ours:.1f} | {ours / real:.2f}"
                print(f"| {point['server']} | {point['concurrency']} | {name} | {words} |")


def kinds_of(asks: Iterable[Ask], kinds: Mapping[str, Kind], dataset: str) -> list[tuple[str, Kind]]:
    """What requests are by the kept rows, no longer than was asked. Errors: SystemExit for one that is not in them."""
    found = []
    for ask in asks:
        key = ask.key.rpartition(", at most ")[0]
        if key not in kinds:
            raise SystemExit(f"{key!r} is not in the rows: run 'selfdraft bench --tasks {dataset}'")
        found.append((key, replace(kinds[key], output=min(kinds[key].output, ask.max_tokens))))
    return found


def asked_in(conditions: JsonObject) -> list[Ask]:
    """The requests of a round in their order, as `bench serve` has drawn them."""
    names = names_of(conditions["dataset"])
    items = [Item(f"{name} {one.key}", one.turns) for name in names for one in load(name, None, chat=True, limit=None)]
    count = conditions["requests"] + conditions["warmup"]
    lengths = [int(size) for size in str(conditions["max_tokens"]).split(",")]
    return plan(items, count, lengths, [], conditions["seed"])[: conditions["requests"]]


def simulated(
    serving: Serving, given: argparse.Namespace, point: JsonObject, asks: SequenceOf[tuple[str, Kind]]
) -> JsonObject:
    """The figures of a point, of so many rounds that it does not matter which replicas the conversations drew."""
    apart = 0.0 if serving.host else APART  # with a host the client's own work lies between two
    rounds = []
    for number in range(given.draws):
        fleet = Fleet(given.replicas, serving, routing=given.routing, seed=given.seed + number)
        if serving.beside is not None:
            fleet.pair_up()
        fleet.closed(asks, point["concurrency"], apart)
        rounds.append(Round("", Point(), number, fleet.answers, 0.0, whole=True))
    return figures(rounds, {})


def compared(real: JsonObject, ours: JsonObject) -> Iterator[tuple[str, float, float]]:
    yield "tokens per second", real["tokens_per_second"], ours["tokens_per_second"]
    for name, words in (("latency_ms", "latency"), ("ttft_ms", "TTFT"), ("tpot_ms", "time per token")):
        yield f"{words}, p50, ms", real[name]["p50"], ours[name]["p50"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["batch", "plan", "table", "costs", "check"])
    parser.add_argument(
        "files", nargs="*", type=Path, help="of check: what bench serve --json wrote; of table: what plan printed"
    )
    parser.add_argument("--profile", type=Path)
    parser.add_argument("--beside", type=Path, help="a profile measured while the other core did the same")
    parser.add_argument("--rows", type=Path, nargs="+")
    parser.add_argument("--drafter", default="auto", help="whose rows")
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--max-batch", type=int, default=16)
    parser.add_argument("--max-queue", type=int, default=64)
    parser.add_argument("--prefill-chunk", type=int, default=256)
    parser.add_argument("--host", type=Path, help="of check: what costs has written of the machine that all share")
    parser.add_argument("--stream-pace", type=float, default=0.0, help="that of 'selfdraft serve'")
    parser.add_argument("--draws", type=int, default=30, help="of check: rounds that are simulated")
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1", help="of costs: the server")
    parser.add_argument("--pid", type=int, help="of costs: the process of 'selfdraft serve'")
    parser.add_argument("--dataset", default="quick/chat", help="of costs: the task whose prompts are asked")
    parser.add_argument("--requests", type=int, default=12, help="of costs: of each length of answers")
    parser.add_argument("--rest", type=float, default=10.0, help="of costs: seconds without any request")
    parser.add_argument("--processors", type=float, default=os.cpu_count(), help="of costs: cores of the machine")
    parser.add_argument("--output", type=Path, help="of costs: the file that --host reads")
    parser.add_argument("--routing", default="conversation", choices=ROUTING)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rates", default="0.2,0.4,0.6", help="of plan: requests a second of one replica")
    parser.add_argument("--seconds", type=float, default=120.0, help="of plan: while conversations begin")
    parser.add_argument("--turns", type=int, default=4, help="of plan: turns of a conversation on average")
    parser.add_argument("--think", type=float, default=10.0, help="of plan: seconds between two turns on average")
    parser.add_argument("--context", type=int, default=2048, help="of plan: most tokens of a conversation")
    parser.add_argument("--price", type=float, default=0.05, help="of plan: of one replica for an hour")
    parser.add_argument("--policies", default="none,pays", help="of plan: none, always, pays")
    parser.add_argument("--routings", default="conversation,round-robin", help="of plan: also fewest")
    parser.add_argument("--plot", type=Path, help="of plan: a picture (PNG)")
    parser.add_argument("--about", default="", help="of plan: words under the picture")
    given = parser.parse_args()
    if given.what != "table" and not (given.profile and given.rows):
        parser.error("--profile and --rows are needed")
    try:
        {"batch": batch, "plan": plan_fleet, "table": read_plans, "costs": costs, "check": check}[given.what](given)
    except SelfdraftError as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
