"""All private torch APIs that this library uses. ``tests/api/test_rooms.py`` forbids them in every other file.

torch 2.11 to 2.15 have all of them. Each function imports what it needs when it is called. Importing this file therefore costs
nothing beyond torch, and ``import sparse_compile`` stays fast.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from operator import attrgetter
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

F = TypeVar("F", bound=Callable[..., Any])

# -- fake tensors -------------------------------------------------------------------------------------------------------


@contextmanager
def real_tensors() -> Iterator[None]:
    """Compute with real tensors on the CPU, even while a graph is traced or another device is the default."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    with unset_fake_temporarily(), torch.device("cpu"):
        yield


def fake_tensors(*, allow_real_inputs: bool = False) -> Any:
    """Return a mode in which tensors have a shape but no memory."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=allow_real_inputs)


def mode_of(values: Iterator[Any]) -> AbstractContextManager[Any]:
    """Return the mode of the first fake tensor among ``values``, which is the mode that Dynamo traced in.

    Without a fake tensor, return a context that does nothing.
    """
    from torch._subclasses.fake_tensor import FakeTensor

    return next((value.fake_mode for value in values if isinstance(value, FakeTensor)), nullcontext())


def example_size(size: Any) -> int:
    """Return the value of an int or SymInt in the traced example; 0 if a SymInt has none."""
    if isinstance(size, torch.SymInt):
        hint = size.node.hint
        return int(hint) if hint is not None else 0
    return int(size)


def limit_size(size: Any, times: int) -> None:
    """Let a SymInt without an upper bound be at most ``times`` its traced value, rounded up to a power of two.

    This adds a guard: a larger size compiles another graph.
    """
    if not isinstance(size, torch.SymInt) or not size.node.expr.is_Symbol:
        return
    from torch.utils._sympy.numbers import int_oo

    if size.node.shape_env.var_to_range[size.node.expr].upper >= int_oo:
        assert size <= 1 << (times * example_size(size) - 1).bit_length()


def storage_id(tensor: Tensor) -> int:
    """Return a number that only tensors over the same storage share. Tensors without memory have storages too."""
    return int(tensor.untyped_storage()._cdata)


def is_wrapper(value: Any) -> bool:
    """Whether a tensor consists of other tensors, as quantized and distributed tensors do."""
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    return bool(is_traceable_wrapper_subclass(value))


# -- ops ----------------------------------------------------------------------------------------------------------------


def overload(op: Any) -> Callable[..., Any]:
    """Return the op overload that a graph node calls, for an op made by ``torch.library.custom_op``."""
    target: Callable[..., Any] = op._opoverload
    return target


def op_schema(target: Any) -> Any:
    """Return the schema of a node's target, or None if the target is not an op of the dispatcher."""
    return target._schema if isinstance(target, torch._ops.OpOverload) else None


def written_arguments(target: Any) -> tuple[int, ...]:
    """Return the positions of the arguments that an op of the dispatcher writes in place; none for other targets."""
    schema = op_schema(target)
    arguments = schema.arguments if schema is not None else ()
    return tuple(
        at for at, argument in enumerate(arguments) if argument.alias_info is not None and argument.alias_info.is_write
    )


def written_values(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any] | None:
    """Return the arguments that a call of an op writes in place; None if ``target`` is not an op of the dispatcher."""
    schema = op_schema(target)
    if schema is None:
        return None
    named = dict(zip((argument.name for argument in schema.arguments), args, strict=False)) | dict(kwargs)
    return [
        named[argument.name]
        for argument in schema.arguments
        if argument.name in named and argument.alias_info is not None and argument.alias_info.is_write
    ]


def is_higher_order(target: Any) -> bool:
    """Whether the target of a node is an op that calls functions, such as ``torch.cond``."""
    return isinstance(target, torch._ops.HigherOrderOperator)


def look_up_unchecked(flat: Tensor, at: Tensor) -> Tensor:
    """Return ``flat[at]`` without a bounds check and without wrapping negative indices."""
    values: Tensor = torch.ops.aten._unsafe_masked_index(flat, torch.ones_like(at, dtype=torch.bool), [at], 0)
    return values


def flex_attention_op() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """Return FlexAttention's higher-order op. It accepts block tables that the public ``flex_attention`` rejects."""
    from torch._higher_order_ops.flex_attention import flex_attention

    op: Callable[..., tuple[Tensor, Tensor, Tensor]] = flex_attention
    return op


