"""Which kernel runs a call, and why."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sparse_compile.masks.scores import SinkLogits
from sparse_compile.passes.call import AttentionCall
from sparse_compile.passes.graph import hint_of, value_of

BLOCK = 128
SMALLEST_HEAD = 16  # of the Triton kernels


@dataclass(frozen=True)
class Kernel:
    """``name`` is ``flex`` or ``reference``; ``why`` says what forbade ``flex``."""

    name: str
    why: str = ""


@dataclass(frozen=True)
class Target:
    """What the graph is compiled for: the inner compiler, the kernel asked for, whether gradients flow, and the device.

    ``device`` is a device type; None takes that of each call.
    """

    inner: str = "inductor"
    kernel: str = "auto"
    gradients: bool = False
    device: str | None = None


def choose_kernel(call: AttentionCall, target: Target) -> Kernel:
    """FlexAttention where it can run the call, else the dense reference with the reason.

    Raises ``ValueError`` if ``flex`` is demanded and cannot be had.
    """
    if target.kernel == "reference":
        return Kernel("reference", "asked for")
    why = _why_not_flex(call, target)
    if why and target.kernel == "flex":
        raise ValueError(f"kernel='flex' cannot run {call.module or call.node.name}: {why}; use kernel='auto'")
    return Kernel("reference", why) if why else Kernel("flex")


def _why_not_flex(call: AttentionCall, target: Target) -> str:
    if target.inner != "inductor":
        return f"inner={target.inner!r} has no FlexAttention kernels"
    device = target.device or call.device.type
    if device == "cuda":
        smallest = min(hint_of(call.size("q", 3)), hint_of(call.size("v", 3)))
        fits = smallest >= SMALLEST_HEAD
        return "" if fits else f"FlexAttention needs a head_dim of at least {SMALLEST_HEAD} on CUDA, not {smallest}"
    if device != "cpu":
        return f"FlexAttention has no kernels for {device}"
    if target.gradients:
        return "FlexAttention has no gradients on CPU"
    if call.score_mod is not None and isinstance(call.score_mod.parts()[-1], SinkLogits):
        return "FlexAttention returns no log-sum-exp on CPU, which learned sinks need"
    if not torch.cpu._is_avx2_supported():
        return "FlexAttention needs AVX2 on CPU"
    if value_of(call.q).dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"FlexAttention takes no {value_of(call.q).dtype} on CPU"
    return ""
