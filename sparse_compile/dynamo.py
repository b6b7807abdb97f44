"""The ``torch.compile`` backend: run the passes over each graph, pass it to the inner compiler, and keep the report."""

from __future__ import annotations

import itertools
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import GraphModule

from sparse_compile.attention_modules import has_decoder
from sparse_compile.masks import Mask, full
from sparse_compile.passes import torch_private
from sparse_compile.policy import Policy, as_policy
from sparse_compile.report import Engines, Report

if TYPE_CHECKING:  # the passes import sympy and Dynamo, which takes a second, so they load at the first compile
    from sparse_compile.passes.ir.attention import Attention
    from sparse_compile.passes.ir.left import Refused
    from sparse_compile.passes.ir.rewrite import CacheUse, Pass, Rewrite

INNER = ("inductor", "aot_eager", "cudagraphs", "tensorrt", "eager")
KERNELS = ("auto", "autotune", "flash", "triton", "flex", "sdpa", "reference")
OPTIONS = ("policy", "inner", "kernel", "strict", "inductor")


class SparseCompileWarning(UserWarning):
    """Something will not run as requested."""


class SparseCompileError(RuntimeError):
    """Something cannot run as requested, and ``strict=True`` makes that an error."""


@dataclass(frozen=True)
class Hooks:
    """Settings of a backend for the rest of this library; users need none of them.

    ``passes`` run after the lift, and ``trains`` says that they add tensors that are trained; calibration sets both. With
    ``dry``, the backend chooses kernels for its report, on ``device`` if it is given, but runs the dense reference; ``explain``
    sets it. ``isolated`` says that Dynamo counts the recompiles of this backend separately, and ``limit`` is how many it allows
    (None: those of the process). ``has_decoder`` says that the model has a text decoder beside an encoder, and ``model_heads``
    are the numbers of query heads and KV heads in its config, if it has one.
    """

    passes: tuple[Pass, ...] = ()
    trains: bool = False
    dry: bool = False
    device: str | None = None
    isolated: bool = False
    limit: int | None = None
    has_decoder: bool = False
    model_heads: tuple[int, int] | None = None


class GraphRun(NamedTuple):
    """One run of a compiled graph."""

    run: Callable[..., Any]
    args: Sequence[Any]
    results: Sequence[Any]