def attention_with_lse(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Return attention ``[B, Hq, Q, D]`` by the kernel that SDPA would run, and its log-sum-exp ``[B, Hq, Q]`` in float32.

    The public ``scaled_dot_product_attention`` does not return the log-sum-exp. Raises ``RuntimeError`` on CUDA if SDPA has no
    fused kernel for these tensors. No gradients flow.
    """
    ops = torch.ops.aten
    if not q.is_cuda:
        out, lse = ops._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
        return out, lse
    choice = torch._fused_sdp_choice(q, k, v, None, 0.0, causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    if choice == torch.nn.attention.SDPBackend.CUDNN_ATTENTION.value:
        out, lse = ops._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, scale=scale)[:2]
    else:
        out, lse = ops._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=scale)[:2]
    return out, lse.reshape(q.shape[:3])


def cpu_has_avx2() -> bool:
    """Whether the CPU has AVX2, which FlexAttention's C++ template needs."""
    return bool(torch.cpu._is_avx2_supported())


def flatten(value: Any) -> tuple[list[Any], Any]:
    """Return the leaves of nested tuples, lists and dictionaries, and the structure from which ``unflatten`` rebuilds them."""
    from torch.utils._pytree import tree_flatten

    return tree_flatten(value)


def unflatten(leaves: Sequence[Any], structure: Any) -> Any:
    """Rebuild a value from the leaves and structure that ``flatten`` returned."""
    from torch.utils._pytree import tree_unflatten

    return tree_unflatten(leaves, structure)


# -- Dynamo -------------------------------------------------------------------------------------------------------------


def allow_in_graph(function: F) -> F:
    """Let AOTAutograd trace ``function`` where Dynamo itself would refuse to trace it."""
    allowed: F = torch._dynamo.allow_in_graph(function)
    return allowed


def name_source(gm: GraphModule, name: str) -> None:
    """Give AOTAutograd a source for a tensor that is not an input of the model. It rejects a graph without one."""
    from torch._dynamo.source import ConstantSource

    sources = getattr(gm, "_param_name_to_source", None)
    if sources is not None:
        sources[name] = ConstantSource(name)


def compile_id() -> Any:
    """Return Dynamo's id of the code that is being compiled and of the attempt, or None outside a compilation."""
    return torch._guards.CompileContext.current_compile_id()


def current_trace() -> Any:
    """Return an object that stands for one run of Dynamo over some code, or None outside a compilation.

    All graphs that a wrapper cuts from one graph of Dynamo, such as those of DistributedDataParallel, have the same one. A
    second run over the same code has another one, although Dynamo's compile id is the same.
    """
    return torch._guards.TracingContext.try_get()


def traced_module() -> nn.Module | None:
    """Return the module whose method Dynamo is compiling, the rest of it behind a graph break included; None for functions."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        owner = InstructionTranslator.current_tx().output.root_tx.f_locals.get("self")
    except AttributeError:  # Dynamo does not run
        return None
    return owner if isinstance(owner, nn.Module) else None


def dynamo_error() -> type[Exception]:
    """Return the class of Dynamo's own errors. Some make Dynamo trace a graph again, so a compiler must not catch them."""
    from torch._dynamo.exc import TorchDynamoException

    return TorchDynamoException


def recompile_limit() -> int:
    """Return how often Dynamo compiles the same code before it runs that code uncompiled."""
    return int(torch._dynamo.config.recompile_limit)


def isolates_recompiles() -> bool:
    """Whether ``torch.compile`` can count the recompiles of each model separately, as it can from torch 2.13 on.

    Otherwise the recompile limit applies to a code object, which all models of a class share.
    """
    return {"isolate_recompiles", "recompile_limit"} <= set(inspect.signature(torch.compile).parameters)


# How often a model may be compiled for other kinds of calls, such as other batch sizes and caches. Dynamo's limit is 8.
MOST_COMPILES = 512


def compiles_often() -> dict[str, Any]:
    """Return the options of ``torch.compile`` with which a model has a limit of compiles of its own, ``MOST_COMPILES``.

    Beyond its limit, Dynamo silently runs a model un-compiled. From torch 2.13 on, the limit belongs to one call of
    ``torch.compile``. Before, and for all models together, it is a setting of the process, which this raises.
    """
    config: Any = torch._dynamo.config
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, 16 * MOST_COMPILES)
    if isolates_recompiles():
        return {"isolate_recompiles": True, "recompile_limit": MOST_COMPILES}
    config.recompile_limit = max(config.recompile_limit, MOST_COMPILES)
    return {}


