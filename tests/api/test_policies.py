"""Published policies by name: the masks they consist of, and the heads they choose."""

import json
import logging
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparse_compile import Policy, policies
from sparse_compile.masks import causal, page_topk, per_head, sink, sliding_window

numpy = pytest.importorskip("numpy")

STREAMING = causal & (sink(64) | sliding_window(256))


def published(folder: Path, gates: list[list[float]]) -> Path:
    """Write a pattern as DuoAttention publishes it."""
    folder.mkdir()
    (folder / "full_attention_heads.tsv").write_text("\n".join("\t".join(f"{g:.6e}" for g in row) for row in gates) + "\n")
    (folder / "config.json").write_text(json.dumps({"sink_size": 128, "recent_size": 512}))
    return folder


def test_dense_and_streaming_are_one_mask() -> None:
    assert policies.dense() == Policy(causal)
    assert policies.streaming_llm(sink=4, recent=12) == Policy(causal & (sink(4) | sliding_window(12)))


def test_quest_reads_pages_in_decode_steps_beyond_its_dense_layers() -> None:
    policy = policies.quest(1024, page=8, dense_layers=2)
    assert [policy.mask_for("", layer, "decode") for layer in (0, 1, 2)] == [causal, causal, causal & page_topk(1024, page=8)]
    assert {policy.mask_for("", layer, "prefill") for layer in range(3)} == {causal}
    assert policies.quest(1024, dense_layers=0).mask_for("", 0, "decode") == causal & page_topk(1024)
    assert policy.selects()
    assert Policy.from_json(policy.to_json()) == policy


def test_lserve_streams_some_heads_and_chooses_for_the_others() -> None:
    policy = policies.lserve(
        [[0.9, 0.1], [0.8, 0.95]], budget=512, every=2, sink=8, recent=16, prefill_recent=32, sparsity=0.25
    )
    chosen = causal & page_topk(512, every=2)
    assert policy.mask_for("", 0, "decode") == per_head([chosen, causal & (sink(8) | sliding_window(16))])
    assert policy.mask_for("", 1, "decode") == chosen
    assert policy.mask_for("", 0, "prefill") == per_head([causal, causal & (sink(8) | sliding_window(32))])
    assert policies.lserve().mask_for("", 7, "decode") == causal & page_topk(4096, every=4)


def test_block_topk_keeps_the_sink_and_reads_pages_by_their_mean() -> None:
    policy = policies.block_topk(16, page=32, sink=4, dense_layers=1)
    chosen = page_topk(512, page=32, score="mean", group="mean")
    assert policy.mask_for("", 0, "decode") == causal
    assert policy.mask_for("", 1, "decode") == causal & (sink(4) | chosen)
    assert policies.block_topk(16, page=32, sink=0).mask_for("", 1, "decode") == causal & chosen


def test_only_policies_that_look_at_keys_need_their_pages() -> None:
    chosen = causal & page_topk(64)
    assert not policies.streaming_llm().selects()
    assert not Policy(chosen, decode=causal).selects()
    assert Policy(causal, layers={1: chosen}).selects()


def test_a_published_folder_loads_as_it_is(tmp_path: Path) -> None:
    folder = published(tmp_path / "pattern", [[0.9, 0.1], [0.2, 0.8], [0.95, 0.85]])
    policy = policies.duo_attention(folder, sparsity=0.4)
    assert dict(policy.layers) == {0: per_head([causal, STREAMING]), 1: per_head([STREAMING, causal]), 2: causal}
    assert policies.duo_attention(folder / "full_attention_heads.tsv", 0.4) == policy
    assert policies.duo_attention(torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.95, 0.85]]), 0.4) == policy
    sized = policies.duo_attention(folder, 0.4, sink=None, recent=None)
    assert dict(sized.layers)[0] == per_head([causal, causal & (sink(128) | sliding_window(512))])


@given(st.lists(st.lists(st.floats(-0.5, 1.5), min_size=4, max_size=4), min_size=1, max_size=8), st.floats(0.01, 0.99))
def test_without_ties_heads_are_those_of_the_quantile(gates: list[list[float]], sparsity: float) -> None:
    clipped = numpy.clip(numpy.array(gates), 0, 1)
    if len(numpy.unique(clipped)) < clipped.size or numpy.diff(numpy.sort(clipped.ravel())).min() < 1e-5:
        return
    found = policies.full_heads(gates, sparsity)
    threshold = numpy.quantile(clipped, sparsity)
    if numpy.abs(clipped - threshold).min() < 1e-9 and (clipped.size - 1) * sparsity % 1 > 1e-9:
        return
    wanted = clipped >= threshold - 1e-12
    assert numpy.array_equal(numpy.array(found.full), wanted)
    assert found.tied == 0


def test_ties_go_to_lower_layers_and_heads_and_are_reported(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        found = policies.full_heads([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]], 0.5)
    assert found.full == ((True, False), (True, True), (False, False))
    assert (found.tied, found.places) == (4, 3)
    assert "4 heads tie at gate 1 for 3 places" in caplog.text


@pytest.mark.parametrize(("sparsity", "full"), [(0.0, 4), (-1.0, 4), (1.0, 0), (2.0, 0)])
def test_the_ends_are_all_heads_and_none(sparsity: float, full: int) -> None:
    found = policies.full_heads([[0.1, 0.2], [0.3, 0.4]], sparsity)
    assert sum(map(sum, found.full)) == full


def test_lserve_prefills_with_a_wider_window() -> None:
    policy = policies.lserve_static([[0.9, 0.1]])
    narrow, wide = (causal & (sink(128) | sliding_window(recent)) for recent in (256, 8192))
    assert policy.mask_for("", 0, "decode") == per_head([causal, narrow])
    assert policy.mask_for("", 0, "prefill") == per_head([causal, wide])


def test_what_is_no_pattern_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no pattern"):
        policies.duo_attention(tmp_path / "nowhere")
    broken = tmp_path / "broken.tsv"
    broken.write_text("0.1\tmany\n")
    with pytest.raises(ValueError, match="one layer of gates per line, but one gate is not a number"):
        policies.duo_attention(broken)
    with pytest.raises(ValueError, match="a row for each layer"):
        policies.duo_attention([[0.1, 0.2], [0.3]])
    with pytest.raises(ValueError, match=r"shape \[layers, KV heads\]"):
        policies.duo_attention(torch.zeros(3))
    with pytest.raises(ValueError, match=r"no config\.json"):
        policies.duo_attention([[0.1, 0.2]], sink=None)
