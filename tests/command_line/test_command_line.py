"""Run the command line as a user types it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from sparse_compile import policies
from sparse_compile.__main__ import main
from sparse_compile.explain_config import explain_config
from sparse_compile.head_profile import Profile
from sparse_compile.masks import Mask, causal, per_head, sink, sliding_window
from sparse_compile.policy import Policy
from sparse_compile.policy_argument import NAMED, OF_A_PROFILE
from support.models import DECODERS

pytestmark = pytest.mark.usefixtures("fresh")


def save_config(name: str, folder: Path) -> Path:
    decoder = next(d for d in DECODERS if d.name == name)
    AutoConfig.for_model(name, **decoder.config).save_pretrained(folder)
    return folder


def test_explain_needs_a_config_and_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", str(save_config("gemma3_text", tmp_path)), "--tokens", "64"]) == 0
    printed = capsys.readouterr().out
    assert "4 of 4 attention calls rewritten" in printed
    assert re.search(r"prefill +64 x 64 +causal & sliding_window\(8\) .* FlexAttention", printed)
    assert re.search(r"decode +1 x 65 +(full|causal) .* SDPA", printed)


def test_explain_reads_a_policy_and_prints_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    policy = tmp_path / "policy.json"
    Policy(decode=causal & (sink(4) | sliding_window(16))).save(policy)
    config = save_config("llama", tmp_path / "model")
    assert main(["explain", str(config / "config.json"), "--policy", str(policy), "--device", "cuda", "--json"]) == 0
    sites = json.loads(capsys.readouterr().out)["sites"]
    assert [(site["phase"], site["action"]) for site in sites] == [("prefill", "exact")] * 2 + [("decode", "sparse")] * 2
    assert sites[-1]["density"] == 20 / 1025


def explained(config: Path, policy: object, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The report that ``explain --policy`` prints as JSON."""
    assert main(["explain", str(config), "--policy", str(policy), "--tokens", "600", "--json"]) == 0
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    return report


def test_explain_takes_the_profile_that_calibrate_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, profile = save_config("llama", tmp_path / "model"), tmp_path / "profile.json"
    assert main(["calibrate", str(config), "--method", "echo", "--out", str(profile), "--device", "cpu"]) == 0
    capsys.readouterr()
    report = explained(config, profile, capsys)
    wanted = Profile.load(profile).policy(0.5, sink=64, recent=256)
    assert [site["policy_mask"] for site in report["sites"]] == [str(mask) for _, mask in wanted.layers] * 2
    assert (
        "the policy is made of a profile by echo: half of the KV heads see everything, the others the first 64 and"
        in (report["notes"][0])
    )


def test_a_profile_says_which_sink_and_window_its_heads_were_trained_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "profile.json"
    Profile([[1, 0], [0, 1]], method="gates", numbers={"sink": 8, "recent": 32}).save(file)
    report = explained(save_config("llama", tmp_path / "model"), file, capsys)
    assert report["sites"][0]["policy_mask"] == str(per_head([causal, causal & (sink(8) | sliding_window(32))]))


def test_a_profile_of_another_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Profile([[1.0, 0.0]]).save(tmp_path / "profile.json")
    config = save_config("llama", tmp_path / "model")
    assert main(["explain", str(config), "--policy", str(tmp_path / "profile.json")]) == 1
    assert "this profile is of (1, 2), but the model is" in capsys.readouterr().err


@pytest.mark.parametrize("name", NAMED)
def test_explain_takes_policies_by_name(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = save_config("llama", tmp_path)
    wanted = explain_config(config, NAMED[name](), 1, 600, "cpu").to_json()
    torch._dynamo.reset()  # or the second run has lengths as symbols
    assert explained(config, name, capsys) == json.loads(wanted)


def test_every_policy_that_needs_no_model_has_its_name() -> None:
    public = {name: value for name, value in vars(policies).items() if getattr(value, "__module__", "") == policies.__name__}
    made = {name for name, value in public.items() if name[0] != "_" and value.__annotations__["return"] == "Policy"}
    assert made == {*NAMED, *OF_A_PROFILE}


def test_explain_takes_masks_and_published_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, mask = save_config("llama", tmp_path / "model"), causal & sliding_window(16)
    (tmp_path / "mask.json").write_text(mask.to_json())
    assert explained(config, tmp_path / "mask.json", capsys)["sites"][0]["policy_mask"] == str(mask)
    folder = tmp_path / "pattern"
    folder.mkdir()
    (folder / "full_attention_heads.tsv").write_text("1 0\n0 1\n")
    (folder / "config.json").write_text('{"sink_size": 8, "recent_size": 32}')
    streaming = causal & (sink(8) | sliding_window(32))
    assert explained(config, folder, capsys)["sites"][1]["policy_mask"] == str(per_head([streaming, causal]))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            "streaming_lm",
            "needs one of dense, streaming_llm, quest, lserve, block_topk, or a file of a policy, a mask or",
        ),
        ("no/policy.json", "got 'no/policy.json': there is no such name and no such file"),
        ("duo_attention", "got 'duo_attention': this one is made of a profile, so pass the file that calibrate wrote"),
    ],
)
def test_what_is_neither_a_name_nor_a_file_is_told_what_is(
    given: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["explain", str(save_config("llama", tmp_path)), "--policy", given]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("read", "text", "message"),
    [
        (
            Policy.from_json,
            Profile([[1.0]]).to_json(),
            "this is a profile file: read it with Profile.load, whose method",
        ),
        (Policy.from_json, causal.to_json(), "this is a mask file: read it with Mask.from_json"),
        (
            Profile.from_json,
            Policy(causal).to_json(),
            "a profile file is needed, but this is a policy file: read it",
        ),
        (
            Mask.from_json,
            Policy(causal).to_json(),
            "a mask file is needed, but this is a policy file: read it",
        ),
    ],
)
def test_a_file_of_another_kind_is_told_which_it_is(read: Callable[[str], object], text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["explain", "/no/such/config"], "there is none at /no/such/config"),
        (["demo", "--text", "/no/such/text"], "No such file"),
        (["demo", "--tokens", "1000000"], "name a longer --text"),
    ],
)
def test_problems_are_one_line_on_stderr(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 1
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1


def test_the_demo_is_exact_draws_and_says_what_it_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "mask.png"
    assert main(["demo", "--tokens", "400", "--picture", str(picture)]) == 0
    printed = capsys.readouterr().out
    error = re.search(r"largest difference of a logit from the eager model: (\S+) of", printed)
    assert error is not None
    assert float(error.group(1)) < 1e-5
    assert printed.count("4 of 4 attention calls rewritten") == 2
    assert "KV entries the last token sees: 260 of 400" in printed
    assert "██······" in printed
    assert picture.read_bytes().startswith(b"\x89PNG")
