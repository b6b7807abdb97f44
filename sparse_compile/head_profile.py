"""Profile: a score for each KV head that says how much it needs full attention, and the policies built from scores."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from sparse_compile.masks import Mask, causal, per_head, sliding_window
from sparse_compile.masks import sink as first_tokens
from sparse_compile.masks.json_format import read_json
from sparse_compile.masks.optional_packages import needed
from sparse_compile.policy import Policy

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)
VERSION = 1
Table = str | Path | Tensor | Sequence[Sequence[float]]


@dataclass(frozen=True)
class FullHeads:
    """The KV heads that see everything, ``[layers][heads]``. ``tied`` heads have equal scores at the last ``places`` places."""

    full: tuple[tuple[bool, ...], ...]
    tied: int = 0
    places: int = 0


@dataclass(frozen=True)
class Profile:
    """A score for each KV head of each layer. The higher the score, the more the head needs to see everything.

    ``scores`` is ``[layers][KV heads]``. ``method`` names how they were found (``gates``, ``echo``, ...). ``model`` identifies
    the model (``signature``). ``numbers`` holds what the method records. A profile is stored as a small JSON file.

        >>> profile = Profile([[0.9, 0.1], [0.2, 0.8]], method="gates")
        >>> profile.policy(retrieval=0.5, sink=2, recent=4).layers[0][1]
        per_head([causal, causal & (sink(2) | sliding_window(4))])
        >>> Profile.from_json(profile.to_json()) == profile
        True

    Raises ``ValueError`` for scores that are not a table of finite numbers.
    """

    scores: Sequence[Sequence[float]]  # stored as tuples
    method: str = "given"
    model: Mapping[str, Any] = field(default_factory=dict)
    numbers: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rows = tuple(tuple(float(score) for score in row) for row in self.scores)
        if not rows or not rows[0] or len({len(row) for row in rows}) != 1:
            raise ValueError("scores need to be a table with a row for each layer and a column for each KV head")
        if not all(math.isfinite(score) for row in rows for score in row):
            raise ValueError("scores need to be finite numbers, got a NaN or an infinity")
        object.__setattr__(self, "scores", rows)

    @staticmethod
    def read(source: Table) -> Profile:
        """Read a saved profile (``.json``), a published DuoAttention folder or tsv file, a tensor, or lists.

        Raises ``FileNotFoundError`` for missing files, and ``ValueError`` for files without scores.
        """
        if isinstance(source, str | Path) and Path(source).suffix == ".json":
            return Profile.load(source)
        scores, sizes = read_table(source)
        return Profile(scores, method="gates" if isinstance(source, str | Path) else "given", numbers=sizes)

    def heads(self, retrieval: float, *, minimum: int = 0) -> FullHeads:
        """Choose the share ``retrieval`` of all KV heads with the highest scores, and at least ``minimum`` of each layer.

        The number of heads is rounded. Among equal scores the lower layer and head wins. The result counts ties for the last
        places, and they are logged. Raises ``ValueError`` for a share outside [0, 1], and for a minimum that the share does not
        allow.
        """
        layers, width = len(self.scores), len(self.scores[0])
        if not 0 <= retrieval <= 1:
            raise ValueError(f"retrieval is a share of all heads, from 0 to 1, got {retrieval}")
        count = math.floor(retrieval * layers * width + 0.5)
        if not 0 <= minimum * layers <= count or minimum > width:
            raise ValueError(
                f"minimum={minimum} takes {minimum * layers} heads, but retrieval={retrieval} of {layers} x {width} heads is "
                f"{count}: pass a smaller minimum or a larger share"
            )
        ranked = sorted((-score, layer, head) for layer, row in enumerate(self.scores) for head, score in enumerate(row))
        first = [[place for place in ranked if place[1] == layer][:minimum] for layer in range(layers)]
        kept = {place for row in first for place in row}
        rest = [place for place in ranked if place not in kept]
        more = count - len(kept)
        chosen = {(layer, head) for _, layer, head in (*kept, *rest[:more])}
        full = tuple(tuple((layer, head) in chosen for head in range(width)) for layer in range(layers))
        return with_ties(full, rest, more, "score", f"retrieval {retrieval:g}")

    def policy(self, retrieval: float = 0.5, *, sink: int = 64, recent: int = 256, minimum: int = 0) -> Policy:
        """Build a policy: the heads that ``heads`` chooses see everything, all others a sink and the last ``recent`` tokens."""
        streaming = causal & (first_tokens(sink) | sliding_window(recent))
        return Policy(layers=masks_by_layer(self.heads(retrieval, minimum=minimum).full, streaming))

    def check(self, config: Any) -> None:
        """Raise ``ValueError`` if the profile belongs to another model than the one that a transformers config describes."""
        found = signature(config)
        wrong = [key for key, value in self.model.items() if key in found and found[key] != value]
        size = (len(self.scores), len(self.scores[0]))
        if wrong or size != (found["layers"], found["kv_heads"]):
            raise ValueError(f"this profile is of {dict(self.model) or size}, but the model is {found}: calibrate this model")

    def to_json(self) -> str:
        """The profile as JSON text."""
        content = {"model": dict(self.model), "method": self.method, "numbers": dict(self.numbers), "scores": self.scores}
        return json.dumps({"version": VERSION, "profile": content}, indent=1)

    @staticmethod
    def from_json(text: str) -> Profile:
        """Read the text of ``to_json``. Raises ``ValueError`` for broken text or another version."""
        content = read_json(text, "profile", VERSION, "calibrate again", holds=dict)
        known = {key: content[key] for key in ("scores", "method", "model", "numbers") if key in content}
        try:
            return Profile(**known)
        except TypeError as wrong:
            raise ValueError(f"a profile needs scores as a table: {wrong}") from wrong

    def save(self, path: str | Path) -> None:
        """Write the profile to a JSON file."""
        Path(path).write_text(self.to_json() + "\n", encoding="utf-8")

    @staticmethod
    def load(path: str | Path) -> Profile:
        """Read a profile from a JSON file."""
        return Profile.from_json(Path(path).read_text(encoding="utf-8"))

    def plot(self) -> Figure:
        """Plot layers by heads as a matplotlib figure; brighter heads need more. Requires the extra ``plot``."""
        with needed("plot", "matplotlib"):
            from matplotlib import pyplot
        figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
        picture = axes.imshow(list(zip(*self.scores, strict=True)), aspect="auto", origin="lower", interpolation="nearest")
        axes.set(xlabel="layer", ylabel="KV head", title=f"{self.method}: what each head needs")
        axes.locator_params(integer=True)  # there is no layer 0.5
        figure.colorbar(picture)
        return figure


def with_ties(
    full: tuple[tuple[bool, ...], ...], ranked: list[tuple[float, int, int]], count: int, of: str, at: str
) -> FullHeads:
    """Return ``full`` with its ties for the last places, and log them.

    ``ranked`` lists (negative number, layer, head) in order, and the first ``count`` of them got a place. In the log, ``of``
    names the numbers, and ``at`` names the share of heads that was requested.
    """
    if not 0 < count < len(ranked) or ranked[count - 1][0] != ranked[count][0]:
        return FullHeads(full)
    edge = ranked[count][0]
    tied, places = (sum(number == edge for number, *_ in some) for some in (ranked, ranked[:count]))
    log.warning("%d heads tie at %s %g for %d places at %s: lower layers and heads won", tied, of, -edge, places, at)
    return FullHeads(full, tied, places)


def signature(config: Any) -> dict[str, Any]:
    """The facts of a transformers config that a profile depends on: model type, layers, heads and KV heads."""
    config = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    missing = [name for name in ("num_attention_heads", "num_hidden_layers") if not hasattr(config, name)]
    if missing:
        raise ValueError(
            f"{type(config).__name__} has no {missing[0]}: profiles need a model with attention in numbered layers"
        )
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or getattr(config, "num_kv_heads", None) or heads
    if getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False):
        kv_heads = 1  # Falcon and GPTBigCode configure it this way
    return {"type": config.model_type, "layers": config.num_hidden_layers, "heads": heads, "kv_heads": kv_heads}


def masks_by_layer(
    full: tuple[tuple[bool, ...], ...], streaming: Mask, *, seeing: Mask = causal
) -> dict[int | range | str, Mask]:
    """A mask for each layer: ``seeing`` for the heads that see everything, ``streaming`` for the others."""
    return {
        layer: seeing if all(row) else per_head([seeing if sees_all else streaming for sees_all in row])
        for layer, row in enumerate(full)
    }


def read_table(source: Table) -> tuple[Sequence[Sequence[float]], dict[str, int]]:
    """Read gates from a published folder, a tsv file, a tensor or lists, and the sizes that a folder suggests."""
    if isinstance(source, Tensor):
        if source.dim() != 2:
            raise ValueError(f"gates need shape [layers, KV heads], got {list(source.shape)}")
        return source.double().tolist(), {}
    if not isinstance(source, str | Path):
        return source, {}
    path, sizes = Path(source), {}
    config = (path if path.is_dir() else path.parent) / "config.json"
    if config.is_file():
        content = json.loads(config.read_text("utf-8"))
        sizes = {name: content[f"{name}_size"] for name in ("sink", "recent") if f"{name}_size" in content}
    path = path / "full_attention_heads.tsv" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"there is no pattern {path}: pass a folder with full_attention_heads.tsv, or a tsv file")
    try:
        return [[float(cell) for cell in line.split()] for line in path.read_text("utf-8").splitlines() if line.strip()], sizes
    except ValueError as wrong:
        raise ValueError(f"{path} needs one layer of gates per line, but one gate is not a number: {wrong}") from wrong
