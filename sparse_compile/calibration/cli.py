"""``python -m sparse_compile calibrate``: read a model or a config and write a profile."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from sparse_compile.calibration.forward import positions_of, sizes_of
from sparse_compile.calibration.gate_training import train_gates
from sparse_compile.calibration.head_statistics import echo_profile
from sparse_compile.calibration.passkey_data import Passkeys
from sparse_compile.head_profile import Profile
from sparse_compile.masks.optional_packages import needed

LONGEST = 32000  # tokens of the longest text, as published


def run_calibrate(
    source: Path,
    out: Path,
    *,
    method: str,
    steps: int | None = None,
    longest: int | None = None,
    sink: int | None = None,
    recent: int | None = None,
    text: Path | None = None,
    resume: Path | None = None,
    seed: int = 42,
    device: str | None = None,
    dtype: str | None = None,
) -> Profile:
    """Calibrate the causal language model of ``source`` and write its profile to ``out``.

    ``source`` is a folder that ``save_pretrained`` wrote. It may also be a ``config.json``, or a folder with a ``config.json``
    and no weights; the weights are then random. ``device`` defaults to the GPU if there is one. ``dtype`` defaults to float32
    on the CPU, where half precision is several times slower, and to that of the checkpoint on a GPU. Passkeys are words hidden
    in ``text`` if the folder has a tokenizer, and random tokens otherwise. Raises ``ValueError`` or ``OSError`` for another
    ``source``, and ``ImportError`` without transformers.
    """
    if not out.absolute().parent.is_dir():
        raise ValueError(f"--out {out} is in a folder that does not exist: create the folder")
    if out.is_dir():
        raise ValueError(f"--out {out} is a folder: name a file in it")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda needs a GPU, but torch finds none: omit --device")
    given: dict[str, Any] = {"steps": steps, "longest": longest, "sink": sink, "recent": recent, "text": text, "resume": resume}
    given = {name: value for name, value in given.items() if value is not None}
    if method == "echo" and given:
        raise ValueError(f"--method echo reads random tokens and trains nothing: omit --{', --'.join(given)}")
    dtype = dtype or ("float32" if device == "cpu" else "auto")
    model, tokenizer = load(source, device, dtype)
    where = f"on {device} in {str(model.dtype).removeprefix('torch.')}"
    inner = "inductor" if device == "cuda" else "eager"
    if method == "echo":
        print(f"one pass over repeated random tokens, {where}", file=sys.stderr)
        profile = echo_profile(model, seed=seed, inner=inner)
    else:
        longest = longest or min(LONGEST, positions_of(sizes_of(model)) or LONGEST)
        print(f"texts of at most {longest:,} tokens, {where}", file=sys.stderr)
        data = passkeys(model, tokenizer, text, longest, seed)
        training: dict[str, Any] = {name: given[name] for name in ("steps", "sink", "recent", "resume") if name in given}
        profile = train_gates(model, data, inner=inner, **training)
    profile.save(out)
    print(f"{out}: scores of {len(profile.scores)} layers x {len(profile.scores[0])} KV heads by {method}", file=sys.stderr)
    return profile


def load(source: Path, device: str, dtype: str) -> tuple[Any, Any]:
    """Load the model in a ``dtype`` (``auto``: that of the checkpoint), and its tokenizer if it has one."""
    with needed("calibrate", "transformers"):
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    if not source.exists():
        raise ValueError(f"calibrate needs a model folder or a config.json, but there is none at {source}")
    folder: Any = source if source.is_dir() else source.parent
    has_weights = any(any(folder.glob(pattern)) for pattern in ("*.safetensors", "*.bin"))
    factory: Any = AutoModelForCausalLM
    if has_weights and source.is_dir():
        model = factory.from_pretrained(folder, dtype=dtype)
    else:
        beside = "; to use the weights beside it, name the folder" if has_weights else ""
        print(f"{source} has no weights, so the weights and the scores of the heads are random{beside}", file=sys.stderr)
        torch.manual_seed(0)
        config = AutoConfig.from_pretrained(source)
        model = factory.from_config(config, **({} if dtype == "auto" else {"dtype": getattr(torch, dtype)}))
    has_tokenizer = any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json"))
    names: Any = AutoTokenizer
    return model.eval().to(device), names.from_pretrained(folder) if has_tokenizer else None


def passkeys(model: Any, tokenizer: Any, text: Path | None, longest: int, seed: int) -> Passkeys:
    """Build passkey data whose longest texts have ``longest`` tokens."""
    sizes: dict[str, Any] = {"longest": longest, "shortest": min(longest, max(1000, longest // 32)), "seed": seed}
    if tokenizer is not None:
        from sparse_compile.demo import find_license

        content = (text or find_license()).read_text(encoding="utf-8", errors="replace")
        # Only the tokenized words show how many passkeys fit, so the first sizes are large enough for any.
        data = Passkeys.of_text(tokenizer, content, shortest=1 << 40, longest=1 << 40, seed=seed)
        return data.fit(sizes["shortest"], longest)
    if text is not None:
        raise ValueError(f"--text {text} needs a tokenizer, but the folder of the model has none: omit --text")
    vocabulary = int(model.config.get_text_config(decoder=True).vocab_size)
    return Passkeys.of_tokens(vocabulary, count=min(10, max(1, sizes["shortest"] // 100)), **sizes)
