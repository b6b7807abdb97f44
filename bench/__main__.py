"""Run a benchmark: ``python -m bench NAME`` prints a table and writes ``NAME.csv``, with each row as soon as it is measured.

``python -m bench report`` draws plots and writes the README's table from the CSVs.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from bench.attention.masks import run_masks
from bench.attention.prefill_decode import run_decode, run_prefill
from bench.attention.sweep import sweep
from bench.lab.evaluation import plots
from bench.lab.quality import quality, smoke
from bench.measure import timing
from bench.measure.report import report
from bench.models.cache import run_cache, run_cache_attention
from bench.models.calibration import run_gates
from bench.models.compiling import run_compile
from bench.models.generate import run_generate
from bench.models.generation import run_cache_generate, run_cache_prefill
from bench.models.lossless import run_lossless
from bench.models.model import run_model
from bench.models.quantized import run_quantized_attention, run_quantized_cache, run_quantized_model
from bench.models.selection import run_select_attention, run_select_model, run_select_prefill

BENCHES = {
    "prefill": run_prefill,
    "decode": run_decode,
    "model": run_model,
    "cache": run_cache,
    "cache-attention": run_cache_attention,
    "cache-prefill": run_cache_prefill,
    "cache-generate": run_cache_generate,
    "select-attention": run_select_attention,
    "select-model": run_select_model,
    "select-prefill": run_select_prefill,
    "quantized-attention": run_quantized_attention,
    "quantized-model": run_quantized_model,
    "quantized-cache": run_quantized_cache,
    "gates": run_gates,
    "masks": run_masks,
    "compile": run_compile,
    "sweep": sweep,
}
ANY_MACHINE = ("masks", "compile", "quality", "report")  # all others have sizes for a GPU


def main() -> None:
    """Run one benchmark, or make the report."""
    parser = argparse.ArgumentParser(prog="bench", description=__doc__)
    parser.add_argument("name", choices=["generate", "lossless", *BENCHES, "quality", "report"])
    parser.add_argument("--smoke", action="store_true", help="run with tiny sizes, in seconds, on any machine")
    parser.add_argument(
        "--out", type=Path, help="folder of the CSVs (default: bench/results, or a temporary folder with --smoke)"
    )
    arguments = parser.parse_args()
    if arguments.name == "report":
        report(arguments.out or timing.RESULTS)
        plots.plot(arguments.out or timing.RESULTS)
        return
    out = arguments.out or (Path(tempfile.mkdtemp()) if arguments.smoke else timing.RESULTS)
    if arguments.name not in ANY_MACHINE and not arguments.smoke and not timing.CUDA:
        parser.error(f"{arguments.name} has texts and models that take hours on a CPU, and torch finds no GPU: use --smoke")
    if arguments.name == "quality":
        smoke(out) if arguments.smoke else quality(out)
        print(f"written to {out}")
        return
    if arguments.name in ("generate", "lossless"):
        (run_generate if arguments.name == "generate" else run_lossless)(out, smoke=arguments.smoke)
        print(f"written to {out}")
        return
    timing.results.path = out / f"{arguments.name}.csv"
    try:
        BENCHES[arguments.name](smoke=arguments.smoke)
    finally:
        if timing.results.rows:
            print(timing.table(timing.results.rows))
            print(f"written to {out}")


if __name__ == "__main__":
    main()
