"""`vllm serve` follows the policy of a file for concurrent streams of the OpenAI client. Wrong settings are errors at start."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import sparse_compile as sc
from sparse_compile.masks import causal, per_head, sink, sliding_window
from support.serving import BLOCK, ENVIRONMENT, LENGTH, NEW, job, model_folder, prompts, reference, run_engine

pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")

STREAMING = causal & (sink(4) | sliding_window(64))
DUO = sc.Policy(per_head([causal, STREAMING, STREAMING, causal]))
UNEVEN = sc.Policy(per_head([causal, causal, STREAMING, STREAMING]))
COMMAND = Path(__file__).parent / "vllm_command.py"
STARTS_WITHIN = 300  # seconds


@contextmanager
def server(additional: dict[str, Any], folder: Path) -> Iterator[str]:
    """Run `vllm serve` on a free port of this machine. Yields its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = {
        "--host": "127.0.0.1",
        "--port": port,
        "--served-model-name": "tiny",
        "--dtype": "float32",
        "--max-model-len": LENGTH,
        "--block-size": BLOCK,
        "--max-num-seqs": 4,
        "--num-gpu-blocks-override": 200,
        "--additional-config": json.dumps(additional),
    }
    flags = [str(part) for option in options.items() for part in option]
    command = [sys.executable, str(COMMAND), "serve", str(model_folder()), "--enforce-eager", *flags]
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen(command, env={**os.environ, **ENVIRONMENT}, stdout=log, stderr=subprocess.STDOUT)
    try:
        _wait(f"http://127.0.0.1:{port}/health", process, folder / "server.log")
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(60)


def _wait(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + STARTS_WITHIN
    while time.monotonic() < end and process.poll() is None:
        try:
            with urllib.request.urlopen(address):
                return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(1)
    pytest.fail(f"the server did not start: {log.read_text()[-4000:]}")


async def stream(client: Any, ids: list[int]) -> list[int]:
    """The tokens of one stream, as they arrive."""
    extra = {"return_token_ids": True, "ignore_eos": True}
    chunks = await client.completions.create(
        model="tiny", prompt=ids, max_tokens=NEW, temperature=0, stream=True, extra_body=extra
    )
    return [token async for chunk in chunks for choice in chunk.choices for token in choice.token_ids or []]


def test_concurrent_streams_get_the_tokens_of_transformers(tmp_path: Path) -> None:
    openai = pytest.importorskip("openai", reason="comes with vLLM")
    DUO.save(tmp_path / "duo.json")
    texts = [*prompts(), *prompts()]

    async def all_streams(address: str) -> list[list[int]]:
        async with openai.AsyncOpenAI(base_url=address, api_key="none") as client:
            return await asyncio.gather(*(stream(client, ids) for ids in texts))

    with server({"sparse_compile": {"policy": str(tmp_path / "duo.json")}}, tmp_path) as address:
        found = asyncio.run(all_streams(address))
    assert found == [text.tokens for text in reference(DUO, prompts())] * 2


@pytest.mark.parametrize(
    ("policy", "options", "message"),
    [
        (UNEVEN, {"tensor_parallel_size": 2}, "tensor parallelism needs equally many heads of a kind on every rank"),
        (DUO, {"kv_cache_dtype": "fp8"}, "reads plain keys and values, got --kv-cache-dtype fp8: use auto"),
        (DUO, {"disable_hybrid_kv_cache_manager": True}, "needs the hybrid KV cache manager, but it is disabled"),
        (None, {"additional_config": {"sparse_compile": {"policy": "no_such"}}}, "there is no such name and no such file"),
    ],
    ids=["uneven ranks", "quantized cache", "no hybrid manager", "no such policy"],
)
def test_wrong_settings_are_errors_at_start(
    policy: sc.Policy | None, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    done = run_engine(job(policy, prompts([3]), options=options), tmp_path, inside="tensor_parallel_size" not in options)
    assert done.returncode != 0
    assert message in done.stdout + done.stderr
