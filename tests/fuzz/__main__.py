"""Play random cases for a night: ``python -m fuzz --count 10000 --seed 0 --processes 2``."""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Iterator
from multiprocessing import get_context

from fuzz.batches import BATCH, play_batch
from fuzz.case import Case, Generate
from fuzz.play import Verdict
from fuzz.reduce import reduced

MOST_REDUCED = 3  # faults of one kind that are reduced to a small case


def played(count: int, first: int, processes: int) -> Iterator[tuple[Case, Verdict]]:
    """Play ``count`` cases, beginning with batch ``first``."""
    tasks = [(first + number, min(BATCH, count - number * BATCH)) for number in range(-(-count // BATCH))]
    if processes == 1:
        for task in tasks:
            yield from play_batch(task)
        return
    with get_context("spawn").Pool(processes, maxtasksperchild=10) as pool:
        for results in pool.imap_unordered(play_batch, tasks):
            yield from results


def kind_of(case: Case, verdict: Verdict) -> str:
    """What makes two faults look alike."""
    if verdict.kind != "wrong":
        return f"{verdict.kind}: {verdict.detail.split('):')[0]}"
    calls = sorted({type(call).__name__ for call in case.calls})
    facts = [case.cache.kind, "padded" * case.is_padded, "selects" * case.selects, case.cache.kv or ""]
    facts += ["moves" * case.cache.cache_positions, "relaxed" * (case.cache.mode != "strict")]
    facts += [call.implementation or "" for call in case.calls if isinstance(call, Generate)][:1]
    return f"wrong: {' '.join(fact for fact in facts if fact)}; {', '.join(calls)}"


def main() -> int:
    """Play, print progress and every fault with a program that repeats it, and return 1 if there were any."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10000)
    parser.add_argument("--seed", type=int, default=0, help="the number of the first batch of cases")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument(
        "--reduce", action=argparse.BooleanOptionalAction, default=True, help="find a small case for each fault"
    )
    options = parser.parse_args()
    ends: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    start = time.monotonic()
    for number, (case, verdict) in enumerate(played(options.count, options.seed, options.processes), start=1):
        ends[verdict.kind] += 1
        if verdict.is_fault:
            kind = kind_of(case, verdict)
            kinds[kind] += 1
            if kinds[kind] <= MOST_REDUCED:
                small = reduced(case, verdict) if options.reduce and kinds[kind] == 1 else case
                print(f"\n# {kind}\n# {verdict.detail}\n{small.script()}", flush=True)
        if number % BATCH == 0 or number == options.count:
            counts = ", ".join(f"{count} {end}" for end, count in ends.most_common())
            print(f"{number} of {options.count} cases in {time.monotonic() - start:.0f} s: {counts}", flush=True)
    for kind, count in kinds.most_common():
        print(f"{count} x {kind}")
    return 1 if kinds else 0


if __name__ == "__main__":
    sys.exit(main())
