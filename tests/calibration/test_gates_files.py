"""Checkpoints of gate training: runs that resume, and files that are refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sparse_compile.calibration import Passkeys, checkpoint, train_gates
from support.gated_models import SETTINGS, last, trained_toy
from support.models import VOCABULARY
from support.oracles.cache import llama

pytestmark = pytest.mark.usefixtures("fresh")


def test_the_same_run_twice_gives_the_same_gates_bit_for_bit() -> None:
    data = Passkeys.of_tokens(VOCABULARY, longest=60, shortest=40, count=1, size=3, seed=7)
    first = trained_toy(data, steps=6)
    torch.manual_seed(99)
    assert trained_toy(data, steps=6) == first
    other = Passkeys.of_tokens(VOCABULARY, longest=60, shortest=40, count=1, size=3, seed=8)
    assert trained_toy(other, steps=6).scores != first.scores


class Interrupted(Exception):
    """Stands for a machine that fails during training."""


def interrupted(at: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    def batches(step: int) -> tuple[Tensor, Tensor]:
        if step == at:
            raise Interrupted
        return last(step)

    return batches


@pytest.mark.parametrize("at", [1, 2, 5, 7])
def test_a_run_that_was_interrupted_goes_on_as_if_it_had_not_been(
    at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "STEPS", 2)
    wanted = trained_toy(last, steps=8)
    file = tmp_path / "gates.pt"
    with pytest.raises(Interrupted):
        trained_toy(interrupted(at), steps=8, resume=file)
    assert file.exists() == (at >= 2)
    steps: list[int] = []

    def batches(step: int) -> tuple[Tensor, Tensor]:
        steps.append(step)
        return last(step)

    assert trained_toy(batches, steps=8, resume=file) == wanted
    assert steps == list(range(at // 2 * 2, 8))


def test_a_run_that_is_done_is_read_from_its_file(tmp_path: Path) -> None:
    file = tmp_path / "gates.pt"
    wanted = trained_toy(last, steps=3, resume=file)
    assert trained_toy(interrupted(0), steps=3, resume=str(file)) == wanted


@pytest.mark.parametrize(
    ("change", "old", "new"),
    [
        ({"steps": 4}, "steps=2", "steps=4"),
        ({"sink": 3}, "sink=2", "sink=3"),
        ({"recent": 6}, "recent=5", "recent=6"),
        ({"rate": 0.03}, "rate=0.02", "rate=0.03"),
        ({"penalty": 0.1, "steps": 3}, "steps=2, penalty=0.05", "steps=3, penalty=0.1"),
    ],
)
def test_a_file_of_another_run_is_refused_by_what_differs(change: dict[str, Any], old: str, new: str, tmp_path: Path) -> None:
    file = tmp_path / "gates.pt"
    trained_toy(last, steps=2, resume=file)
    kept = file.read_bytes()
    message = f"{file} belongs to a run with {old}, but this run has {new}: pass another file, or remove this one"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        trained_toy(last, resume=file, **({"steps": 2} | change))
    assert file.read_bytes() == kept


def test_a_file_is_written_when_time_has_passed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step on a CPU may take minutes, and a hundred of them hours."""
    monkeypatch.setattr(checkpoint, "SECONDS", 0.0)
    file = tmp_path / "gates.pt"
    with pytest.raises(Interrupted):
        trained_toy(interrupted(3), steps=8, resume=file)
    assert torch.load(file, weights_only=True)["step"] == 3
    monkeypatch.setattr(checkpoint, "SECONDS", 3600.0)
    with pytest.raises(Interrupted):
        trained_toy(interrupted(5), steps=8, resume=file)
    assert torch.load(file, weights_only=True)["step"] == 3


def test_a_file_of_another_model_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "gates.pt"
    trained_toy(last, steps=2, resume=file)
    others = {
        "model kv_heads=2, .*this run has model kv_heads=4": llama(num_key_value_heads=4),
        "model layers=2, .*this run has model layers=3": llama(num_hidden_layers=3),
        "dtype='float32', .*this run has dtype='bfloat16'": llama().bfloat16(),
    }
    train_gates(llama(), last, steps=2, resume=tmp_path / "llama.pt", **SETTINGS)
    for message, other in others.items():
        with pytest.raises(ValueError, match=f"belongs to a run with .*{message}.*: pass another file, or remove this one"):
            train_gates(other, last, steps=2, resume=tmp_path / "llama.pt", **SETTINGS)
    with pytest.raises(ValueError, match=r"belongs to a run with model type='toy'"):
        train_gates(llama(), last, steps=2, resume=file, **SETTINGS)


@pytest.mark.parametrize("content", [b"", b"hello", b'{"version": 1}', b"PK\x03\x04 half a file"])
def test_a_file_that_is_no_run_is_refused(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "gates.pt"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"gates.pt was not written by train_gates: pass another file, or remove this one"):
        trained_toy(last, steps=2, resume=file)
    assert file.read_bytes() == content


@pytest.mark.parametrize("other", [[1, 2], {"a": 1}, torch.zeros(2)])
def test_other_things_that_torch_saved_are_refused(other: Any, tmp_path: Path) -> None:
    file = tmp_path / "gates.pt"
    torch.save(other, file)
    with pytest.raises(ValueError, match=r"was not written by train_gates"):
        trained_toy(last, steps=2, resume=file)


def test_a_file_that_cannot_be_written_is_told_before_training(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"its folder does not exist: create the folder"):
        trained_toy(interrupted(0), steps=2, resume=tmp_path / "nowhere" / "gates.pt")


def test_a_half_written_file_is_never_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "STEPS", 2)
    file, save, written = tmp_path / "gates.pt", torch.save, list[Path]()

    def dies(content: Any, path: Path) -> None:
        if len(written) == 1:
            Path(path).write_bytes(b"half")
            raise OSError("no space left on device")
        written.append(path)
        save(content, path)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", dies)
        with pytest.raises(OSError, match="no space left"):
            trained_toy(last, steps=6, resume=file)
    assert torch.load(file, weights_only=True)["step"] == 2
    assert trained_toy(last, steps=6, resume=file) == trained_toy(last, steps=6)
    assert [path.name for path in tmp_path.iterdir()] == ["gates.pt"]


def test_a_file_of_other_weights_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "gates.pt"
    model = llama()
    train_gates(model, last, steps=2, resume=file, **SETTINGS)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1.5)
    with pytest.raises(
        ValueError, match=r"a run with weights='\w+' \(a hash of the weights\), but this run has weights='\w+' "
    ):
        train_gates(model, last, steps=2, resume=file, **SETTINGS)
