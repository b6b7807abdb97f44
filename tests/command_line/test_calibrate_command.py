"""Run ``python -m sparse_compile calibrate`` as a user types it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, BertConfig, T5Config

from sparse_compile.__main__ import main
from sparse_compile.calibration import Passkeys, echo_profile, train_gates
from sparse_compile.calibration.cli import load, passkeys
from sparse_compile.head_profile import Profile, signature
from support.models import SMALL, VOCABULARY
from support.oracles.cache import llama
from support.word_tokenizer import word_tokenizer

SIZES = ["--longest", "200", "--sink", "4", "--recent", "16", "--device", "cpu"]

pytestmark = pytest.mark.usefixtures("fresh")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a model, written by ``save_pretrained``."""
    llama().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def error_of(arguments: list[Any], capsys: pytest.CaptureFixture[str]) -> str:
    """The single error line that a failing command prints."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 1
    captured = capsys.readouterr()
    *above, line = captured.err.splitlines()  # progress bars may precede the line
    assert line.startswith("error: "), captured.err
    assert not any(text in other for other in above for text in ("error", "Traceback")), captured.err
    assert captured.out == ""
    return line


def printed_by_us(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The lines on stderr, without the bars of transformers."""
    return [line for line in capsys.readouterr().err.splitlines() if line and "Loading weights" not in line]