class Backend:
    """A ``torch.compile`` backend that rewrites attention, with a policy and a report of its own.

    Without a policy, the model's results do not change. ``policy`` is a ``Policy`` or a single mask.

    ``inner`` compiles the rest of the graph:

    | ``inner``                                   | attention                                                 |
    |---------------------------------------------|-----------------------------------------------------------|
    | ``inductor``                                | is part of the graph                                      |
    | ``aot_eager``, ``cudagraphs``, ``tensorrt`` | is one op that compiles its own kernel, without gradients |
    | ``eager``                                   | runs the dense reference                                  |

    ``inductor`` holds the options of Inductor or, with ``tensorrt``, fields of ``torch_tensorrt.dynamo.CompilationSettings``.

    ``tensorrt`` is torch-tensorrt or torch-tensorrt-rtx, for models on CUDA, without gradients and without ``mode``. The report
    says how many engines each graph has, and which ops run in torch. Engines take dynamic sizes up to four times the traced
    one, and larger sizes compile another graph. ``torch._dynamo.mark_dynamic(tensor, dim, min=..., max=...)`` sets another
    range.

    ``kernel`` chooses the kernel of a call:

    | ``kernel``    | runs                                                                                      |
    |---------------|-------------------------------------------------------------------------------------------|
    | ``auto``      | the fastest kernel that can run the call                                                  |
    | ``autotune``  | the same, with tiles that Inductor times; for GPUs without tiles in ``choose/tuning.py``  |
    | ``flash``     | FlexAttention's FLASH backend (flash-attn-4)                                              |
    | ``triton``    | FlexAttention's Triton kernels                                                            |
    | ``flex``      | the kernels that FlexAttention generates for the device                                   |
    | ``sdpa``      | ``scaled_dot_product_attention``                                                          |
    | ``reference`` | the dense reference                                                                       |

    With ``strict``, an attention call that stays as it is raises an error. A policy that reaches no attention call warns with
    ``SparseCompileWarning`` when a graph runs for the second time; with ``strict``, it raises ``SparseCompileError``.

        >>> backend = sc.Backend(causal & sliding_window(64), inner="eager")
        >>> model = torch.compile(model, backend=backend)
        >>> logits = model(tokens)
        >>> print(backend.report)  # doctest: +SKIP

    Raises ``ValueError`` or ``TypeError`` for unknown options; while compiling, ``ValueError`` for a forced kernel that cannot
    run a call, ``ImportError`` for an inner compiler that is not installed, ``RuntimeError`` for an engine that torch-tensorrt
    cannot build, and ``SparseCompileError`` as above. A graph raises ``ValueError`` when it runs if the policy has a
    ``per_head`` for other heads than those of a call, or for heads that several devices share, and with ``tensorrt`` if it
    needs gradients.
    """

    def __init__(
        self,
        policy: Policy | Mask | None = None,
        *,
        inner: str = "inductor",
        kernel: str = "auto",
        strict: bool = False,
        inductor: Mapping[str, Any] | None = None,
        hooks: Hooks | None = None,
    ) -> None:
        _one_of("inner", inner, INNER)
        _one_of("kernel", kernel, KERNELS)
        if not isinstance(strict, bool):
            raise TypeError(f"strict needs True or False, got {strict!r}")
        if not (inductor is None or isinstance(inductor, Mapping)):
            raise TypeError(f"inductor needs a mapping of Inductor options, got {inductor!r}")
        self.policy = as_policy(policy)
        self.inner, self.kernel, self.strict = inner, kernel, strict
        self.inductor = dict(inductor or {})
        self.hooks = hooks or Hooks()
        # The number of a graph in the report, by Dynamo's numbers of its code and of its compile.
        self._graphs: dict[tuple[int | None, int], int] = {}
        self._traces: dict[int, Callable[[], Any]] = {}  # the last trace of each graph, as a weak reference
        self.report = Report()
        self._has_warned_of_left = False
        self.calls = 0  # how often compiled graphs ran; ``compile`` uses it to detect a model that runs un-compiled
        self.runs: list[GraphRun] | None = None  # a list records what runs

    @property
    def __name__(self) -> str:
        return "sparse_compile"

    def __call__(
        self,
        gm: GraphModule,
        inputs: Sequence[Any],
        *,
        mode: str | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> Callable[..., Any]:
        """Compile one graph. ``torch.compile`` calls this."""
        from sparse_compile.passes.compile_graph import compile_graph
        from sparse_compile.passes.graph_options import options_for
        from sparse_compile.passes.inner_compiler import check_mode, records_cuda_graphs
        from sparse_compile.passes.ir.left import Refused
        from sparse_compile.passes.ops.cache.without_gradients import refuse_backward

        if options:
            return self._with(options)(gm, inputs, mode=mode)
        check_mode(mode, self.inner)
        try:
            rewrite = self._rewrite(gm, inputs)
        except Refused as refused:
            return _refusing(refused)
        graph = self._record(rewrite, _tokens_held(rewrite.cache_uses, inputs))
        inner = "eager" if self.hooks.dry else self.inner
        config = (options_for(rewrite, self.kernel, mode) if self.inner == "inductor" else {}) | self.inductor
        with torch.no_grad() if rewrite.cache_uses else nullcontext():
            compiled, note, parts = compile_graph(rewrite, inputs, inner=inner, mode=mode, config=config)
        # The next step overwrites the results of a CUDA graph, and users need not know that steps are recorded.
        copies = bool(rewrite.cache_uses) and inner == "inductor" and records_cuda_graphs(inputs, mode, config)
        if note:
            self.report_note(note)
        if parts is not None:
            self.report.engines.append(Engines(graph, parts.engines, tuple(parts.in_torch.items())))

        uses = rewrite.cache_uses
        would_train = bool(uses) and any(isinstance(x, Tensor) and x.requires_grad for x in inputs)
        runs = itertools.count(1)

        def run(*args: Any) -> Any:
            self.calls += 1
            if next(runs) == 2:  # the model has run once, so every graph of it has been compiled
                self.check_reach()
            for check in rewrite.checks:
                check(args)
            updates = [(args[use.argument].sparse_cache_host_state, *_sizes(use, args), use) for use in uses]
            for host_state, batch, tokens, use in updates:
                host_state.admit(batch, tokens, use.layers, empty=use.empty)
            # With gradients, a cache would tie the autograd graph of each step to all earlier steps, and a backward pass would
            # miss the content of the cache.
            try:
                with torch.no_grad() if uses else nullcontext():
                    result = compiled(*args)
            except BaseException as error:
                for host_state, *_ in updates:
                    host_state.fail(error)
                raise
            for host_state, batch, tokens, use in updates:
                host_state.note(batch, tokens, use.layers, last=use.last)
            result = [x.clone() if isinstance(x, Tensor) else x for x in result] if copies else result
            result = refuse_backward(result) if would_train and torch.is_grad_enabled() else result
            if self.runs is not None:
                self.runs.append(GraphRun(run, args, result))
            return result

        return run

    def _with(self, options: Mapping[str, Any]) -> Backend:
        """A backend with other options that writes to the same report."""
        unknown = sorted(set(options) - set(OPTIONS))
        if unknown:
            raise ValueError(f"unknown option {unknown[0]!r}: sparse_compile takes {', '.join(OPTIONS)}")
        settings = {"policy": self.policy, "inner": self.inner, "kernel": self.kernel, "strict": self.strict}
        other = Backend(**{**settings, "inductor": self.inductor, "hooks": self.hooks, **options})
        other.report, other._graphs, other._traces = self.report, self._graphs, self._traces
        return other

    def _rewrite(self, gm: GraphModule, inputs: Sequence[Any]) -> Rewrite:
        from sparse_compile.passes.choose.kernel_choice import capability
        from sparse_compile.passes.ir.left import Refused
        from sparse_compile.passes.ir.rewrite import Rewrite
        from sparse_compile.passes.ir.target import Target
        from sparse_compile.passes.kv.find_caches import reads_cache
        from sparse_compile.passes.pipeline import run_passes
        from sparse_compile.passes.tensorrt import NO_GRADIENTS

        gradients = torch.is_grad_enabled() and (
            self.hooks.trains or any(isinstance(x, Tensor) and x.requires_grad for x in inputs)
        )
        gradients = gradients and not reads_cache(gm)
        if self.inner == "tensorrt" and gradients and not self.hooks.dry:
            raise Refused(ValueError(NO_GRADIENTS))
        target = Target(self.inner, self.kernel, gradients, self.hooks.device, capability())
        hooks = self.hooks
        traced = torch_private.traced_module()
        decoder = hooks.has_decoder or (traced is not None and has_decoder(traced))
        rewrite = Rewrite(gm, self._mask_for, target, hooks.dry, has_decoder=decoder, model_heads=hooks.model_heads)
        run_passes(rewrite, self.hooks.passes)
        if not getattr(getattr(gm, "compile_subgraph_reason", None), "graph_break", False):
            self._check_layers({call.layer for call in rewrite.calls if call.phase != "other"})
        if self.policy is not None and self.policy.names_layers() and any(not call.module for call in rewrite.calls):
            self.report_trouble(
                "the policy names layers or modules, but Dynamo recorded no module for some attention calls, as happens behind "
                "a graph break, so these calls get the default mask. Remove the graph break, or use one mask for all layers"
            )
        return rewrite

    def _check_layers(self, seen: set[int | None]) -> None:
        """Raise for a policy that names a layer beyond the model. Only a graph with all layers from 0 on shows their number."""
        layers = {layer for layer in seen if layer is not None}
        if self.policy is not None and len(layers) > 1 and layers == set(range(len(layers))):
            self.policy.check_layers(len(layers))

    def _has_mask_for(self, module: str) -> bool:
        """Whether the policy restricts a call of ``module`` in any phase."""
        from sparse_compile.passes.ir.fx_nodes import layer_index

        phases = ("prefill", "decode", "other") if self.policy is not None else ()
        masks = (self.policy.mask_for(module, layer_index(module), phase) for phase in phases if self.policy is not None)
        return any(mask is not None and mask != full for mask in masks)

    def _mask_for(self, call: Attention, *, by_path: bool) -> Mask | None:
        if self.policy is None:
            return None
        return self.policy.mask_for(call.module, None if by_path else call.layer, call.phase, by_path=by_path)

    def _record(self, rewrite: Rewrite, held: int | None) -> int:
        """Write the rows of a graph to the report, and return its number."""
        from sparse_compile.passes.ir.fx_nodes import module_path
        from sparse_compile.report_rows import site_rows

        report = self.report
        compile_id = torch_private.compile_id()
        frame, attempt = (compile_id.frame_id, compile_id.frame_compile_id or 0) if compile_id is not None else (None, 0)
        earlier = sum(seen == frame and other != attempt for seen, other in self._graphs)
        if compile_id is None or (frame, attempt) not in self._graphs:
            report.compiles += 1
            report.recompiles += earlier > 0
            self._graphs[frame, attempt] = report.compiles
        graph = self._graphs[frame, attempt]
        # Dynamo may discard a graph and trace the same code again, such as to make a float a constant. The last trace counts.
        # DistributedDataParallel cuts a graph into pieces, which add up.
        trace = torch_private.current_trace()
        is_piece = graph in self._traces and trace is not None and self._traces[graph]() is trace
        report.sites = [site for site in report.sites if is_piece or site.graph != graph] + site_rows(rewrite, graph, held)
        report.engines = [row for row in report.engines if is_piece or row.graph != graph]
        if trace is not None:
            self._traces[graph] = weakref.ref(trace)
        if self.hooks.isolated:
            attempt = earlier
        if rewrite.left and self.strict:
            reasons = "; ".join(f"{call.node.name}: {call.reason}" for call in rewrite.left)
            raise SparseCompileError(f"strict=True, but {len(rewrite.left)} attention calls stay as they are: {reasons}")
        without_policy = [call for call in rewrite.left if self._has_mask_for(module_path(call.node))]
        if without_policy:
            self._has_warned_of_left = True
            reasons = "; ".join(dict.fromkeys(call.reason for call in without_policy))
            self.report_trouble(
                f"{len(without_policy)} attention calls stay as they are and run without the policy: {reasons}. "
                "report.left has each of them"
            )
        limit = self.hooks.limit or torch_private.recompile_limit()
        if attempt + 1 >= limit:
            message = (
                f"this code was compiled {attempt + 1} times, which reaches Dynamo's recompile limit of {limit}: "
                "the next new shape runs un-compiled, without sparse_compile and without its policy. "
                "Compile with dynamic=True, so that sizes may change, or raise the limit."
            )
            self.report_trouble(message)
        return graph

    def check_reach(self) -> None:
        """Report a policy that restricts no attention call. ``compile`` calls this after the model has run."""
        if self.policy is None:
            return
        modules = {site.module for site in self.report.sites}
        for pattern in self.policy.unmatched(modules) if modules else ():
            message = (
                f"the policy names {pattern!r}, which matches no module that calls attention: these modules are called, for "
                f"example, {min(modules)!r}"
            )
            if message not in self.report.notes:
                self.report_trouble(message)
        if self.report.rewritten:
            return
        left = len(self.report.left)
        if left and self._has_warned_of_left:
            return
        what = (
            f"all {left} stay as they are, for the reasons in the report"
            if left
            else "the compiled graphs hold none. Attention runs outside of them behind torch.compiler.disable, graph breaks "
            "and custom ops, or if the model returns its attention weights"
        )
        message = f"the policy reaches no attention call: {what}"
        if message not in self.report.notes:
            self.report_trouble(message)

    def report_note(self, message: str) -> None:
        """Note something in the report that users did not ask for, but may want to know."""
        if message not in self.report.notes:
            self.report.notes.append(message)

    def report_trouble(self, message: str) -> None:
        """Note in the report that something will not run as requested, and warn; with ``strict``, raise instead of warning."""
        self.report_note(message)
        if self.strict:
            raise SparseCompileError(message)
        warnings.warn(message, SparseCompileWarning, stacklevel=3)


def _refusing(why: Refused) -> Callable[..., Any]:
    """Return a graph that raises the error of ``why`` when it runs. Torch would wrap an error raised while compiling."""

    def run(*args: Any) -> Any:
        raise why.error from None

    return run


def _tokens_held(uses: Sequence[CacheUse], inputs: Sequence[Any]) -> int | None:
    """The number of tokens in the cache of a graph when it is compiled; None if that is not one number."""
    states = [getattr(inputs[use.argument], "sparse_cache_host_state", None) for use in uses]
    held = {None if state is None else int(state.columns) for state in states}
    return held.pop() if len(held) == 1 else None


def _sizes(use: CacheUse, args: Sequence[Any]) -> tuple[int, int]:
    """The number of rows and of new tokens that a run of a graph adds to a cache."""

    def read(size: int | tuple[int, int | None]) -> int:
        if isinstance(size, int):
            return size
        argument, axis = size
        return int(args[argument] if axis is None else args[argument].shape[axis])

    return read(use.batch), read(use.tokens)


def _one_of(what: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{what} needs to be one of {', '.join(known)}, got {value!r}")
