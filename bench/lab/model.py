"""The small decoder: its config, and functions that build, save and load it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bench.lab.data.words import START, VOCABULARY

CHECKPOINT = Path(__file__).parent / "checkpoint"
HEAD_DIM = 32


def config(*, layers: int = 6, hidden: int = 256) -> LlamaConfig:
    """Return a config with two query heads per KV head and tied embeddings.

    The default sizes make 4.6 million parameters, which take 9.3 MB in float16.
    """
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden // HEAD_DIM,
        num_key_value_heads=hidden // HEAD_DIM // 2,
        head_dim=HEAD_DIM,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5},  # 1e4 leaves few channels slow enough for 2,048 tokens
        tie_word_embeddings=True,
        bos_token_id=START,
        eos_token_id=None,
    )


def build(seed: int, shape: LlamaConfig | None = None) -> LlamaForCausalLM:
    """Build a model with random weights. The state of torch's global generator does not change."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(shape or config())


def save(model: LlamaForCausalLM, folder: Path, log: dict[str, Any]) -> None:
    """Write ``model.safetensors`` in float16, ``config.json`` and ``log.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    half: Any = copy.deepcopy(model).half()
    half.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    write_log(folder, log)


def write_log(folder: Path, log: dict[str, Any]) -> None:
    """Write ``log.json``, which records the training of a checkpoint, into its folder."""
    (folder / "log.json").write_text(json.dumps(log, indent=1) + "\n", "utf-8")


def load(folder: Path = CHECKPOINT) -> LlamaForCausalLM:
    """Load the model of a folder in float32 for evaluation. Raises ``FileNotFoundError`` if there is none."""
    if not (folder / "model.safetensors").is_file():
        raise FileNotFoundError(f"no checkpoint in {folder}: train one with python -m bench.lab.train --out {folder}")
    factory: Any = LlamaForCausalLM
    model: LlamaForCausalLM = factory.from_pretrained(folder, dtype=torch.float32).eval()
    return model
