"""Test that the benchmarks run at small sizes on any machine, and that the README's table shows the results."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest
from torchao.quantization import Int8WeightOnlyConfig, quantize_

from bench.__main__ import BENCHES
from bench.measure import timing
from bench.measure.report import README, plot, with_table
from bench.models.filled import weights
from bench.models.generate import METHODS, measure_all, write_rows
from bench.models.model import TINY, build

pytestmark = pytest.mark.usefixtures("fresh")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in BENCHES if name != "sweep"])
def test_a_smoke_run_measures_and_writes(name: str, tmp_path: Path) -> None:
    rows = BENCHES[name](smoke=True)
    assert rows
    assert all(row.p50 > 0 and (not row.baseline or row.baseline_p50 > 0) for row in rows)
    timing.write(rows, tmp_path / "rows.csv")
    with (tmp_path / "rows.csv").open(encoding="utf-8") as file:
        assert [row["what"] for row in csv.DictReader(file)] == [row.what for row in rows]
    assert rows[0].what in timing.table(rows)
    if name == "compile":  # a second process finds both the AOTAutograd and the FX graph
        assert "Inductor cache hits: 2" in rows[-1].note


@pytest.mark.slow
def test_on_cpu_windows_and_long_caches_beat_sdpa_under_the_same_dense_mask() -> None:
    """Skipping keys is several times faster. Where all keys are read, the bar allows for a noisy machine."""
    window = next(row for row in BENCHES["prefill"](smoke=True) if row.baseline == "SDPA, dense mask")
    assert window.ratio > 1
    for row in BENCHES["decode"](smoke=True):
        assert row.kv_len == 32768
        assert row.ratio > (1 if row.what.startswith("all streaming") else 0.7)


def test_generate_is_measured_row_by_row(tmp_path: Path) -> None:
    methods = tuple(method for method in METHODS if method.name in ("eager", "exact"))
    write_rows(tmp_path / "generate.csv", measure_all(TINY, (64,), methods))
    with (tmp_path / "generate.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["method"], row["equal"]) for row in rows] == [("eager", "1"), ("exact", "1")]
    assert all(float(row["first_call_s"]) > float(row["first_token_s"]) > 0 and float(row["p50_ms"]) > 0 for row in rows)
    assert "causal" in rows[1]["kernels"] and float(rows[1]["cache_gib"]) > 0


def test_the_readme_says_what_was_measured() -> None:
    text = README.read_text("utf-8")
    assert with_table(text) == text


def test_plots_are_drawn_from_the_results(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib").use("Agg")
    for name in ("prefill", "decode"):
        (tmp_path / f"{name}.csv").write_bytes((timing.RESULTS / f"{name}.csv").read_bytes())
    plot(tmp_path)
    assert (tmp_path / "prefill.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "decode.png").exists()


def test_quantiles_are_in_order_and_the_bounds_are_of_this_machine() -> None:
    found = timing.measure(lambda: sum(range(1000)), repeat=5)
    assert 0 < found.p20 <= found.p50 <= found.p80
    assert timing.bandwidth() > 1e8
    assert math.isfinite(timing.matmul_rate())


def test_small_weights_count_as_what_they_take() -> None:
    model = build(TINY)
    plain = weights(model)
    quantize_(model, Int8WeightOnlyConfig(set_inductor_config=False))
    embedding = model.get_input_embeddings().weight.nbytes  # not quantized
    assert weights(model) - embedding < 0.3 * (plain - embedding)
