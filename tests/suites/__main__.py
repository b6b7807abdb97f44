"""Run the model and generation tests of transformers plain, compiled, and over a ``SparseCache``: ``make suites``.

The sdist of transformers on PyPI has the mixins of these tests (``tests/test_*.py``), but neither ``tests/models`` nor
``tests/generation``. So the tests come from git, in the version that is installed, into a folder outside of this repository.
What they import and we do not need is installed beside them. Only tests that pass with plain models count.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SOURCE = "https://github.com/huggingface/transformers"
NEEDED = ("parameterized", "pytest-timeout", "psutil", "httpx", "requests", "datasets", "accelerate", "pillow")
MODES = ("plain", "exact", "sparse")
SECONDS = 300  # for one test
# Integration tests read checkpoints from the network.
CHOSEN = "ModelTest and not Integration"


def fetched(folder: Path) -> Path:
    """A checkout of the installed version of transformers."""
    path = folder / "transformers"
    if not path.exists():
        run = ["git", "clone", "--quiet", "--depth", "1", "--branch", f"v{version('transformers')}", SOURCE, str(path)]
        subprocess.run(run, check=True)
    return path


def installed(folder: Path) -> Path:
    """A folder with what the tests import, which is not part of our environment."""
    path = folder / "site"
    if not path.exists():
        run = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(path)]
        missing = [name for name in NEEDED if not _has(name)]
        subprocess.run([*run, *missing, *_requirements(missing)], check=True)
    return path


def _has(name: str) -> bool:
    """Whether a package is installed."""
    return subprocess.run([sys.executable, "-m", "pip", "show", "--quiet", name], capture_output=True).returncode == 0


def _requirements(names: list[str]) -> list[str]:
    """What ``names`` need and is not installed. Without it, pip would replace the versions that we test with."""
    report = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--report", "-", *names]
    found = json.loads(subprocess.run(report, check=True, capture_output=True, text=True).stdout)["install"]
    wanted = [entry["metadata"]["name"] for entry in found]
    return [name for name in wanted if name.lower() not in names and not _has(name)]


def ran(tests: Path, site: Path, family: str, mode: str, chosen: str, folder: Path) -> Path:
    """Run the tests of a family in one mode, and return the file with their outcomes.

    Over a ``SparseCache``, only the tests run that generate, as the exact run has found.
    """
    outcomes = folder / f"{family}-{mode}.jsonl"
    outcomes.unlink(missing_ok=True)
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests", site)))
    environment = {
        **os.environ,
        "PYTHONPATH": paths,
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    run = [sys.executable, "-W", "ignore", "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", "-p", "no:logging"]
    run += ["-p", "suites.compile_in_place", "--compiled", mode, "--outcomes", str(outcomes), "--timeout", str(SECONDS)]
    run += ["--generating", str(folder / f"{family}-exact.jsonl")] if mode == "sparse" else []
    run += ["-k", chosen, f"tests/models/{family}/test_modeling_{family}.py"]
    with (folder / f"{family}-{mode}.log").open("w", encoding="utf-8") as log:
        subprocess.run(run, cwd=tests, env=environment, stdout=log, stderr=subprocess.STDOUT, check=False)
    return outcomes


def read(outcomes: Path) -> dict[str, list[dict[str, Any]]]:
    """The outcomes of each test, with those of its subtests."""
    tests = defaultdict(list)
    lines = outcomes.read_text("utf-8").splitlines() if outcomes.exists() else []
    for line in map(json.loads, lines):
        tests[line["test"].split(" ")[0]].append(line)
    return tests


def ended(lines: list[dict[str, Any]]) -> str:
    """How a test ended: it failed if any of its subtests did."""
    found = {line["outcome"] for line in lines}
    return next(outcome for outcome in ("failed", "passed", "skipped") if outcome in found)


def compared(family: str, mode: str, plain: dict[str, Any], compiled: dict[str, Any]) -> int:
    """Print how the tests that pass with plain models end in ``mode``, and return how many of them fail."""
    counted = {test: compiled[test] for test, lines in plain.items() if ended(lines) == "passed" and test in compiled}
    ends = {test: ended(lines) for test, lines in counted.items()}
    passed = [test for test, end in ends.items() if end == "passed"]
    failed = [test for test, end in ends.items() if end == "failed"]
    graphs = sum(any(line["graphs"] for line in counted[test]) for test in passed)
    equal, caches = (sum(max(line[name] for line in counted[test]) for test in passed) for name in ("equal", "caches"))
    print(
        f"{family}, {mode}: {len(ends)} tests that pass with plain models: {len(passed)} passed ({graphs} of them ran compiled "
        f"graphs), {len(failed)} failed, {len(ends) - len(passed) - len(failed)} cannot apply; {equal} generations with equal "
        f"tokens; {caches} runs of generate were lent a SparseCache",
        flush=True,
    )
    for test in failed:
        print(f"  {test}: {next(line['why'] for line in counted[test] if line['outcome'] == 'failed')[-300:]}", flush=True)
    return len(failed)


def main() -> int:
    """Run all families, and return 1 if a test fails compiled that passes plain."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="+")
    parser.add_argument("--tests", type=Path, help="a checkout of transformers; fetched with git by default")
    parser.add_argument("--site", type=Path, help="a folder with the packages that the tests import; filled by pip by default")
    parser.add_argument("--chosen", default=CHOSEN, help="an expression for pytest -k")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "sparse-compile-suites")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    tests, site = options.tests or fetched(options.folder), options.site or installed(options.folder)
    failures = 0
    for family in options.families:
        outcomes = {mode: read(ran(tests, site, family, mode, options.chosen, options.folder)) for mode in MODES}
        if not any(ended(lines) == "passed" for lines in outcomes["plain"].values()):
            print(f"{family}: no test passes with plain models; see {options.folder}/{family}-plain.log", flush=True)
            failures += 1
        for mode in MODES[1:]:
            failures += compared(family, mode, outcomes["plain"], outcomes[mode])
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
