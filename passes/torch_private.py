"""Everything private to torch that this library touches. ``tests/test_rooms.py`` keeps it out of every other file.

torch 2.11 to 2.15 have all of it. Functions import what they need when they are called: importing this file costs nothing
beyond torch, and ``import sparse_compile`` stays fast.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

F = TypeVar("F", bound=Callable[..., Any])

# -- fake tensors -------------------------------------------------------------------------------------------------------


@contextmanager
def real_tensors() -> Iterator[None]:
    """Compute with real tensors on the CPU, also while a graph is traced or another device is the default."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    with unset_fake_temporarily(), torch.device("cpu"):
        yield


def fake_tensors(*, allow_real_inputs: bool = False) -> Any:
    """A mode in which tensors have a shape and no memory."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=allow_real_inputs)


def mode_of(values: Iterator[Any]) -> AbstractContextManager[Any]:
    """The mode of the first fake tensor among ``values``: the mode that Dynamo traced in."""
    from torch._subclasses.fake_tensor import FakeTensor

    return next((value.fake_mode for value in values if isinstance(value, FakeTensor)), nullcontext())


# -- ops ----------------------------------------------------------------------------------------------------------------


def overload(op: Any) -> Callable[..., Any]:
    """What a graph calls of an op that ``torch.library.custom_op`` made."""
    found: Callable[..., Any] = op._opoverload
    return found


def op_schema(target: Any) -> Any:
    """The schema of a node's target, or None if the target is no op of the dispatcher."""
    return target._schema if isinstance(target, torch._ops.OpOverload) else None


def look_up_unchecked(flat: Tensor, at: Tensor) -> Tensor:
    """``flat[at]`` without a check of the index and without wrapping negative ones around a size."""
    found: Tensor = torch.ops.aten._unsafe_masked_index(flat, torch.ones_like(at, dtype=torch.bool), [at], 0)
    return found


def flex_attention_op() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """FlexAttention's higher-order op, which takes block tables that ``flex_attention`` would not."""
    from torch._higher_order_ops.flex_attention import flex_attention

    op: Callable[..., tuple[Tensor, Tensor, Tensor]] = flex_attention
    return op


def cpu_has_avx2() -> bool:
    """Whether the CPU has the instructions that FlexAttention's C++ template needs."""
    return bool(torch.cpu._is_avx2_supported())


def flatten(value: Any) -> tuple[list[Any], Any]:
    """The leaves of nested tuples, lists and dictionaries, and the structure that ``unflatten`` puts them back into."""
    from torch.utils._pytree import tree_flatten

    return tree_flatten(value)


def unflatten(leaves: Sequence[Any], structure: Any) -> Any:
    """The value whose leaves and structure ``flatten`` returned."""
    from torch.utils._pytree import tree_unflatten

    return tree_unflatten(leaves, structure)


# -- Dynamo -------------------------------------------------------------------------------------------------------------


def allow_in_graph(function: F) -> F:
    """Let AOTAutograd trace ``function`` where Dynamo itself would refuse to."""
    allowed: F = torch._dynamo.allow_in_graph(function)
    return allowed


def name_source(gm: GraphModule, name: str) -> None:
    """Tell AOTAutograd where a tensor comes from that is no input of the model; without a source it refuses the graph."""
    from torch._dynamo.source import ConstantSource

    sources = getattr(gm, "_param_name_to_source", None)
    if sources is not None:
        sources[name] = ConstantSource(name)


def compile_id() -> Any:
    """Dynamo's number of the code that is being compiled, and of the attempt; None outside a compilation."""
    return torch._guards.CompileContext.current_compile_id()


def recompile_limit() -> int:
    """How often Dynamo compiles the same code before it runs it un-compiled."""
    return int(torch._dynamo.config.recompile_limit)


def without_recompile_limit() -> AbstractContextManager[Any]:
    """Let the same code be compiled as often as it takes."""
    patched: AbstractContextManager[Any] = torch._dynamo.config.patch(
        recompile_limit=1 << 16, accumulated_recompile_limit=1 << 16
    )
    return patched


def mark_static(tensor: Tensor) -> None:
    """Keep the address of ``tensor`` in CUDA graphs, and its sizes as numbers in every graph."""
    torch._dynamo.mark_static_address(tensor)
    torch._dynamo.mark_static(tensor)


def compiled_call(model: nn.Module) -> Callable[..., Any]:
    """What ``model.compile()`` made the model call."""
    run = model._compiled_call_impl
    assert run is not None
    return run


def set_compiled_call(model: nn.Module, run: Callable[..., Any]) -> None:
    """Let a compiled model call ``run``."""
    model._compiled_call_impl = run


# -- Inductor -----------------------------------------------------------------------------------------------------------


def inductor_modes() -> Mapping[str, Mapping[str, Any]]:
    """The modes of ``torch.compile``, each with the Inductor options that it stands for."""
    import torch._inductor

    return torch._inductor.list_mode_options()


def has_inductor_option(name: str) -> bool:
    """Whether this version of Inductor knows an option."""
    import torch._inductor.config

    return hasattr(torch._inductor.config, name)


def inductor_compile(gm: GraphModule, examples: Sequence[Any], options: dict[str, Any]) -> Callable[..., Any]:
    """Compile a graph of ATen ops for inputs like ``examples``."""
    from torch import _inductor

    compiled: Callable[..., Any] = _inductor.compile(gm, list(examples), options=options)
    return compiled


def inner_backend(name: str) -> Callable[..., Callable[..., Any]]:
    """A backend of ``torch.compile`` by the name it is registered under."""
    from torch._dynamo.backends.registry import lookup_backend

    found: Callable[..., Callable[..., Any]] = lookup_backend(name)
    return found


def cache_bypasses() -> int:
    """How many graphs the caches of AOTAutograd and Inductor could not take so far."""
    from torch._dynamo.utils import counters

    return int(counters["aot_autograd"]["autograd_cache_bypass"] + counters["inductor"]["fxgraph_cache_bypass"])
