"""What the host knows of a cache, so that nobody has to ask the device: how much it holds, and whether more fits."""

from __future__ import annotations

from dataclasses import dataclass, field

from sparse_compile.passes.ops.cache_update import SparseCacheError


@dataclass
class Books:
    """How many tokens (columns) and sequences a cache holds. The backend keeps it, before and after each run of a graph."""

    max_length: int
    max_batch: int
    layers: int
    columns: int = 0
    batch: int | None = None
    done: set[int] = field(default_factory=set)  # layers that have taken the tokens of the current forward pass

    def admit(self, batch: int, tokens: int, layers: tuple[int, ...], *, empty: bool) -> None:
        """Raise ``SparseCacheError`` if a graph that appends ``tokens`` to ``layers`` cannot run. Nothing is written then.

        ``empty`` is a graph that looks at the new tokens alone.
        """
        if empty and self.columns:
            raise SparseCacheError(
                f"the model was asked for attention to the new tokens alone, and the cache holds {self.columns}: pass an "
                "attention mask over all tokens, or reset the cache. It holds what it held before"
            )
        if self.columns + tokens > self.max_length:
            raise SparseCacheError(
                f"the cache has room for max_length={self.max_length} tokens, holds {self.columns}, and was given {tokens} "
                "more: build it with a larger max_length, or crop or reset it. It holds what it held before"
            )
        if self.batch not in (None, batch):
            raise SparseCacheError(
                f"the cache holds {self.batch} sequences and was given {batch}: reset it, or use batch_select_indices or "
                "batch_repeat_interleave. It holds what it held before"
            )
        if again := self.done.intersection(layers):
            raise SparseCacheError(
                f"layer {min(again)} was given new tokens twice in one forward pass, or the last pass never reached layer "
                f"{self.layers - 1}: reset the cache, and run whole models only"
            )

    def note(self, batch: int, tokens: int, layers: tuple[int, ...], *, last: bool) -> None:
        """A graph has run: the last layer of a forward pass completes it."""
        self.batch = batch
        self.done.update(layers)
        if last:
            missing = set(range(self.layers)) - self.done
            self.columns += tokens
            self.done.clear()
            if missing:
                raise SparseCacheError(
                    f"layer {min(missing)} took none of the tokens that the last layer took: the cache was built for another "
                    "model. Reset it"
                )

    def forget(self) -> None:
        """An empty cache."""
        self.columns, self.batch = 0, None
        self.done.clear()
