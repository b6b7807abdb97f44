"""Repeat the decode steps of one call of ``generate`` without asking Dynamo each time whether the model is still the same.

Dynamo checks thousands of facts about a model before each call, and collects hundreds of tensors. In a decode step this takes
longer than everything else on the host, and meanwhile the device waits. While one call of ``generate`` runs, these facts do not
change, so the first two steps go through Dynamo, and those after them call the compiled graph again, with new tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sparse_compile.dynamo import GraphRun
from sparse_compile.passes import torch_private


@dataclass(frozen=True)
class Step:
    """A call of a model that ran one graph.

    ``kinds`` describes its keyword arguments. ``args`` are those of the graph: tensors of the model and of the cache, sizes,
    and None at the places of ``inputs``, which are tensors among the keyword arguments. ``fields`` are those of the model's
    output: the number of a result of the graph, or a value.
    """

    run: Callable[..., Any]
    kinds: dict[str, Any]
    args: tuple[Any, ...]
    inputs: dict[int, str]
    output: type
    fields: dict[str, tuple[int | None, Any]]

    def takes(self, kwargs: Mapping[str, Any]) -> bool:
        """Whether a call with these arguments does the same with other tokens."""
        return kwargs.keys() == self.kinds.keys() and all(_is_kind(x, self.kinds[name]) for name, x in kwargs.items())

    def equals(self, other: Step) -> bool:
        """Whether both ran the same graph on the same tensors of model and cache."""
        facts = [(x.run, x.inputs, x.output, x.fields.keys(), len(x.args)) for x in (self, other)]
        values = zip((*self.args, *self.fields.values()), (*other.args, *other.fields.values()), strict=False)
        return facts[0] == facts[1] and all(_is_same(x, y) for x, y in values)

    def repeat(self, kwargs: Mapping[str, Any]) -> Any:
        """Run the graph with the tensors of ``kwargs``, and return an output of the model."""
        args = list(self.args)
        for at, name in self.inputs.items():
            args[at] = kwargs[name]
        torch_private.begin_call()
        results = self.run(*args)
        return self.output(**{name: value if at is None else results[at] for name, (at, value) in self.fields.items()})


class Steps:
    """The decode steps of one kind in one call of ``generate``. ``owner`` is the compiled call that made the last step."""

    def __init__(self) -> None:
        self.owner: Any = None
        self.latest: Step | None = None
        self.known: Step | None = None  # two steps in a row were this one

    def find(self, owner: Any, kwargs: Mapping[str, Any]) -> Step | None:
        """The step that a call with these arguments repeats; None if Dynamo has to look at it."""
        if self.known is not None and self.owner is owner and self.known.takes(kwargs):
            return self.known
        return None

    def note(self, owner: Any, step: Step | None) -> None:
        """Record a call that went through Dynamo. ``step`` is None if it cannot be repeated.

        A model that changes between two steps, such as one that counts its calls, runs another graph or other tensors.
        """
        same = self.owner is owner and step is not None and self.latest is not None and step.equals(self.latest)
        self.owner, self.latest, self.known = owner, step, step if same else None


_current: ContextVar[dict[Hashable, Steps] | None] = ContextVar("sparse_compile_steps", default=None)


@contextmanager
def repeating_steps() -> Iterator[None]:
    """A context, which is one call of ``generate``, in which decode steps are repeated."""
    token = _current.set({})
    try:
        yield
    finally:
        _current.reset(token)


def current_steps(kind: Hashable) -> Steps | None:
    """The steps of one kind in the call of ``generate`` that runs in this thread; None outside of one."""
    steps = _current.get()
    return None if steps is None else steps.setdefault(kind, Steps())


def read_step(kwargs: Mapping[str, Any], ran: GraphRun, output: Any) -> Step | None:
    """Describe a call of a model with ``kwargs``, in which one graph ran; None if it cannot be repeated.

    The output has to be a mapping of results of the graph, and has to contain all of them: one that it lacks is a change
    of the model, such as a list of hidden states that a hook extends.
    """
    run, args, results = ran
    numbers = {id(x): at for at, x in enumerate(results)}
    named = {id(x): name for name, x in kwargs.items() if isinstance(x, Tensor)}
    known = all(isinstance(x, Tensor) or _is_constant(x) for x in (*args, *results))
    if not (known and isinstance(output, Mapping) and len(named) == sum(isinstance(x, Tensor) for x in kwargs.values())):
        return None
    fields = {name: (numbers.get(id(x)), None if id(x) in numbers else x) for name, x in output.items()}
    found = {at for at, _ in fields.values()} - {None}
    others = [x for at, x in fields.values() if at is None]
    if len(found) < len(results) or not all(_is_constant(x) or any(x is y for y in kwargs.values()) for x in others):
        return None
    inputs = {at: named[id(x)] for at, x in enumerate(args) if id(x) in named}
    kept = tuple(None if at in inputs else x for at, x in enumerate(args))
    return Step(run, {name: _kind(x) for name, x in kwargs.items()}, kept, inputs, type(output), fields)


def _kind(x: Any) -> Any:
    return (type(x), x.shape, x.stride(), x.dtype, x.device, x.requires_grad) if isinstance(x, Tensor) else x


def _is_kind(x: Any, kind: Any) -> bool:
    return bool(_kind(x) == kind) if isinstance(x, Tensor) else _is_same(x, kind)


def _is_same(x: Any, y: Any) -> bool:
    if isinstance(x, tuple) and isinstance(y, tuple):
        return len(x) == len(y) and all(map(_is_same, x, y))
    return x is y or (_is_constant(x) and type(x) is type(y) and bool(x == y))


def _is_constant(x: Any) -> bool:
    return x is None or isinstance(x, bool | int | float | str)
