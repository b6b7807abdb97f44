"""Record a decode step that consists of several compiled pieces as one CUDA graph, and replay it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparse_compile.passes.ir.fx_nodes import value_of, writers
from sparse_compile.passes.torch_private import has_static_address, same_addresses

Compiled = Callable[..., Any]
MOST_RECORDED = 4  # caches of which a recording is kept at the same time


@dataclass
class _Recording:
    """A CUDA graph that reads ``inputs`` at ``addresses``.

    The inputs that are not static are copies, which every replay fills first. ``kinds`` are their shapes and dtypes, and the
    sizes among the inputs.
    """

    graph: torch.cuda.CUDAGraph
    inputs: list[Any]
    addresses: list[int | None]
    kinds: tuple[Any, ...]
    outputs: Any


class RecordedSteps:
    """Runs ``run``, whose inputs at the places ``static`` keep their addresses, as one CUDA graph.

    The first run with new addresses is an ordinary one, in which kernels are compiled and loaded. The second is recorded. The
    results of a run are overwritten by the next one.
    """

    def __init__(self, run: Compiled, static: Sequence[int]) -> None:
        self.run, self.static = run, list(static)
        self.others: list[int] | None = None  # the places of all other inputs
        self.recorded: OrderedDict[tuple[Any, ...], _Recording | None] = OrderedDict()  # None: it has run once
        self.latest: _Recording | None = None

    def __call__(self, *args: Any) -> Any:
        """Run one step."""
        if torch.cuda.is_current_stream_capturing():
            return self.run(*args)
        kinds = self._kinds(args)
        if self.latest and self.latest.kinds == kinds and same_addresses(args, self.latest.addresses, self.static):
            return self._replay(self.latest, args)
        key = (*(args[at].data_ptr() for at in self.static), *kinds)
        if key not in self.recorded:
            self.recorded[key] = None
            if len(self.recorded) > MOST_RECORDED:
                self.recorded.popitem(last=False)
            return self.run(*args)
        self.recorded.move_to_end(key)
        self.latest = self.recorded[key] = self.recorded[key] or self._record(args)
        return self._replay(self.latest, args)

    def _kinds(self, args: Sequence[Any]) -> tuple[Any, ...]:
        if self.others is None:
            static = set(self.static)
            self.others = [at for at in range(len(args)) if at not in static]
        return tuple(_kind(args[at]) for at in self.others)

    def _record(self, args: Sequence[Any]) -> _Recording:
        static = set(self.static)
        copied = [at for at, x in enumerate(args) if isinstance(x, Tensor) and at not in static]
        inputs = list(args)
        for at in copied:
            inputs[at] = args[at].clone()
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        # Another thread may use the device meanwhile, such as one that streams text.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            outputs = self.run(*inputs)
        addresses: list[int | None] = [x.data_ptr() if at in static else None for at, x in enumerate(inputs)]
        # What is static must stay alive as long as its owner wants, and no longer.
        copies = [x if at in copied else None for at, x in enumerate(inputs)]
        return _Recording(graph, copies, addresses, self._kinds(args), outputs)

    def _replay(self, recording: _Recording, args: Sequence[Any]) -> Any:
        for place, x in zip(recording.inputs, args, strict=True):
            if place is not None:
                place.copy_(x, non_blocking=True)
        recording.graph.replay()
        return recording.outputs


def _kind(x: Any) -> Any:
    return (tuple(x.shape), x.dtype) if isinstance(x, Tensor) else x


def static_inputs(inputs: Sequence[Any]) -> list[int]:
    """The places of the inputs of a graph, its placeholders, whose addresses do not change from run to run."""
    return [at for at, node in enumerate(inputs) if isinstance(value_of(node), Tensor) and has_static_address(node)]


def can_record(inputs: Sequence[Any]) -> bool:
    """Whether a graph with these placeholders can be recorded.

    All tensors are on one CUDA device, and what the graph writes has a static address. A write to any other input would reach
    only the copy that a replay reads. Sizes may change, as with a cache that is longer: each size has a recording of its own.
    """
    static = set(static_inputs(inputs))
    if any(writers(node) for at, node in enumerate(inputs) if at not in static):
        return False
    values = [value_of(node) for node in inputs]
    devices = {x.device for x in values if isinstance(x, Tensor)}
    known = all(isinstance(x, Tensor | torch.SymInt) for x in values)
    return known and len(devices) == 1 and next(iter(devices)).type == "cuda"
