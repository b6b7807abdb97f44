"""The small decoder: its config, and how it comes from and goes to a folder."""

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
    """Two query heads to a KV head, tied embeddings; as it stands 4.6 million parameters, 9.3 MB in float16."""
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
    """A model with random weights; torch's own generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(shape or config())


def save(model: LlamaForCausalLM, folder: Path, log: dict[str, Any]) -> None:
    """``model.safetensors`` in float16, ``config.json`` and ``log.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    half: Any = copy.deepcopy(model).half()
    half.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    write_log(folder, log)


def write_log(folder: Path, log: dict[str, Any]) -> None:
    """What is known of a checkpoint, beside it."""
    (folder / "log.json").write_text(json.dumps(log, indent=1) + "\n", "utf-8")


def load(folder: Path = CHECKPOINT) -> LlamaForCausalLM:
    """The model of a folder, in float32, for evaluation."""
    if not (folder / "model.safetensors").is_file():
        raise FileNotFoundError(f"no checkpoint in {folder}: python -m bench.lab.train --out {folder}")
    factory: Any = LlamaForCausalLM
    model: LlamaForCausalLM = factory.from_pretrained(folder, dtype=torch.float32).eval()
    return model
