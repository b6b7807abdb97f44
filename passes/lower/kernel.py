"""The interface of a kernel: which calls it can run, how its work is cut into blocks, and how a call of it is written.

To add a kernel, write one file with one subclass, and add a line to ``lower/kernels.py``.
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
from sparse_compile.passes.lower.nodes.emitter import Emitter


class Kernel(ABC):
    """One way to run attention.

    ``name`` is the value of ``kernel=``, ``aliases`` are other values for it, and reports show ``title``. ``device`` is the
    only device type that the kernel runs on; None means any. ``takes_any_mask`` marks the general kernel of a device: if it
    cannot run a call, the report gives its reason for the dense reference. ``reads_mask`` is False for a kernel that needs
    neither tables nor a dense mask if the mask is causal or full. ``realizes_captures`` says that generated code captures the
    tensors that masks read, so that each of them must be materialized as a buffer of its own. ``is_recordable`` is False for a
    kernel whose work depends on how much a cache holds, which a CUDA graph cannot record.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    aliases: ClassVar[tuple[str, ...]] = ()
    device: ClassVar[str | None] = None
    takes_any_mask: ClassVar[bool] = False
    reads_mask: ClassVar[bool] = True
    realizes_captures: ClassVar[bool] = False
    is_recordable: ClassVar[bool] = True

    @abstractmethod
    def rank(self, call: Attention, target: Target) -> int | None:
        """The rank of the kernel for this kind of call. The lowest rank is tried first; None means that it is not tried."""

    @abstractmethod
    def why_not(self, call: Attention, target: Target) -> str:
        """The reason for the report why the kernel cannot run ``call``; empty if it can."""

    @abstractmethod
    def layout(self, call: Attention, seen: NamedMask, target: Target) -> Layout:
        """The block tables of ``call``, and the kernel options that go with them."""

    @abstractmethod
    def lower(self, call: Attention, emitter: Emitter) -> Node | Left:
        """Write the nodes that run ``call``; returns the output node, or the reason why they cannot be written."""

    def lower_together(self, emitters: Sequence[Emitter], q: Node) -> Node | None:
        """Write one launch for all storage groups of a call with queries ``q``; None if each group needs its own launch."""
        return None


def needs_device(kernel: Kernel, call: Attention, target: Target) -> str:
    """Why ``kernel`` cannot run ``call`` on its device or with the inner compiler; empty if it can."""
    if target.inner == "eager":
        return "inner='eager' runs every call on the dense reference"
    device = target.device_of(call)
    if kernel.device in (None, device):
        return ""
    return f"{kernel.name} needs {'CUDA' if kernel.device == 'cuda' else 'a CPU'}, but the call runs on {device}"
