"""What a graph is compiled for, and the kernel that a group of heads runs."""

from __future__ import annotations

from dataclasses import dataclass

from sparse_compile.passes.ir.attention_call import AttentionCall


@dataclass(frozen=True)
class Kernel:
    """``name`` is ``flash``, ``triton``, ``cpp``, ``pages``, ``sdpa`` or ``reference``; ``why`` says what forbade a faster one.

    ``pages`` is a kernel of ours, for decode steps over a cache: rings, and chosen or encoded pages under a causal mask.
    ``flash``, ``triton`` and ``cpp`` are FlexAttention's, by the language they are generated in. ``sdpa`` is
    ``scaled_dot_product_attention`` without a mask tensor, on CPU also with a single row of one; ``reference`` has a dense one.
    """

    name: str
    why: str = ""


@dataclass(frozen=True)
class Target:
    """What the graph is compiled for: the inner compiler, the kernel asked for, whether gradients flow, and the device.

    ``device`` is a device type; None takes that of each call. ``capability`` is that of the GPU, None if there is none here.
    """

    inner: str = "inductor"
    kernel: str = "auto"
    gradients: bool = False
    device: str | None = None
    capability: tuple[int, int] | None = None

    def device_of(self, call: AttentionCall) -> str:
        """The device type that ``call`` is planned for."""
        return self.device or str(call.device.type)
