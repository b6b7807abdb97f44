"""Plan the jobs of the quality bench, in groups that can run separately."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain

from bench.lab.data.tasks import TASKS
from bench.lab.evaluation import methods
from bench.lab.evaluation.jobs import Asking, Cell, Job, Reading, Size
from bench.lab.evaluation.methods import BUDGETS, FULL, RANDOM_SEEDS, Method
from sparse_compile import KVFormat
from sparse_compile.head_profile import Profile

NEEDLES = ("single", "multi", "multi_key", "multi_query", "turns")
OTHERS = tuple(name for name in TASKS if name not in NEEDLES)
TRAINED, SHORTER = 2048, 1024  # needles at the length the model was trained for, all other tasks at half of it
BARS = 500  # items per seed where a bar of two points is checked; the interval of 170 items is too wide for that
DEPTHS, LENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0), (512, 1024, 2048)


@dataclass(frozen=True)
class Plan:
    """The profiles and the size that all groups use."""

    gates: Profile
    echo: Profile
    size: Size

    def asking(self, makes: Callable[[int], Method]) -> Iterator[Job]:
        """Yield jobs for needles at the trained length and for all other tasks at the shorter one.

        ``makes`` returns the method for a length.
        """
        yield self.needles(makes(TRAINED))
        yield self.others(makes(SHORTER))

    def relaxed(self, makes: Callable[[int], Method]) -> Iterator[Job]:
        """Yield the same jobs with a relaxed prefill, and ``turns`` also with a prefilled question.

        Under a relaxed prefill, a question that is prefilled with the context sees more of the context.
        """
        yield self.needles(makes(TRAINED).relaxed(), Cell("turns", TRAINED, question="prefilled"))
        yield self.others(makes(SHORTER).relaxed())

    def same(self, method: Method) -> Iterator[Job]:
        """Yield the jobs of a method that is the same at all lengths."""
        return self.asking(lambda length: method)

    def needles(self, method: Method, *also: Cell) -> Job:
        """Return a job of the needle tasks at the trained length, and of the cells ``also``."""
        return Asking(method, (*(Cell(task, TRAINED) for task in NEEDLES), *also), TRAINED, self.size)

    def others(self, method: Method) -> Job:
        """Return a job of all other tasks at the shorter length."""
        # At half of the length, masks take a quarter of the memory, so more rows fit.
        size = replace(self.size, relaxed_rows=min(self.size.rows, self.size.items))
        return Asking(method, tuple(Cell(task, SHORTER) for task in OTHERS), SHORTER, size)


def heads(plan: Plan) -> Iterator[Job]:
    """Evaluate full attention, and a quarter of the heads by gates, by echo and by chance.

    Further jobs evaluate the model without its best heads, and without others.
    """
    plan = replace(plan, size=replace(plan.size, items=max(plan.size.items, BARS)))
    yield from plan.same(FULL)
    yield from plan.same(methods.quarter("gates", plan.gates))
    for method in (methods.quarter("gates", plan.gates).relaxed(), methods.quarter("echo", plan.echo)):
        yield plan.needles(method)
    for seed in RANDOM_SEEDS:
        yield plan.needles(methods.quarter(f"random {seed}", methods.random_profile(plan.gates, seed)))
    yield plan.needles(methods.without("without the best heads by gates", plan.gates))
    yield plan.needles(methods.without("without the best heads by echo", plan.echo))
    worst = Profile([[-score for score in row] for row in plan.gates.scores])
    yield plan.needles(methods.without("without the last heads by gates", worst))
    for seed in RANDOM_SEEDS:
        others = methods.random_others(plan.gates, seed)
        yield plan.needles(methods.without(f"without other heads, {seed}", others))


def static(plan: Plan) -> Iterator[Job]:
    """Evaluate sink and recent tokens, and heads by gates, echo and chance, at all budgets, with strict and relaxed prefill."""
    for budget in BUDGETS:
        window = partial(methods.sink_and_recent, budget)
        gates = partial(methods.by_heads, "gates", plan.gates, budget)
        echo = partial(methods.by_heads, "echo", plan.echo, budget)
        yield from chain(*map(plan.asking, (window, gates, echo)))
        yield from chain(*map(plan.relaxed, (window, gates)))
        for seed in RANDOM_SEEDS if budget == 1 / 4 else RANDOM_SEEDS[:2]:
            profile = methods.random_profile(plan.gates, seed)
            yield plan.needles(methods.by_heads(f"random {seed}", profile, budget, TRAINED))


def chosen(plan: Plan) -> Iterator[Job]:
    """Evaluate page selection, and full heads that select pages."""
    for budget in BUDGETS:
        selection = [partial(methods.pages, score, budget) for score in ("minmax", "mean")]
        both = partial(methods.heads_and_pages, plan.gates, budget)
        yield from chain(*map(plan.asking, (*selection, both)))
    yield plan.needles(methods.heads_and_pages(plan.gates, 1 / 4, TRAINED).relaxed())


def quantised(plan: Plan) -> Iterator[Job]:
    """Evaluate quantized caches of all tokens, and one of half of the bytes that is quantized as well."""
    for kv in ("int8", "fp8", "int4"):
        yield from plan.same(methods.in_fewer_bits(kv, kv))
    mixed = methods.in_fewer_bits(KVFormat("int8", "int4"), "int8 keys, int4 values")
    yield from plan.same(mixed)
    half = methods.by_heads("gates, a half, int8", plan.gates, 1 / 2, TRAINED)
    yield plan.needles(replace(half, kv="int8", budget=float("nan")))


def depths(plan: Plan) -> Iterator[Job]:
    """Evaluate one needle by depth and length, under methods that take a quarter of the bytes of the trained length."""
    cells = tuple(Cell("single", length, depth) for length in LENGTHS for depth in DEPTHS)
    for method in _quarters(plan):
        yield Asking(method, cells, TRAINED, plan.size)


def fluency(plan: Plan) -> Iterator[Job]:
    """Measure the perplexity of held-out text by position."""
    random = methods.by_heads("random 0", methods.random_profile(plan.gates, 0), 1 / 4, TRAINED)
    for method in (*_quarters(plan), random, methods.in_fewer_bits("int8", "int8"), methods.in_fewer_bits("int4", "int4")):
        yield Reading(method, TRAINED, plan.size)


def _quarters(plan: Plan) -> list[Method]:
    static = [FULL, methods.by_heads("gates", plan.gates, 1 / 4, TRAINED), methods.sink_and_recent(1 / 4, TRAINED)]
    return [*static, methods.pages("minmax", 1 / 4, TRAINED)]


GROUPS: dict[str, Callable[[Plan], Iterator[Job]]] = {
    "heads": heads, "depths": depths, "static": static, "chosen": chosen, "quantised": quantised, "fluency": fluency,
}  # fmt: skip
