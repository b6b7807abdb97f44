"""A case of the fuzzer as data: a model, a policy, a cache and a sequence of calls. Its ``repr`` is code that builds it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Model:
    """A tiny random model. ``window`` is its sliding window: of all layers in Mistral, and of every other one in Gemma."""

    kind: str = "llama"
    heads: int = 4
    kv_heads: int = 2
    layers: int = 2
    window: int | None = None


@dataclass(frozen=True)
class Cache:
    """Where keys are kept: ``none``, ``dynamic``, ``static``, ``sparse``, or ``lent``, which is what ``generate`` makes.

    Everything but the kind and ``max_length`` belongs to a ``SparseCache``. With ``alone``, the model is compiled without a
    policy, and only the cache has it.
    """

    kind: str = "none"
    max_length: int = 128
    max_batch: int = 3
    page_size: int = 4
    rollback: int = 0
    mode: str = "strict"
    cache_positions: bool = False
    kv: str | None = None
    alone: bool = False


@dataclass(frozen=True)
class Prompt:
    """A new text for every row, of ``length`` columns. Row ``i`` starts with ``pads[i]`` columns of padding."""

    length: int
    pads: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class Chunk:
    """``length`` more tokens for every row, in one call."""

    length: int


@dataclass(frozen=True)
class Steps:
    """``count`` decode steps of one token."""

    count: int


@dataclass(frozen=True)
class Generate:
    """The tokens that ``generate`` adds to what the rows hold. ``implementation`` is ``cache_implementation``."""

    count: int
    implementation: str | None = None


@dataclass(frozen=True)
class Reset:
    """The cache is emptied. A prompt follows."""


@dataclass(frozen=True)
class Select:
    """Only these rows go on, in this order."""

    rows: tuple[int, ...]


@dataclass(frozen=True)
class Crop:
    """The last ``count`` tokens are taken back, or all but one of the shortest row."""

    count: int


@dataclass(frozen=True)
class Trip:
    """A chunk of ``length`` tokens during which a layer raises an error, after earlier layers have written their keys."""

    length: int
    layer: int = 1


@dataclass(frozen=True)
class Reload:
    """The cache is saved, and loaded into one for ``max_length`` tokens."""

    max_length: int


Call = Prompt | Chunk | Steps | Generate | Reset | Select | Crop | Trip | Reload


@dataclass(frozen=True)
class Case:
    """One use of the library.

    ``policy`` is an expression in the language of ``sparse_compile.masks``, with ``Policy`` and the recipes of
    ``sparse_compile.policies``. The library and the oracle each evaluate it with names of their own. With ``spelled``, every
    call gets an attention mask and position ids even where nothing is padding. ``entry`` is ``compile``, or ``backend`` for
    ``torch.compile`` with a ``Backend``.
    """

    policy: str
    calls: tuple[Call, ...]
    model: Model = Model()
    cache: Cache = Cache()
    spelled: bool = False
    entry: str = "compile"
    dynamic: bool | None = None
    seed: int = 0

    @property
    def is_padded(self) -> bool:
        """Whether any row has padding."""
        return any(isinstance(call, Prompt) and any(call.pads) for call in self.calls)

    @property
    def selects(self) -> bool:
        """Whether the policy selects pages."""
        return "page_topk" in self.policy or "quest" in self.policy

    def script(self) -> str:
        """A program that plays the case: ``PYTHONPATH=.:tests python case.py`` from the root of the repository."""
        return f"from fuzz.case import *\nfrom fuzz.play import play\n\nprint(play({self!r}))\n"
