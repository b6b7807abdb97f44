"""Haystacks that hide the needles: noise of a Markov chain, and text files of this machine."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from bench.lab.data.words import NOISE

ROOT = Path(__file__).parents[3]
OFFSETS = (0, 1, 5, 17)  # one for each successor of a symbol
CHAINS, STEPS = 2048, 1024  # the noise is CHAINS chains of STEPS tokens, one after the other


class Haystack(Protocol):
    """A source of tokens without any needle."""

    def __call__(self, batch: int, length: int, rng: torch.Generator) -> Tensor:
        """Return tokens ``[batch, length]`` on the generator's device."""
        ...


@dataclass(frozen=True, eq=False)
class Text:
    """Bytes of files as ids, with the hash of all of them."""

    pool: Tensor  # [bytes], long
    sha256: str

    def __call__(self, batch: int, length: int, rng: torch.Generator) -> Tensor:
        return slices(self.pool, batch, length, rng)

    def to(self, device: torch.device | str) -> Text:
        """Return the same text on another device, which must be that of the generators."""
        return Text(self.pool.to(device), self.sha256)


def noise(batch: int, length: int, rng: torch.Generator) -> Tensor:
    """Return slices of an order-1 Markov chain in which each of 256 symbols has four fixed successors."""
    return slices(_noise_pool(rng.device), batch, length, rng)


def library_text(limit: int = 8_000_000) -> Text:
    """Return sources of Python's standard library for training: files in a fixed random order, up to ``limit`` bytes."""
    folder = Path(sysconfig.get_path("stdlib"))
    files = [path for path in sorted(folder.rglob("*.py")) if not {"site-packages", "test", "tests"} & set(path.parts)]
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(0)).tolist()
    return _read((files[at] for at in order), limit)


def repository_text() -> Text:
    """Return this repository's ``masks/`` and ``passes/`` for evaluation. No training reads them."""
    files = [path for room in ("masks", "passes") for path in sorted((ROOT / room).rglob("*.py"))]
    return _read(files, 1 << 30)


def slices(pool: Tensor, batch: int, length: int, rng: torch.Generator) -> Tensor:
    """Return ``[batch, length]``: stretches from random places of ``pool``. Raises ``ValueError`` if the pool is shorter."""
    if length > len(pool):
        raise ValueError(f"a slice needs length <= {len(pool)}, the tokens of the text, got {length}")
    begin = torch.randint(len(pool) - length + 1, (batch, 1), generator=rng, device=rng.device)
    return pool[begin + torch.arange(length, device=rng.device)]


@cache
def _noise_pool(device: torch.device) -> Tensor:
    rng = torch.Generator().manual_seed(0)
    # With two permutations every symbol has equally many predecessors, so none is rare.
    order, name = (torch.randperm(len(NOISE), generator=rng) for _ in range(2))
    following = name[(order[:, None] + torch.tensor(OFFSETS)) % len(NOISE)]  # [symbols, successors]
    choices = torch.randint(len(OFFSETS), (STEPS, CHAINS), generator=rng)
    state = torch.randint(len(NOISE), (CHAINS,), generator=rng)
    seen = []
    for choice in choices:
        state = following[state, choice]
        seen.append(state)
    return (torch.stack(seen, dim=1).flatten() + NOISE.start).to(device)


def _read(files: Iterable[Path], limit: int) -> Text:
    content = bytearray()
    for path in files:
        content += path.read_bytes()
        if len(content) >= limit:
            break
    content = content[:limit]
    return Text(torch.frombuffer(content, dtype=torch.uint8).long(), hashlib.sha256(content).hexdigest())
