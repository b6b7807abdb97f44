"""Run the command line as a user types it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from transformers import AutoConfig

from sparse_compile.__main__ import main
from sparse_compile.masks import causal, sink, sliding_window
from sparse_compile.policy import Policy
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
