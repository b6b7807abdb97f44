"""The ``torch.compile`` backend: run the passes over each graph, hand it to the inner compiler, keep the report."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from sparse_compile.masks import Mask
from sparse_compile.passes import torch_private
from sparse_compile.policy import Policy, as_policy
from sparse_compile.report import Report

if TYPE_CHECKING:  # the passes import sympy and Dynamo, which cost a second: not before something is compiled
    from sparse_compile.passes.ir.attention import Attention
    from sparse_compile.passes.ir.left import Refused
    from sparse_compile.passes.ir.rewrite import CacheUse, Pass, Rewrite

INNER = ("inductor", "aot_eager", "cudagraphs", "tensorrt", "eager")
KERNELS = ("auto", "autotune", "flash", "triton", "flex", "sdpa", "reference")
OPTIONS = ("policy", "inner", "kernel", "strict", "inductor")


class SparseCompileWarning(UserWarning):
    """Something will not run as asked."""


class SparseCompileError(RuntimeError):
    """Something cannot run as asked, and ``strict=True`` forbids to go on without it."""


@dataclass(frozen=True)
class Hooks:
    """What the rest of this library changes about a backend; users need none of it.

    ``passes`` run once calls are understood, and ``trains`` says that they bring tensors to train: calibration adds both. With
    ``dry`` the backend plans kernels for its report and runs the dense reference, on ``device`` if that is given: ``explain``.
    ``isolated`` says that Dynamo counts recompiles of this backend alone.
    """

    passes: tuple[Pass, ...] = ()
    trains: bool = False
    dry: bool = False
    device: str | None = None
    isolated: bool = False


class Backend:
    """A ``torch.compile`` backend that rewrites attention, with a policy and a report of its own.

    Without a policy the model's results do not change. ``policy`` is a ``Policy`` or a bare mask.

    ``inner`` compiles the rest of the graph. Under ``inductor`` attention is part of the graph; under ``aot_eager``,
    ``cudagraphs`` and ``tensorrt`` (torch-tensorrt) it is one op that compiles its own kernel, without gradients; ``eager``
    runs the dense reference. ``inductor`` holds options: those of Inductor, or of torch-tensorrt.

    ``kernel`` is ``auto``, the fastest that can run a call, or forces one: ``flash`` (FlexAttention's FLASH, flash-attn-4),
    ``triton``, ``flex`` (what FlexAttention generates for the device), ``sdpa``, ``reference`` (dense). ``autotune`` chooses
    as ``auto`` does and lets Inductor time tiles, for GPUs that ``passes/options.py`` has no measured ones for. With
    ``strict``, an attention call that stays as it is is an error.

        >>> backend = sc.Backend(causal & sliding_window(64), inner="eager")
        >>> model = torch.compile(model, backend=backend)
        >>> logits = model(tokens)
        >>> print(backend.report)  # doctest: +SKIP

    Raises ``ValueError`` or ``TypeError`` for unknown options; while compiling, ``ValueError`` for a forced kernel that cannot
    run a call, ``ImportError`` for an inner compiler that is not installed, and ``SparseCompileError`` as above.
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
        self._graphs: dict[tuple[int | None, int], int] = {}  # our number of each graph, by Dynamo's of its code and compile
        self.report = Report()
        self.calls = 0  # of compiled graphs; ``compile`` uses it to notice a model that runs un-compiled

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
        """Compile one graph; ``torch.compile`` calls this."""
        from sparse_compile.passes.inner_compiler import check_mode, compile_inner
        from sparse_compile.passes.ir.left import Refused

        check_mode(mode)
        if options:
            return self._with(options)(gm, inputs, mode=mode)
        try:
            rewrite = self._rewrite(gm, inputs)
        except Refused as refused:
            return _refusing(refused)
        self._record(rewrite)
        inner = "eager" if self.hooks.dry else self.inner
        with torch.no_grad() if rewrite.cache_uses else nullcontext():
            compiled, note = compile_inner(gm, inputs, inner=inner, mode=mode, config=self._config(rewrite))
        if note and note not in self.report.notes:
            self.report.notes.append(note)

        uses = rewrite.cache_uses

        def run(*args: Any) -> Any:
            self.calls += 1
            told = [(args[use.argument].sparse_cache_host_state, *_sizes(use, args), use) for use in uses]
            for host_state, batch, tokens, use in told:
                host_state.admit(batch, tokens, use.layers, empty=use.empty)
            # A cache would tie the graph of every step to those before, and a backward pass would miss what it holds.
            with torch.no_grad() if uses else nullcontext():
                result = compiled(*args)
            for host_state, batch, tokens, use in told:
                host_state.note(batch, tokens, use.layers, last=use.last)
            return result

        return run

    def _config(self, rewrite: Rewrite) -> dict[str, Any]:
        """The Inductor options: what the kernel choice and the kind of graph ask for, and over it what the user does."""
        from sparse_compile.passes.inner_compiler import for_steps
        from sparse_compile.passes.ir.kv_source import Cached

        # Matrix products stay as they are: the user asked for attention to be tuned.
        tune = {"max_autotune": True, "max_autotune_gemm_backends": "ATEN"} if self.kernel == "autotune" else {}
        steps = [call for call in rewrite.calls if isinstance(call.kv, Cached) and call.phase == "decode"]
        if self.inner == "inductor" and any(call.device.type == "cuda" for call in steps):
            tune |= for_steps()
        return tune | self.inductor

    def _with(self, options: Mapping[str, Any]) -> Backend:
        """This backend with other options, reporting into the same report."""
        unknown = sorted(set(options) - set(OPTIONS))
        if unknown:
            raise ValueError(f"unknown option {unknown[0]!r}: sparse_compile takes {', '.join(OPTIONS)}")
        settings = {"policy": self.policy, "inner": self.inner, "kernel": self.kernel, "strict": self.strict}
        other = Backend(**{**settings, "inductor": self.inductor, "hooks": self.hooks, **options})
        other.report, other._graphs = self.report, self._graphs
        return other

    def _rewrite(self, gm: GraphModule, inputs: Sequence[Any]) -> Rewrite:
        from sparse_compile.passes.choose.kernel_choice import capability
        from sparse_compile.passes.ir.rewrite import Rewrite
        from sparse_compile.passes.ir.target import Target
        from sparse_compile.passes.kv.find_caches import reads_cache
        from sparse_compile.passes.pipeline import run_passes

        gradients = torch.is_grad_enabled() and (
            self.hooks.trains or any(isinstance(x, Tensor) and x.requires_grad for x in inputs)
        )
        gradients = gradients and not reads_cache(gm)
        target = Target(self.inner, self.kernel, gradients, self.hooks.device, capability())
        rewrite = run_passes(Rewrite(gm, self._mask_for, target, self.hooks.dry), self.hooks.passes)
        if not getattr(getattr(gm, "compile_subgraph_reason", None), "graph_break", False):
            self._check_layers({call.layer for call in rewrite.calls})
        if self.policy is not None and self.policy.names_layers() and any(not call.module for call in rewrite.calls):
            self.report_trouble(
                "the policy names layers or modules, but some attention calls belong to none that Dynamo knows, as happens "
                "behind a graph break: they get the default mask. Remove the graph break, or give one mask for all"
            )
        return rewrite

    def _check_layers(self, seen: set[int | None]) -> None:
        """Refuse a policy that names a layer beyond the model, as far as one whole graph can tell: if it holds all from 0."""
        layers = {layer for layer in seen if layer is not None}
        if self.policy is not None and len(layers) > 1 and layers == set(range(len(layers))):
            self.policy.check_layers(len(layers))

    def _mask_for(self, call: Attention) -> Mask | None:
        return None if self.policy is None else self.policy.mask_for(call.module, call.layer, call.phase)

    def _record(self, rewrite: Rewrite) -> None:
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
        # Dynamo may throw a graph away and trace the same code again, to make a float a constant, say: the last one counts.
        report.sites = [site for site in report.sites if site.graph != graph] + site_rows(rewrite, graph)
        if self.hooks.isolated:
            attempt = earlier
        if rewrite.left and self.strict:
            reasons = "; ".join(f"{call.node.name}: {call.reason}" for call in rewrite.left)
            raise SparseCompileError(f"strict=True, and {len(rewrite.left)} attention calls stay as they are: {reasons}")
        limit = torch_private.recompile_limit()
        if attempt + 1 >= limit:
            message = (
                f"this code was compiled {attempt + 1} times, which is torch._dynamo.config.recompile_limit={limit}: "
                "the next new shape runs un-compiled, without sparse_compile and without its policy. "
                "Mark changing sizes as dynamic (dynamic=True) or raise the limit."
            )
            self.report_trouble(message)

    def report_trouble(self, message: str) -> None:
        """Something will not run as asked: an error if strict, else a warning and a note in the report."""
        if message not in self.report.notes:
            self.report.notes.append(message)
        if self.strict:
            raise SparseCompileError(message)
        warnings.warn(message, SparseCompileWarning, stacklevel=3)


def _refusing(why: Refused) -> Callable[..., Any]:
    """A graph that says why it cannot run. Raised while compiling, the error would reach the user as torch's."""

    def run(*args: Any) -> Any:
        raise why.error from None

    return run


def _sizes(use: CacheUse, args: Sequence[Any]) -> tuple[int, int]:
    """Rows and new tokens that a run of a graph brings to a cache."""

    def read(size: int | tuple[int, int | None]) -> int:
        if isinstance(size, int):
            return size
        argument, axis = size
        return int(args[argument] if axis is None else args[argument].shape[axis])

    return read(use.batch), read(use.tokens)


def _one_of(what: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{what} needs to be one of {', '.join(known)}, got {value!r}")
