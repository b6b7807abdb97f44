"""Check when a step is recorded and what a replay reads, with a graph that runs the step again instead of CUDA."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, fx

from sparse_compile.passes.pieces.record_steps import MOST_RECORDED, RecordedSteps, can_record
from sparse_compile.passes.torch_private import fake_tensors


class Graph:
    """Stands for a CUDA graph: a replay computes the step from the recorded inputs, into the recorded outputs."""

    made: ClassVar[list[Graph]] = []

    def __init__(self) -> None:
        self.made.append(self)
        self.steps: list[tuple[Any, ...]] = []
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        for inputs, outputs in self.steps:
            for out, new in zip(outputs, step(*inputs), strict=True):
                out.copy_(new)


def step(weight: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    return (weight * x, x + 1)


def run(weight: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    outputs = step(weight, x)
    if Graph.made and not Graph.made[-1].steps and recording:
        Graph.made[-1].steps.append(((weight, x), outputs))
    return outputs


recording: list[bool] = []


@contextmanager
def capture(graph: Graph, **_: Any) -> Iterator[None]:
    recording.append(True)
    yield
    recording.clear()


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    Graph.made.clear()
    for name, value in (("CUDAGraph", Graph), ("graph", capture), ("synchronize", lambda: None)):
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)


@pytest.mark.usefixtures("on_cpu")
def test_the_second_run_is_recorded_and_later_ones_replay_it_with_new_inputs() -> None:
    weight, steps = torch.full((3,), 2.0), RecordedSteps(run, [0])
    for number in range(5):
        x = torch.full((3,), float(number))  # a tensor with an address of its own every time
        out = steps(weight, x)
        assert [y.tolist() for y in out] == [(weight * x).tolist(), (x + 1).tolist()]
        weight.add_(1)  # what is written in place is seen, as the buffers of a cache are
    assert len(Graph.made) == 1 and Graph.made[0].replays == 4


@pytest.mark.usefixtures("on_cpu")
def test_other_addresses_get_a_recording_of_their_own_and_old_ones_are_found_again() -> None:
    weights, steps = [torch.full((2,), float(n)) for n in range(2)], RecordedSteps(run, [0])
    for _ in range(3):
        for weight in weights:
            for x in (torch.ones(2), torch.zeros(2)):
                assert torch.equal(steps(weight, x)[0], weight * x)
    assert len(Graph.made) == 2


@pytest.mark.usefixtures("on_cpu")
def test_only_a_few_recordings_are_kept() -> None:
    weights, steps = [torch.ones(2) * n for n in range(3 * MOST_RECORDED)], RecordedSteps(run, [0])
    for weight in weights:
        for _ in range(3):
            assert torch.equal(steps(weight, torch.ones(2))[0], weight)
    assert len(steps.recorded) == MOST_RECORDED


@pytest.mark.usefixtures("on_cpu")
def test_a_size_among_the_inputs_has_a_recording_of_its_own() -> None:
    """As with a cache that is longer than the one before it. Even at the same address, it is another step."""

    def sized(weight: Tensor, length: int, x: Tensor) -> tuple[Tensor]:
        def compute(weight: Tensor, length: int, x: Tensor) -> tuple[Tensor]:
            return (weight[:length].sum() * x,)

        outputs = compute(weight, length, x)
        if recording:
            graph = Graph.made[-1]
            graph.replay = lambda: outputs[0].copy_(compute(weight, length, x)[0])  # type: ignore[method-assign, assignment]
        return outputs

    weight, steps = torch.ones(8), RecordedSteps(sized, [0])
    for length in (4, 8, 4):
        for number in range(3):
            assert steps(weight, length, torch.tensor(float(number)))[0].item() == length * number
    assert len(Graph.made) == 2


@pytest.mark.parametrize(("written", "static"), [("weight", True), ("x", False)])
def test_a_step_that_writes_a_copied_input_is_not_recorded(written: str, static: bool) -> None:
    graph = fx.Graph()
    inputs = {name: graph.placeholder(name) for name in ("weight", "x")}
    with fake_tensors():
        for node in inputs.values():
            node.meta["example_value"] = torch.empty(3, device="cuda")
    inputs["weight"].meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
    graph.call_method("add_", (inputs[written], 1))
    graph.output(())
    assert can_record(list(inputs.values())) is static
