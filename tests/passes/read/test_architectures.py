"""Every attention module of many architectures of transformers has a row in the report, and the output stays the same."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparse_compile as sc
from sparse_compile.attention_modules import attention_modules, without_rows
from support.architectures import ARCHITECTURES, Architecture
from support.comparison import relative_error


def modules_that_run(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Any, set[str]]:
    """The output of the un-compiled model, and the attention modules that it called."""
    ran: set[str] = set()
    hooks = []
    for path in attention_modules(model):

        def note(module: nn.Module, args: Any, path: str = path) -> None:
            ran.add(path)

        hooks.append(model.get_submodule(path).register_forward_pre_hook(note))
    output = model(**inputs)
    for hook in hooks:
        hook.remove()
    return output, ran


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=str)
def test_every_attention_module_is_in_the_report(architecture: Architecture) -> None:
    torch._dynamo.reset()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, inputs = architecture.build(), architecture.inputs()
        wanted, ran = modules_that_run(model, inputs)
        backend = sc.Backend(inner="eager")
        fast: Any = torch.compile(model, backend=backend)
        got = fast(**inputs)
    assert ran
    assert ran.isdisjoint(without_rows(model, backend.report)), str(backend.report)
    assert len(backend.report.sites) >= len(ran)
    assert relative_error(got[0], wanted[0]) < 1e-5
    assert bool(backend.report.left) == bool(architecture.left), str(backend.report)
    assert all(architecture.left in site.reason for site in backend.report.left)
