"""NATTEN's neighborhoods, pair by pair."""

from __future__ import annotations


def near(x: int, y: int, size: int, kernel: int, dilation: int = 1, causal: bool = False, stride: int = 1) -> bool:
    """Return whether ``x`` sees ``y`` on an axis of NATTEN. The window keeps the remainder and moves inward at the borders."""
    line = range(x % dilation, size, dilation)
    at = line.index(x)
    leader = min(at - at % stride + (stride - 1 if causal else stride // 2), len(line) - 1)
    first = leader - kernel + 1 if causal else min(max(leader - kernel // 2, 0), len(line) - kernel)
    stop = at + 1 if causal else first + kernel
    return y in line[max(first, 0) : stop]


def near_on_grid(
    i: int,
    j: int,
    grid: tuple[int, ...],
    kernel: tuple[int, ...],
    dilation: tuple[int, ...] | None = None,
    causal: tuple[bool, ...] | None = None,
    stride: tuple[int, ...] | None = None,
) -> bool:
    """Return whether ``i`` sees ``j`` on a NATTEN grid that is numbered row by row. Tokens beyond the grid see nothing."""
    dilation, causal = dilation or (1,) * len(grid), causal or (False,) * len(grid)
    stride = stride or (1,) * len(grid)
    for axis in reversed(range(len(grid))):
        (i, x), (j, y) = divmod(i, grid[axis]), divmod(j, grid[axis])
        if not near(x, y, grid[axis], kernel[axis], dilation[axis], causal[axis], stride[axis]):
            return False
    return i == 0 and j == 0
