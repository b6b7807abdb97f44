"""The command line: ``python -m sparse_compile demo``, ``explain CONFIG`` and ``calibrate MODEL``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status."""
    chosen = _parser().parse_args(arguments)
    try:
        if chosen.command == "demo":
            from sparse_compile.demo import run_demo

            run_demo(chosen.text, chosen.tokens, chosen.picture)
        elif chosen.command == "calibrate":
            from sparse_compile.calibration.cli import run_calibrate

            options = {key: value for key, value in vars(chosen).items() if key not in ("command", "model", "out")}
            run_calibrate(chosen.model, chosen.out, **options)
        else:
            from sparse_compile.explain_config import explain_config
            from sparse_compile.policy_argument import read_policy

            policy = read_policy(chosen.policy) if chosen.policy else None
            report = explain_config(chosen.config, policy, chosen.batch, chosen.tokens, chosen.device)
            print(report.to_json() if chosen.json else report)
    except (ImportError, OSError, ValueError) as problem:
        print("error:", *str(problem).splitlines(), file=sys.stderr)  # one line, even if the message has several
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m sparse_compile", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="run a small Llama on real text, exact and then sparse, and print the report")
    demo.add_argument("--text", type=Path, help="file to read as bytes (default: the license of this library)")
    demo.add_argument("--tokens", type=int, default=4096, help="number of bytes to read (default: 4096)")
    demo.add_argument(
        "--picture", type=Path, default=Path("demo-mask.png"), help="file for the picture (default: demo-mask.png)"
    )
    plan = commands.add_parser("explain", help="report what the backend does to a causal language model, from its config")
    plan.add_argument("config", type=Path, help="a transformers config.json, or the directory that holds one")
    plan.add_argument(
        "--policy", help="a file of a policy, a mask or a profile, or a name: dense, streaming_llm, quest, lserve, block_topk"
    )
    plan.add_argument("--tokens", type=int, default=1024, help="length of the prompt (default: 1024)")
    plan.add_argument("--batch", type=int, default=1, help="batch size (default: 1)")
    plan.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="device to plan kernels for (default: cpu)")
    plan.add_argument("--json", action="store_true", help="print the report as JSON")
    found = commands.add_parser("calibrate", help="find the KV heads that need full attention and write a profile")
    found.add_argument("model", type=Path, help="a folder that save_pretrained wrote, or a config.json (random weights)")
    found.add_argument(
        "--method",
        choices=("gates", "echo"),
        default="gates",
        help="gates: train a gate per KV head; echo: one pass over random tokens",
    )
    found.add_argument("--out", type=Path, default=Path("profile.json"), help="file for the profile (default: profile.json)")
    found.add_argument("--steps", type=int, help="training steps (default: 2000)")
    found.add_argument(
        "--longest", type=int, help="tokens of the longest text (default: the model's positions, at most 32,000)"
    )
    found.add_argument("--sink", type=int, help="number of first tokens that streaming heads see (default: 128)")
    found.add_argument("--recent", type=int, help="number of last tokens that streaming heads see (default: 256)")
    found.add_argument("--text", type=Path, help="text that hides passkeys, if there is a tokenizer (default: our license)")
    found.add_argument("--resume", type=Path, help="checkpoint to continue from if it exists, written every minute")
    found.add_argument("--seed", type=int, default=42, help="random seed (default: 42)")
    found.add_argument("--device", choices=("cpu", "cuda"), help="device to run on (default: the GPU if there is one)")
    found.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="dtype of the model (default: float32 on the CPU, where half precision is slow; the checkpoint's on a GPU)",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
