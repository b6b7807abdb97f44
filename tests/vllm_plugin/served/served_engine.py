"""Run a job of ``support.serving`` inside vLLM: ``python served_engine.py job.json served.json``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main(given: Path, result: Path) -> None:
    """Generate the texts of a job in rounds, and write them with the cache groups and the blocks in use after each step."""
    from vllm import LLM, SamplingParams

    job = json.loads(given.read_text())
    llm = LLM(**job["options"])
    core = getattr(llm.llm_engine.engine_core, "engine_core", None)  # None if it is a process of its own
    blocks, groups = ([], []) if core is None else (watch(core), groups_of(core))
    greedy = SamplingParams(max_tokens=job["new"], temperature=0, ignore_eos=True, detokenize=False, logprobs=0)
    rounds = []
    for _ in range(job["rounds"]):
        inputs = [{"prompt_token_ids": ids} for ids in job["prompts"]]
        rounds.append([text_of(out) for out in llm.generate(inputs, greedy, use_tqdm=False)])
    result.write_text(json.dumps({"rounds": rounds, "groups": groups, "blocks": blocks, "read": pages_of(core)}))


def text_of(output: Any) -> dict[str, Any]:
    """The fields of a ``Text``."""
    tokens = list(output.outputs[0].token_ids)
    logprobs = [row[token].logprob for row, token in zip(output.outputs[0].logprobs, tokens, strict=True)]
    return {"tokens": tokens, "logprobs": logprobs, "cached": output.num_cached_tokens or 0}


def groups_of(core: Any) -> list[dict[str, Any]]:
    """The KV cache groups of an engine."""
    return [
        {
            "spec": type(group.kv_cache_spec).__name__,
            "window": getattr(group.kv_cache_spec, "sliding_window", None),
            "sink": getattr(group.kv_cache_spec, "sink", 0),
            "layers": group.layer_names,
        }
        for group in core.scheduler.kv_cache_manager.kv_cache_config.kv_cache_groups
    ]


def pages_of(core: Any) -> dict[str, int]:
    """How many pages decode steps have read in all layers that select some, and how many there were."""
    context = {} if core is None else core.vllm_config.compilation_config.static_forward_context
    pages = [layer.pages for layer in context.values() if hasattr(layer, "selector")]
    return {"read": sum(one.read for one in pages), "held": sum(one.held for one in pages)}


def watch(core: Any) -> list[int]:
    """Return a list that grows by the number of blocks in use after each step."""
    pool = core.scheduler.kv_cache_manager.block_pool
    free, blocks, step = pool.get_num_free_blocks(), [], core.scheduler.schedule

    def scheduled(*args: Any, **kwargs: Any) -> Any:
        output = step(*args, **kwargs)
        blocks.append(free - pool.get_num_free_blocks())
        return output

    core.scheduler.schedule = scheduled
    return blocks


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
