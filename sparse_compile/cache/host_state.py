"""Host state of a cache: how many tokens it holds and whether more fit. Checks on it need no device synchronization."""

from __future__ import annotations

from dataclasses import dataclass, field

from sparse_compile.passes.ops.cache.cache_update import SparseCacheError


@dataclass
class HostState:
    """The number of tokens (columns) and sequences in a cache. The backend checks and updates it around each graph run.

    ``overwrites`` says that new tokens may replace what a repeated run would need, as in a ring or a summary of keys. A run
    that fails then leaves a broken cache. Otherwise the next run writes the same places again.
    """

    max_length: int
    max_batch: int
    layers: int
    overwrites: bool = True
    columns: int = 0
    batch: int | None = None
    done: set[int] = field(default_factory=set)  # layers that already have the tokens of this forward pass
    failed: str = ""  # the error that ended a run over the cache, which may have written some layers and not others

    def check_whole(self) -> None:
        """Raise ``SparseCacheError`` if layers may hold different tokens."""
        if self.failed:
            raise SparseCacheError(
                f"a run over the cache failed ({self.failed}), so some of its layers may hold tokens that others lack: reset "
                "the cache"
            )

    def fail(self, error: BaseException) -> None:
        """Record that a graph has failed while it ran."""
        if self.overwrites:
            self.failed = type(error).__name__
        self.done.clear()

    def admit(self, batch: int, tokens: int, layers: tuple[int, ...], *, empty: bool) -> None:
        """Raise ``SparseCacheError`` if a graph that appends ``tokens`` to ``layers`` cannot run. The cache is then unchanged.

        ``empty`` marks a graph whose attention reads the new tokens only.
        """
        self.check_whole()
        if empty and self.columns:
            raise SparseCacheError(
                f"the model attends to its new tokens only, but the cache already holds {self.columns} tokens: pass an "
                "attention mask over all tokens, or reset the cache. The cache is unchanged"
            )
        if self.columns + tokens > self.max_length:
            raise SparseCacheError(
                f"the cache has room for max_length={self.max_length} tokens, holds {self.columns}, and was given {tokens} "
                "more: build it with a larger max_length, or crop or reset it. The cache is unchanged"
            )
        if self.batch not in (None, batch):
            raise SparseCacheError(
                f"the cache holds {self.batch} sequences and was given {batch}: reset it, or use batch_select_indices or "
                "batch_repeat_interleave. The cache is unchanged"
            )
        if again := self.done.intersection(layers):
            raise SparseCacheError(
                f"layer {min(again)} was given new tokens twice in one forward pass, or the last pass never reached layer "
                f"{self.layers - 1}: reset the cache, and always run the whole model"
            )

    def note(self, batch: int, tokens: int, layers: tuple[int, ...], *, last: bool) -> None:
        """Record that a graph has run. The last layer of the model completes the forward pass."""
        self.batch = batch
        self.done.update(layers)
        if last:
            missing = set(range(self.layers)) - self.done
            self.columns += tokens
            self.done.clear()
            if missing:
                raise SparseCacheError(
                    f"layer {min(missing)} received none of the tokens that the last layer received, so the cache was built "
                    "for another model: reset the cache, and use it with its own model"
                )

    def forget(self) -> None:
        """Reset the state to that of an empty cache."""
        self.columns, self.batch, self.failed = 0, None, ""
        self.done.clear()
