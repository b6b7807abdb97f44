"""Choose the kernel of a call: try the kernels from the fastest on, and record every refusal."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec

import torch

from sparse_compile.passes.ir.attention import Attention
from sparse_compile.passes.ir.target import K, KernelChoice, Refusal, Target


def choose_kernel(call: Attention, target: Target, kernels: Sequence[K]) -> KernelChoice[K]:
    """Return the fastest of ``kernels`` that can run ``call``. The ranks come from the measurements in ``bench``.

    The last kernel runs every call. Raises ``ValueError`` with the reason if ``target`` forces a kernel that cannot run it.
    """
    if not target.is_free:
        return _demanded(call, target, kernels)
    refused: list[Refusal] = []
    why = ""
    for kernel in _ranked(call, target, kernels):
        reason = kernel.why_not(call, target)
        if not reason:
            return KernelChoice(kernel, why if kernel is kernels[-1] else "", tuple(refused))
        refused.append(Refusal(kernel.title, reason))
        why = reason if kernel.takes_any_mask else why
    raise AssertionError("the last kernel refuses nothing")


def _ranked(call: Attention, target: Target, kernels: Sequence[K]) -> list[K]:
    """The kernels for the device and the kind of ``call``, from the fastest on."""
    device = target.device_of(call)
    ranks = [(kernel.rank(call, target), at) for at, kernel in enumerate(kernels) if kernel.device in (None, device)]
    return [kernels[at] for _, at in sorted((rank, at) for rank, at in ranks if rank is not None)]


def _demanded(call: Attention, target: Target, kernels: Sequence[K]) -> KernelChoice[K]:
    """The kernel that ``target`` forces. If several share the name, the first that can run the call on its device."""
    named = [kernel for kernel in kernels if target.kernel in (kernel.name, *kernel.aliases)]
    here = [kernel for kernel in named if kernel.device in (None, target.device_of(call))] or named
    reasons = [kernel.why_not(call, target) for kernel in here]
    at = reasons.index("") if "" in reasons else -1
    kernel, reason = here[at], reasons[at]
    if reason:
        raise ValueError(f"kernel={target.kernel!r} cannot run {call.name}: {reason}; use kernel='auto'")
    return KernelChoice(kernel, f"kernel={target.kernel!r} forces it" if kernel is kernels[-1] else "")


def capability() -> tuple[int, int] | None:
    """The compute capability of this machine's GPU; None without one."""
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else None


@cache
def flash_installed() -> bool:
    """Whether FlexAttention's FLASH backend can be imported."""
    try:
        return find_spec("flash_attn.cute") is not None
    except ImportError:
        return False
