"""Profiles: scores by head, files, the heads that they choose, and the policies that they build."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sparse_compile as sc
from sparse_compile.head_profile import Profile, signature
from sparse_compile.masks import causal, per_head, sink, sliding_window
from support.oracles.cache import llama

SCORES = [[0.9, 0.1, 0.5], [0.2, 0.8, 0.4]]
STREAMING = causal & (sink(2) | sliding_window(4))


def kept(profile: Profile, retrieval: float, **options: Any) -> list[tuple[int, int]]:
    full = profile.heads(retrieval, **options).full
    return [(layer, head) for layer, row in enumerate(full) for head, sees_all in enumerate(row) if sees_all]


def test_the_highest_scores_see_everything() -> None:
    profile = Profile(SCORES)
    assert kept(profile, 1 / 3) == [(0, 0), (1, 1)]
    assert kept(profile, 0) == []
    assert len(kept(profile, 1)) == 6
    policy = profile.policy(1 / 3, sink=2, recent=4)
    assert dict(policy.layers) == {0: per_head([causal, STREAMING, STREAMING]), 1: per_head([STREAMING, causal, STREAMING])}
    assert dict(profile.policy(1).layers) == {0: causal, 1: causal}


def test_each_layer_may_keep_some() -> None:
    profile = Profile([[0.9, 0.8, 0.7], [0.3, 0.2, 0.1]])
    assert kept(profile, 0.5) == [(0, 0), (0, 1), (0, 2)]
    assert kept(profile, 0.5, minimum=1) == [(0, 0), (0, 1), (1, 0)]
    with pytest.raises(ValueError, match=r"minimum=2 takes 4 heads, but retrieval=0.5 of 2 x 3 heads is 3: pass a smaller"):
        profile.heads(0.5, minimum=2)


def test_ties_go_to_lower_heads_and_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    profile = Profile([[1.0, 1.0], [1.0, 0.0]])
    found = profile.heads(0.5)
    assert (found.full, found.tied, found.places) == (((True, True), (False, False)), 3, 2)
    assert "3 heads tie at score 1 for 2 places" in caplog.text
    assert profile.heads(0.75).tied == 0


@given(st.lists(st.lists(st.floats(-5, 5), min_size=3, max_size=3), min_size=1, max_size=6), st.floats(0, 1), st.integers(0, 1))
def test_the_share_is_kept_and_no_score_is_passed_over(scores: list[list[float]], retrieval: float, minimum: int) -> None:
    profile, count = Profile(scores), int(retrieval * 3 * len(scores) + 0.5)
    if minimum * len(scores) > count:
        return
    chosen = set(kept(profile, retrieval, minimum=minimum))
    assert len(chosen) == count
    assert all(sum(layer == at for layer, _ in chosen) >= minimum for at in range(len(scores)))
    if not minimum and chosen:
        least = min(scores[layer][head] for layer, head in chosen)
        others = [scores[layer][head] for layer in range(len(scores)) for head in range(3) if (layer, head) not in chosen]
        assert all(other <= least for other in others)


def test_a_profile_is_a_small_file(tmp_path: Path) -> None:
    profile = Profile(SCORES, method="gates", model={"type": "llama"}, numbers={"steps": 20, "loss": 0.5})
    profile.save(tmp_path / "profile.json")
    assert Profile.load(tmp_path / "profile.json") == profile == Profile.read(tmp_path / "profile.json")
    assert json.loads((tmp_path / "profile.json").read_text())["profile"]["method"] == "gates"


def test_published_folders_tensors_and_lists_are_read(tmp_path: Path) -> None:
    (tmp_path / "full_attention_heads.tsv").write_text("0.9\t0.1\n0.2\t0.8\n")
    (tmp_path / "config.json").write_text(json.dumps({"sink_size": 128, "recent_size": 256}))
    profile = Profile.read(tmp_path)
    assert profile == Profile([[0.9, 0.1], [0.2, 0.8]], method="gates", numbers={"sink": 128, "recent": 256})
    assert Profile.read(torch.tensor([[1.0, 0.0]])).scores == Profile.read([[1, 0]]).scores == ((1.0, 0.0),)
    with pytest.raises(FileNotFoundError, match="there is no pattern"):
        Profile.read(tmp_path / "nowhere")


def test_policies_by_name_take_profiles(tmp_path: Path) -> None:
    profile = Profile([[0.9, 0.1], [0.2, 0.8]])
    assert sc.policies.duo_attention(profile, 0.5) == sc.policies.duo_attention([[0.9, 0.1], [0.2, 0.8]], 0.5)
    profile.save(tmp_path / "profile.json")
    assert sc.policies.duo_attention(tmp_path / "profile.json") == sc.policies.duo_attention(profile)
    assert sc.policies.lserve(profile, budget=64) == sc.policies.lserve([[0.9, 0.1], [0.2, 0.8]], budget=64)


def test_a_profile_knows_its_model() -> None:
    config = llama().config
    profile = Profile([[0.5, 0.5]] * 2, model=signature(config))
    profile.check(config)
    with pytest.raises(
        ValueError, match=r"this profile is of .*'layers': 2.* but the model is .*'layers': 3.*: calibrate this model"
    ):
        profile.check(llama(num_hidden_layers=3).config)
    with pytest.raises(ValueError, match="calibrate this model"):
        Profile([[0.5]]).check(config)


@pytest.mark.parametrize("scores", [[], [[]], [[1.0], [1.0, 2.0]]])
def test_what_is_no_table_is_refused(scores: Any) -> None:
    with pytest.raises(ValueError, match="a row for each layer and a column for each KV head"):
        Profile(scores)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("{", "the text is not valid JSON"),
        ("[]", "needs version 1 and a profile, got version None"),
        ('{"version": 2, "profile": {}}', "got version 2"),
        ('{"version": 1, "profile": {}}', "a profile needs scores"),
        ('{"version": 1, "profile": {"scores": [[NaN]]}}', "finite numbers"),
    ],
)
def test_broken_files_are_refused(text: str, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        Profile.from_json(text)


@pytest.mark.parametrize("retrieval", [-0.1, 1.1])
def test_a_share_is_a_share(retrieval: float) -> None:
    with pytest.raises(ValueError, match="retrieval is a share of all heads, from 0 to 1"):
        Profile(SCORES).heads(retrieval)


def test_a_picture_of_heads_by_layers() -> None:
    pytest.importorskip("matplotlib").use("Agg")
    axes = Profile(SCORES, method="echo").plot().axes[0]
    assert axes.images[0].get_size() == (3, 2)
    assert axes.get_title().startswith("echo")


def test_a_picture_counts_layers_and_heads_in_whole_numbers() -> None:
    pytest.importorskip("matplotlib").use("Agg")
    figure = Profile([[0.9, 0.1], [0.2, 0.8]]).plot()
    figure.draw_without_rendering()
    axes = figure.axes[0]
    assert all(tick == int(tick) for axis in (axes.xaxis, axes.yaxis) for tick in axis.get_ticklocs())
