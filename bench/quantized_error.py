"""``python -m bench.quantized_error``: measure the error of attention over quantized keys and values, by format and groups.

Queries, keys and values are random normal numbers. A second set of draws makes 2 % of the key channels ten times larger, as
they are in trained models. The error is the norm of the difference divided by the norm of exact attention. Each row has the
mean and the largest error of several draws.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import sparse_compile as sc
from bench.measure.timing import RESULTS, environment
from sparse_compile.passes.storage.codec import Format, dequantize, quantize

KEYS, DIM, HEADS, QUERIES, DRAWS = 4096, 128, 8, 32, 4
FORMATS = [
    sc.KVFormat("int8", "int8"),
    *(sc.KVFormat("int8", "int8", k, v) for k, v in ((16, 128), (64, 128), (64, 64))),
    sc.KVFormat("fp8", "fp8"),
    sc.KVFormat("int8", "int4"),
    sc.KVFormat("int4", "int4"),
    *(sc.KVFormat("int4", "int4", k, v) for k, v in ((16, 32), (32, 64), (64, 64), (64, 128))),
]


def _draws(outliers: bool) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    for seed in range(DRAWS):
        torch.manual_seed(seed)
        q, k, v = (torch.randn(1, HEADS, n, DIM) for n in (QUERIES, KEYS, KEYS))
        if outliers:
            k[..., torch.randperm(DIM)[: round(0.02 * DIM)]] *= 10
        yield q, k, v


def _decoded(x: Tensor, form: Format) -> Tensor:
    return dequantize(quantize(x, None, form), form, torch.float32)


def _bytes(form: Format) -> float:
    """Return the bytes of each number, scales and offsets included. A bfloat16 number takes 2."""
    parts = form.parts(1, 64, DIM, torch.bfloat16)
    return sum(shape[0] * shape[1] * shape[2] * dtype.itemsize for shape, dtype in parts) / (64 * DIM)


def main() -> None:
    """Measure, print and write ``quantized-error.csv``."""
    rows = []
    for outliers in (False, True):
        for kv in FORMATS:
            forms = kv.forms(DIM, DIM, 64)
            assert forms is not None
            errors = []
            for q, k, v in _draws(outliers):
                exact = scaled_dot_product_attention(q, k, v)
                quantized = scaled_dot_product_attention(q, _decoded(k, forms[0]), _decoded(v, forms[1]))
                errors.append(float((quantized - exact).norm() / exact.norm()))
            rows.append(
                {
                    "draw": "2 % of key channels x 10" if outliers else "normal",
                    "keys": kv.key,
                    "values": kv.value,
                    "tokens of a key group": forms[0].tokens if forms[0].channels else "",
                    "channels of a value group": forms[1].channels or "",
                    "bytes of a key": round(_bytes(forms[0]), 4),
                    "bytes of a value": round(_bytes(forms[1]), 4),
                    "mean error": f"{sum(errors) / DRAWS:.4f}",
                    "largest error": f"{max(errors):.4f}",
                    "torch": environment()["torch"],
                    "commit": environment()["commit"],
                    "date": environment()["date"],
                }
            )
            print(*rows[-1].values(), sep="  ")
    with (RESULTS / "quantized-error.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
