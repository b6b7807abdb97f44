"""The command line: ``python -m sparse_compile demo`` and ``python -m sparse_compile explain CONFIG``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from sparse_compile.policy import Policy


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m sparse_compile", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="a small Llama on real text: exact, then sparse, with the report")
    demo.add_argument("--text", type=Path, help="the file to read as bytes (default: the license of this library)")
    demo.add_argument("--tokens", type=int, default=4096, help="how many bytes of it (default: 4096)")
    demo.add_argument("--picture", type=Path, default=Path("demo-mask.png"), help="where the picture goes")
    plan = commands.add_parser("explain", help="what the backend does to a causal language model, by its config")
    plan.add_argument("config", type=Path, help="a transformers config.json, or the directory that holds one")
    plan.add_argument("--policy", type=Path, help="a policy saved by Policy.save")
    plan.add_argument("--tokens", type=int, default=1024, help="length of the prompt (default: 1024)")
    plan.add_argument("--batch", type=int, default=1)
    plan.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="whose kernels to plan for (default: cpu)")
    plan.add_argument("--json", action="store_true", help="print the report as JSON")
    chosen = parser.parse_args(arguments)
    try:
        if chosen.command == "demo":
            from sparse_compile.demo import run_demo

            run_demo(chosen.text, chosen.tokens, chosen.picture)
        else:
            from sparse_compile.plan import explain_config

            policy = Policy.load(chosen.policy) if chosen.policy else None
            report = explain_config(chosen.config, policy, chosen.batch, chosen.tokens, chosen.device)
            print(report.to_json() if chosen.json else report)
    except (ImportError, OSError, ValueError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
