"""The limits of our kernels and of torch's. This file does not import Triton."""

from __future__ import annotations

import torch

SMALLEST_HEAD = 16  # fewest channels of a head in Triton kernels
LARGEST_HEAD = 256  # most channels of a head in SDPA's flash kernels, FLASH and paged attention
SMALLEST_PAGE = 16  # fewest keys of a block in Triton kernels
SMALLEST_KEY_GROUP = 8  # fewest tokens that share a scale of keys
MOST_VALUE_GROUPS = 32  # most scales of values in a head
MOST_KV_HEADS = 63  # in one launch, which marks heads by the bits of an int64
HALF = (torch.bfloat16, torch.float16)