def without_recompile_limit() -> AbstractContextManager[Any]:
    """Return a context in which Dynamo recompiles the same code without a practical limit (65,536 times)."""
    patched: AbstractContextManager[Any] = torch._dynamo.config.patch(
        recompile_limit=1 << 16, accumulated_recompile_limit=1 << 16
    )
    return patched


def mark_static(tensor: Tensor) -> None:
    """Make the address of ``tensor`` static in CUDA graphs, and its sizes constant in every graph."""
    torch._dynamo.mark_static_address(tensor)
    torch._dynamo.mark_static(tensor)


def keep_sizes(tensor: Tensor) -> Tensor:
    """Return ``tensor`` with sizes that are constants of every graph that reads it."""
    torch._dynamo.mark_static(tensor)
    return tensor


def compiled_call(model: nn.Module) -> Callable[..., Any] | None:
    """Return the function that the model calls since ``model.compile()``; None without that."""
    return model._compiled_call_impl


def set_compiled_call(model: nn.Module, run: Callable[..., Any]) -> None:
    """Make a compiled model call ``run``."""
    model._compiled_call_impl = run


def begin_call() -> None:
    """Say that a compiled graph runs again, in a call that does not pass through Dynamo.

    Inductor's CUDA graphs would otherwise take two calls for two graphs of one call, whose results have to stay valid.
    """
    from torch._dynamo.mutation_guard import install_generation_tagging_init

    install_generation_tagging_init()


def has_static_address(node: Any) -> bool:
    """Whether Dynamo has marked an input of a graph as one whose address stays: a parameter, a buffer, or ``mark_static``."""
    return "_dynamo_static_input_type" in (node.meta.get("tensor_dict") or {})


def same_addresses(inputs: Sequence[Any], addresses: Sequence[int | None], places: Sequence[int]) -> bool:
    """Whether the tensors of ``inputs`` at these places have these addresses.

    A model has hundreds of them, so a torch with CUDA compares them in C++.
    """
    compare = getattr(torch._C, "_tensors_data_ptrs_at_indices_equal", None)
    if compare is not None:
        return bool(compare(list(inputs), list(addresses), list(places)))
    return all(inputs[at].data_ptr() == addresses[at] for at in places)


# -- Inductor -----------------------------------------------------------------------------------------------------------


def inductor_modes() -> Mapping[str, Mapping[str, Any]]:
    """Return the modes of ``torch.compile``, each with its Inductor options."""
    import torch._inductor

    return torch._inductor.list_mode_options()


def inductor_setting(name: str, options: Mapping[str, Any]) -> Any:
    """Return the option ``name`` of Inductor, which may contain dots: from ``options``, or the global one."""
    import torch._inductor.config

    return options[name] if name in options else attrgetter(name)(torch._inductor.config)


def has_inductor_option(name: str) -> bool:
    """Whether this version of Inductor has the option ``name``."""
    import torch._inductor.config

    return hasattr(torch._inductor.config, name)


def start_compile_workers() -> None:
    """Start the processes in which Inductor compiles Triton kernels, which takes seconds.

    Inductor starts them when it gets its first graph, and compiles in this process until they are ready.
    """
    from torch._inductor import async_compile

    start = getattr(async_compile, "maybe_warm_pool", None)
    if start is not None:
        start()


def inductor_compile(gm: GraphModule, examples: Sequence[Any], options: dict[str, Any]) -> Callable[..., Any]:
    """Compile a graph of ATen ops for inputs like ``examples``."""
    from torch import _inductor

    compiled: Callable[..., Any] = _inductor.compile(gm, list(examples), options=options)
    return compiled


def inner_backend(name: str) -> Callable[..., Callable[..., Any]]:
    """Return the ``torch.compile`` backend that is registered under ``name``."""
    from torch._dynamo.backends.registry import lookup_backend

    backend: Callable[..., Callable[..., Any]] = lookup_backend(name)
    return backend


@contextmanager
def on_module_registration(note: Callable[[nn.Module, str, nn.Module | None], None]) -> Iterator[None]:
    """Call ``note(parent, name, module)`` whenever a module is added to another one. Torch has one list for all modules."""
    from torch.nn.modules.module import register_module_module_registration_hook

    handle = register_module_module_registration_hook(note)
    try:
        yield
    finally:
        handle.remove()


def cache_bypasses() -> int:
    """Return how many graphs AOTAutograd and Inductor could not store in their caches so far."""
    from torch._dynamo.utils import counters

    return int(counters["aot_autograd"]["autograd_cache_bypass"] + counters["inductor"]["fxgraph_cache_bypass"])
