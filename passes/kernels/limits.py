"""What our kernels and those of torch can take."""

from __future__ import annotations

SMALLEST_HEAD = 16  # of the Triton kernels


SMALLEST_PAGE = 16  # keys of a block of theirs


SMALLEST_GROUP = 8  # tokens that share a scale


MOST_GROUPS = 32  # of channels that do, in a head


MOST_KV_HEADS = 63  # that a launch tells apart, by the bits of an int64


LARGEST_HEAD = 256  # of the flash kernels, SDPA's and FLASH
