"""The target of a compilation, and the kernel that each head group runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from sparse_compile.passes.ir.attention import Attention


@dataclass(frozen=True)
class Target:
    """The target of a graph: the inner compiler, the requested kernel, whether gradients flow, and the device.

    ``device`` is a device type; None means the device of each call. ``capability`` is the compute capability of this
    machine's GPU, or None without a GPU.
    """

    inner: str = "inductor"
    kernel: str = "auto"
    gradients: bool = False
    device: str | None = None
    capability: tuple[int, int] | None = None

    def device_of(self, call: Attention) -> str:
        """The device type that ``call`` is planned for."""
        return self.device or str(call.device.type)

    @property
    def is_free(self) -> bool:
        """Whether the library chooses kernels, because the user forces none."""
        return self.kernel in ("auto", "autotune")


class Candidate(Protocol):
    """The part of a kernel that the kernel choice uses; see ``lower/kernel.py``."""

    @property
    def name(self) -> str: ...

    @property
    def title(self) -> str: ...

    @property
    def aliases(self) -> tuple[str, ...]: ...

    @property
    def device(self) -> str | None: ...

    @property
    def takes_any_mask(self) -> bool: ...

    @property
    def reads_mask(self) -> bool: ...

    def rank(self, call: Attention, target: Target) -> int | None: ...

    def why_not(self, call: Attention, target: Target) -> str: ...


@dataclass(frozen=True)
class Refusal:
    """A kernel that would be faster, and why it cannot run a call."""

    kernel: str
    reason: str


K = TypeVar("K", bound=Candidate)


@dataclass(frozen=True)
class KernelChoice(Generic[K]):
    """The kernel of a call, why it is the dense reference (empty for other kernels), and the refusals of faster kernels."""

    kernel: K
    why: str = ""
    refused: tuple[Refusal, ...] = ()


@dataclass(frozen=True)
class HeadGroup(Generic[K]):
    """Query heads of a call that share a mask and run one kernel.

    ``call`` has the masks of these heads, but ``q`` and ``kv`` of all heads of its storage. ``heads`` and ``kv_heads`` are the
    places of the group among all heads of the storage; None means all.
    """

    call: Attention
    choice: KernelChoice[K]
    heads: tuple[int, ...] | None = None
    kv_heads: tuple[int, ...] | None = None
