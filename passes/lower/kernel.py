"""What a kernel is to the passes: one file with a class that says what it takes, how its work is cut, and how it is called.

A new kernel is a file like its neighbors, and a line in ``lower/kernels.py``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from torch.fx import Node

from sparse_compile.passes.choose.block_layout import Layout
from sparse_compile.passes.choose.named_mask import NamedMask
from sparse_compile.passes.ir.attention import Attention
from sparse_compile.passes.ir.left import Left
from sparse_compile.passes.ir.target import Target
from sparse_compile.passes.lower.emitter import Emitter


class Kernel(ABC):
    """One way to run attention.

    ``name`` is what ``kernel=`` takes, ``title`` what reports show, and ``aliases`` are other names it goes by. ``device`` is
    the only device type it runs on, or None. ``takes_any_mask`` marks the general kernel of a device: why it cannot run a call
    is why the dense reference does. ``reads_mask`` is false for a kernel that needs neither tables nor a dense mask for a plain
    one. ``realizes_captures`` says that tensors which masks read are captured by generated code, so that each must be a buffer
    of its own.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    aliases: ClassVar[tuple[str, ...]] = ()
    device: ClassVar[str | None] = None
    takes_any_mask: ClassVar[bool] = False
    reads_mask: ClassVar[bool] = True
    realizes_captures: ClassVar[bool] = False

    @abstractmethod
    def rank(self, call: Attention, target: Target) -> int | None:
        """How fast the kernel is for this kind of call: the lowest rank is tried first. None: it is not meant for it."""

    @abstractmethod
    def why_not(self, call: Attention, target: Target) -> str:
        """Why the kernel cannot run ``call``, for the report; empty if it can."""

    @abstractmethod
    def layout(self, call: Attention, seen: NamedMask, target: Target) -> Layout:
        """How the work of ``call`` is cut into blocks, and the kernel options that go with it."""

    @abstractmethod
    def lower(self, call: Attention, emitter: Emitter) -> Node | Left:
        """Write the nodes that run ``call``; returns that of the output, or why they cannot be written."""

    def lower_together(self, emitters: Sequence[Emitter], q: Node) -> Node | None:
        """Write one launch for all storage groups of a call whose queries are ``q``; None if it takes one for each."""
        return None


def needs_device(kernel: Kernel, call: Attention, target: Target) -> str:
    """Why a kernel of one device type cannot run ``call``; empty if the call runs there."""
    device = target.device_of(call)
    if target.inner == "eager":
        return "inner='eager' has no FlexAttention kernels"
    if kernel.device == "cuda" and device != "cuda":
        return f"{kernel.name} needs CUDA, and the call runs on {device}"
    if kernel.device == "cpu" and device != "cpu":
        return f"FlexAttention has no kernels for {device}"
    return ""
