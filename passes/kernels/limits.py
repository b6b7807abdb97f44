"""What the kernels can take: ours and those of torch, in a file without Triton."""

from __future__ import annotations

import torch

SMALLEST_HEAD = 16  # channels of a head that Triton kernels take
LARGEST_HEAD = 256  # channels of a head that SDPA's flash kernels, FLASH and paged attention take
SMALLEST_PAGE = 16  # keys of a block that Triton kernels visit
SMALLEST_KEY_GROUP = 8  # tokens that share a scale of keys
MOST_VALUE_GROUPS = 32  # scales of values in a head
MOST_KV_HEADS = 63  # that one launch tells apart, by the bits of an int64
HALF = (torch.bfloat16, torch.float16)
