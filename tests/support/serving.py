"""Serve a tiny model inside vLLM, in a process of its own, and generate the same texts by transformers with a SparseCache."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import sparse_compile as sc
from sparse_compile.masks import Mask

ROOT = Path(__file__).parents[2]
ENGINE = ROOT / "tests" / "vllm_plugin" / "served" / "served_engine.py"
BLOCK, LENGTH, NEW = 32, 768, 24  # tokens of a block, of the longest text, and generated
PROMPTS = (300, 150, 37)  # the lengths of a ragged batch
CLOSE = 1e-4  # log probabilities in fp32, for two kernels that sum in different orders
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "INFO",
    "VLLM_NO_USAGE_STATS": "1",
}


@dataclass(frozen=True)
class Text:
    """What was generated for one prompt, the log probability of each token, and how much of the prompt was cached."""

    tokens: list[int]
    logprobs: list[float]
    cached: int = 0


@dataclass(frozen=True)
class Served:
    """The texts of every round, the KV cache groups (spec, fields, layers), and the blocks in use after each step."""

    rounds: list[list[Text]]
    groups: list[dict[str, Any]]
    blocks: list[int]
    read: dict[str, int]


@cache
def model_folder() -> Path:
    """Save a tiny Llama of 8 query heads, 4 KV heads and 2 layers whose heads differ clearly, with a tokenizer."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2, "head_dim": 32}
    heads: dict[str, Any] = {"num_attention_heads": 8, "num_key_value_heads": 4, "initializer_range": 0.15}
    folder = Path(mkdtemp(prefix="sparse_compile_vllm_"))
    LlamaForCausalLM(LlamaConfig(**sizes, **heads, vocab_size=256, max_position_embeddings=1024)).save_pretrained(folder)
    words = models.WordLevel({f"w{number}": number for number in range(256)}, unk_token="w0")
    tokenizer: Any = PreTrainedTokenizerFast
    tokenizer(tokenizer_object=Tokenizer(words), unk_token="w0").save_pretrained(folder)
    return folder


def prompts(lengths: Sequence[int] = PROMPTS) -> list[list[int]]:
    """Random prompts of these lengths, the same every time."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 255, (length,), generator=generator).tolist() for length in lengths]


def reference(policy: sc.Policy | Mask | None, texts: list[list[int]]) -> list[Text]:
    """Generate by transformers, with the dense reference and a cache whose pages are as large as vLLM's blocks."""
    model = LlamaForCausalLM.from_pretrained(model_folder()).eval()
    sc.compile(model, policy, inner="eager")
    found = []
    for ids in texts:
        kept = sc.SparseCache(model.config, policy, max_length=LENGTH, page_size=BLOCK)
        settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "output_logits": True}
        out = model.generate(
            torch.tensor([ids]), past_key_values=kept, max_new_tokens=NEW, return_dict_in_generate=True, **settings
        )
        new = out.sequences[0, len(ids) :].tolist()
        found.append(Text(new, [float(row[0].log_softmax(-1)[token]) for row, token in zip(out.logits, new, strict=True)]))
    return found


def run_engine(job: dict[str, Any], folder: Path, *, inside: bool = True) -> subprocess.CompletedProcess[str]:
    """Run ``served_engine.py`` with a job. Without ``inside``, the engine core is a process of its own, as in a server."""
    given = folder / "job.json"
    given.write_text(json.dumps(job))
    environment = {**os.environ, **ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING": str(int(not inside))}
    command = [sys.executable, "-W", "ignore", str(ENGINE), str(given), str(folder / "served.json")]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)


def serve(
    policy: sc.Policy | Mask | None,
    texts: list[list[int]],
    folder: Path,
    *,
    rounds: int = 1,
    options: dict[str, Any] | None = None,
    settings: dict[str, Any] | None = None,
) -> Served:
    """Generate inside vLLM, the same prompts in every round. ``options`` are those of ``vllm.LLM``."""
    ranks = (options or {}).get("tensor_parallel_size", 1)
    done = run_engine(job(policy, texts, rounds, options, settings), folder, inside=ranks == 1)
    assert done.returncode == 0, done.stderr[-4000:]
    content = json.loads((folder / "served.json").read_text())
    return Served(
        [[Text(**text) for text in one] for one in content["rounds"]], content["groups"], content["blocks"], content["read"]
    )


def job(
    policy: sc.Policy | Mask | None,
    texts: list[list[int]],
    rounds: int = 1,
    options: dict[str, Any] | None = None,
    settings: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """What ``served_engine.py`` reads."""
    chosen = None if policy is None else {"policy": json.loads(sc.Policy(policy).to_json()), **(settings or {})}
    same = {
        "model": str(model_folder()),
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": LENGTH,
        "max_num_batched_tokens": LENGTH,
        "max_num_seqs": 4,
        "block_size": BLOCK,
        "num_gpu_blocks_override": 200,
        "skip_tokenizer_init": True,
        "additional_config": {} if chosen is None else {"sparse_compile": chosen},
    }
    return {"options": {**same, **(options or {})}, "prompts": texts, "rounds": rounds, "new": NEW}


def assert_equal(found: list[Text], expected: list[Text]) -> None:
    """All tokens are equal, and their log probabilities close."""
    assert [text.tokens for text in found] == [text.tokens for text in expected]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(torch.tensor(one.logprobs), torch.tensor(other.logprobs), atol=CLOSE, rtol=0)