def test_echo_writes_the_profile_of_the_saved_weights(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = folder.parent / "echo.json"
    assert main(["calibrate", str(folder), "--method", "echo", "--out", str(out), "--seed", "3", "--device", "cpu"]) == 0
    captured = capsys.readouterr()
    assert f"{out}: scores of 2 layers x 2 KV heads by echo" in captured.err
    assert "are random" not in captured.err
    profile = Profile.load(out)
    torch._dynamo.reset()
    assert profile == echo_profile(llama(), seed=3, inner="eager")
    profile.check(llama().config)
    assert dict(profile.policy(0.5, sink=4, recent=16).layers).keys() == {0, 1}


def test_gates_are_those_that_python_trains(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = folder.parent / "gates.json"
    assert main(["calibrate", str(folder), "--steps", "3", *SIZES, "--out", str(out)]) == 0
    assert "by gates" in capsys.readouterr().err
    data = Passkeys.of_tokens(VOCABULARY, longest=200, shortest=200, count=2, seed=42)
    torch._dynamo.reset()
    wanted = train_gates(llama(), data, steps=3, sink=4, recent=16, inner="eager", progress=False)
    assert Profile.load(out) == wanted
    assert json.loads(out.read_text())["profile"]["method"] == "gates"


@pytest.mark.parametrize("method", ["echo", "gates"])
@pytest.mark.parametrize(
    ("given", "used"), [([], "float32"), (["--dtype", "bfloat16"], "bfloat16"), (["--dtype", "float16"], "float16")]
)
def test_the_cpu_computes_in_float32_unless_told_otherwise(
    method: str, given: list[str], used: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Half precision is several times slower there."""
    llama().half().save_pretrained(tmp_path)
    training = ["--steps", "1", *SIZES] if method == "gates" else ["--device", "cpu"]
    assert main(["calibrate", str(tmp_path), "--method", method, *training, *given, "--out", str(tmp_path / "p.json")]) == 0
    assert f"on cpu in {used}" in capsys.readouterr().err
    assert load(tmp_path, "cpu", used)[0].dtype == getattr(torch, used)
    assert load(tmp_path, "cpu", "auto")[0].dtype == torch.float16


def test_a_calibration_says_how_far_it_is(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(folder.parent / "profile.json")
    assert main(["calibrate", str(folder), "--steps", "3", *SIZES, "--out", out]) == 0
    lines = printed_by_us(capsys)
    assert lines[1].startswith("step 1 of 3, compiling, 0 s")
    assert re.fullmatch(r"3 steps take about \d+ s, measured on a step of 200 tokens that also compiled", lines[2])
    assert re.fullmatch(r"step 3 of 3 is done, loss [\d.e-]+, mean gate [\d.]+, \d+ s", lines[-2])
    assert main(["calibrate", str(folder), "--method", "echo", "--device", "cpu", "--out", out]) == 0
    lines = printed_by_us(capsys)
    assert lines[1] == "one pass over 129 tokens, compiling, 0 s"
    assert re.fullmatch(r"2.0 of 2 layers are done, \d+ s", lines[-2])


@pytest.mark.parametrize("file", ["", "config.json"])
def test_a_bare_config_has_random_weights_and_says_so(file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    llama().config.save_pretrained(tmp_path)
    source, out = tmp_path / file, tmp_path / "profile.json"
    assert main(["calibrate", str(source), "--method", "echo", "--out", str(out)]) == 0
    printed = capsys.readouterr().err
    assert f"{source} has no weights, so the weights and the scores of the heads are random" in printed
    assert "beside it" not in printed
    assert Profile.load(out).model == signature(llama().config)


def test_weights_beside_a_config_are_not_read_and_it_says_so(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = folder.parent / "profile.json"
    assert main(["calibrate", str(folder / "config.json"), "--method", "echo", "--out", str(out)]) == 0
    printed = capsys.readouterr().err
    assert "scores of the heads are random; to use the weights beside it, name the folder" in printed


def test_a_tokenizer_beside_the_model_hides_words_in_a_text(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    word_tokenizer().save_pretrained(folder)
    text, out = folder.parent / "text.txt", folder.parent / "gates.json"
    text.write_text("one two three four five six seven " * 100)
    assert main(["calibrate", str(folder), "--steps", "2", *SIZES, "--text", str(text), "--out", str(out)]) == 0
    assert Profile.load(out).method == "gates"


def test_words_of_many_tokens_still_find_room() -> None:
    """With most tokenizers, ten passkeys of 32 words take more tokens than the shortest text has."""
    data = passkeys(llama(), word_tokenizer(letters=True), None, 32000, 1)
    assert (len(data.asking), data.longest) == (10, 32000)
    assert data(0)[0].shape[1] <= 32000
    assert len(passkeys(llama(), word_tokenizer(letters=True), None, 4096, 1).asking) < 10


def test_a_run_is_resumed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, again, file = (folder.parent / name for name in ("first.json", "again.json", "gates.pt"))
    arguments = ["calibrate", str(folder), "--steps", "2", *SIZES, "--resume", str(file)]
    assert main([*arguments, "--out", str(first)]) == 0
    assert file.exists()
    assert main([*arguments, "--out", str(again)]) == 0
    assert Profile.load(first) == Profile.load(again)
    message = error_of([*arguments[:3], "5", *arguments[4:], "--out", again], capsys)
    assert f"{file} belongs to a run with steps=2, but this run has steps=5: pass another file" in message


def test_problems_are_one_line_on_stderr(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    calibrate = ["calibrate", folder, "--steps", 1]
    assert "there is none at /no/such/model" in error_of(["calibrate", "/no/such/model"], capsys)
    assert "tokens of 1 passkeys" in error_of([*calibrate, "--longest", 20], capsys)
    assert "steps >= 1, got 0" in error_of(["calibrate", folder, "--steps", 0], capsys)
    assert "is in a folder that does not exist" in error_of([*calibrate, "--out", folder / "no" / "profile.json"], capsys)
    assert "its folder does not exist" in error_of([*calibrate, "--resume", folder / "no" / "gates.pt"], capsys)
    text = folder.parent / "text.txt"
    assert "needs a tokenizer, but the folder of the model has none" in error_of([*calibrate, "--text", text], capsys)
    assert "sliding_window size needs to be at least 1, got 0" in error_of(
        [*calibrate, "--recent", 0, "--longest", 200], capsys
    )
    (folder.parent / "gates.pt").write_text("no run")
    resumed = [*calibrate, "--longest", 200, "--resume", folder.parent / "gates.pt"]
    assert "was not written by train_gates" in error_of(resumed, capsys)
    (folder.parent / "gates.pt").unlink()
    assert main([str(word) for word in (*resumed, "--out", folder / "profile.json")]) == 0
    capsys.readouterr()
    message = error_of([*resumed, "--seed", 7], capsys)
    assert re.search(r"a run with data='\w+' \(a hash of the texts, their lengths and their seed\), but this run", message)
    ignored = ["calibrate", folder, "--method", "echo", "--steps", 3, "--sink", 4]
    assert "omit --steps, --sink" in error_of(ignored, capsys)
    if not torch.cuda.is_available():
        assert "--device cuda needs a GPU" in error_of([*calibrate, "--device", "cuda"], capsys)
    word_tokenizer().save_pretrained(folder)
    assert "No such file" in error_of([*calibrate, "--text", text], capsys)
    text.write_text("")
    assert "a text to hide them in" in error_of([*calibrate, "--text", text], capsys)


def test_models_without_causal_layers_are_one_line_on_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "empty" in error_of(["calibrate", empty], capsys)
    (tmp_path / "config.json").write_text("{")
    error_of(["calibrate", tmp_path / "config.json"], capsys)
    T5Config(d_model=32, num_layers=1, num_heads=2).save_pretrained(tmp_path)
    assert "T5Config" in error_of(["calibrate", tmp_path], capsys)
    sizes: dict[str, Any] = {
        key: SMALL[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    }
    BertConfig(**sizes, vocab_size=VOCABULARY).save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).model_type == "bert"
    message = error_of(["calibrate", tmp_path, "--longest", 200, "--steps", 1], capsys)
    assert "have no causal attention" in message
