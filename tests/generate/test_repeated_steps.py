"""Check that ``generate`` repeats its steps without Dynamo, and only while the model does the same in each of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, LogitsProcessorList

import sparse_compile as sc
from support.generating import llama

TOKENS = 8
Change = Callable[[nn.Module], None]


def prompt() -> Tensor:
    torch.manual_seed(1)
    return torch.randint(3, 60, (1, 20))


def generate(model: Any, **options: Any) -> Tensor:
    tokens: Tensor = model.generate(prompt(), max_new_tokens=TOKENS, do_sample=False, eos_token_id=None, **options)
    return tokens


def calls_of_dynamo(model: Any) -> list[int]:
    """A list that grows by the number of tokens of each call of ``model`` that passes through Dynamo."""
    call, seen = model._compiled_call_impl, list[int]()
    run = call.run

    def counted(*args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs["input_ids"].shape[1])
        return run(*args, **kwargs)

    call.run = counted
    return seen


def test_two_steps_pass_through_dynamo_and_the_others_repeat_them() -> None:
    fast = sc.compile(llama(), inner="eager")
    seen = calls_of_dynamo(fast)
    for _ in range(3):
        seen.clear()
        assert torch.equal(generate(fast), generate(llama()))
        assert seen == [20, 1, 1]
    assert fast.sparse_compile_report.compiles == 2


def test_a_longer_cache_has_steps_of_its_own() -> None:
    fast, stock = sc.compile(llama(), inner="eager"), llama()
    for length in (20, 150, 20, 150):
        ids = prompt().repeat(1, 8)[:, :length]
        seen = calls_of_dynamo(fast)
        new = [model.generate(ids, max_new_tokens=TOKENS, do_sample=False, eos_token_id=None) for model in (fast, stock)]
        assert torch.equal(*new) and seen == [length, 1, 1]


def counts_its_calls(model: nn.Module) -> None:
    """Scale the output by a number that grows with each call."""

    def hook(module: Any, args: Any, output: Tensor) -> Any:
        module.count += 1
        return output * (1.0 + module.count)

    layer: Any = model.get_submodule("model.norm")
    layer.count = 0
    layer.register_forward_hook(hook)


def keeps_its_outputs(model: nn.Module) -> None:
    """Add the output of the last call to that of this one."""

    def hook(module: Any, args: Any, output: Tensor) -> Any:
        before, module.before = module.before, output[:, -1:]
        return output + before

    layer: Any = model.get_submodule("model.norm")
    layer.before = torch.zeros(1, 1, 1)
    layer.register_forward_hook(hook)


def writes_a_buffer(model: nn.Module) -> None:
    """Scale the output by a buffer that each call changes in place."""

    def hook(module: Any, args: Any, output: Tensor) -> Any:
        module.scale.mul_(-1.5)
        return output * module.scale

    layer = model.get_submodule("model.norm")
    layer.register_buffer("scale", torch.ones(1))
    layer.register_forward_hook(hook)


@pytest.mark.parametrize("change", [counts_its_calls, keeps_its_outputs, writes_a_buffer])
def test_a_model_with_a_state_of_its_own_gives_the_same_logits(change: Change) -> None:
    logits = []
    for compiled in (False, True):
        model = llama()
        change(model)
        if compiled:
            model = sc.compile(model, inner="eager")
        found = generate(model, output_logits=True, return_dict_in_generate=True)
        logits.append(torch.stack(found.logits))  # type: ignore[attr-defined]
    torch.testing.assert_close(logits[1], logits[0])


def test_outputs_that_hooks_collect_are_complete() -> None:
    model, seen = llama(), list[Tensor]()
    model.get_submodule("model.norm").register_forward_hook(lambda module, args, output: seen.append(output))
    generate(sc.compile(model, inner="eager"))
    assert [x.shape[1] for x in seen] == [20, *[1] * (TOKENS - 1)]


class _Edits(LogitsProcessor):
    """Changes the weights of a model in place after a number of steps."""

    def __init__(self, model: nn.Module) -> None:
        self.weight, self.calls = model.get_parameter("lm_head.weight"), 0

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        self.calls += 1
        if self.calls == 5:
            with torch.no_grad():
                self.weight.copy_(self.weight.flip(0))
        return scores


def test_weights_that_change_in_place_count_at_once() -> None:
    tokens = []
    for compiled in (False, True):
        model = llama()
        editor = LogitsProcessorList([_Edits(model)])
        model = sc.compile(model, inner="eager") if compiled else model
        tokens.append(generate(model, logits_processor=editor))
    assert torch.equal(*tokens)


def test_a_model_that_changed_between_two_calls_is_looked_at_again() -> None:
    fast, stock = sc.compile(llama(), inner="eager"), llama()
    generate(fast)
    for model in (fast, stock):
        torch.manual_seed(2)
        model.lm_head.weight = nn.Parameter(torch.randn_like(model.lm_head.weight))
    assert torch.equal(generate(fast), generate(stock))


def test_an_assistant_has_steps_of_its_own() -> None:
    fast, assistant = sc.compile(llama(), inner="eager"), sc.compile(llama(), inner="eager")
    assert torch.equal(generate(fast, assistant_model=assistant), generate(llama()))
