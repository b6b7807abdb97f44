"""What a compiled model runs for ``model(...)``: masks of fixed shape, long prompts in chunks, and a watch over Dynamo."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sparse_compile.attention_modules import without_rows
from sparse_compile.cache.padding import Padding
from sparse_compile.dynamo import Backend, GraphRun, SparseCompileWarning
from sparse_compile.generation import generating
from sparse_compile.repeated_steps import Steps, current_steps, read_step
from sparse_compile.speculative.speculation import current_speculation

# Arguments of a model that have one entry for each new token, and the axis of the tokens.
BY_TOKEN = {"input_ids": 1, "inputs_embeds": 1, "position_ids": -1, "cache_position": 0}
# Arguments that mean the same for every chunk of a prompt.
WHOLE = ("attention_mask", "past_key_values", "use_cache", "return_dict", "logits_to_keep")


class CompiledCall:
    """The compiled forward pass of ``model``. ``run`` is what ``torch.compile`` made of it.

    Prompts of more than ``chunk`` tokens in a ``SparseCache`` run in chunks, if only the last logits are needed. None runs
    them whole.
    """

    def __init__(self, run: Callable[..., Any], model: nn.Module, backend: Backend, chunk: int | None) -> None:
        self.run, self.model, self.backend, self.chunk = run, model, backend, chunk
        self.owner = generating(model) or model  # whose weights a cache remembers; a wrapper may have others beside them
        parameters = inspect.signature(model.forward).parameters.values()
        self.parameters = [each.name for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model. Calls that run no compiled graph are reported."""
        if torch.compiler.is_compiling():
            return self.run(*args, **kwargs)
        cache = _argument("past_key_values", args, kwargs, self.parameters)
        padding = getattr(getattr(cache, "positions", None), "padding", None)
        if isinstance(padding, Padding) and len(args) <= len(self.parameters):
            kwargs = {**dict(zip(self.parameters, args, strict=False)), **kwargs}
            return self._over_cache(cache, padding, kwargs)
        return self._watched(*args, **kwargs)

    def _over_cache(self, cache: Any, padding: Padding, kwargs: dict[str, Any]) -> Any:
        if getattr(getattr(self.owner, "config", None), "is_encoder_decoder", False):
            raise ValueError(
                f"{type(self.owner).__name__} has an encoder, whose keys need a cache of their own, got a SparseCache alone: "
                "pass past_key_values=EncoderDecoderCache(cache, DynamicCache()) of transformers"
            )
        cache.origin.use(self.owner, cache.host_state.columns)
        rows, tokens = _size(kwargs)
        speculation = current_speculation()
        if speculation is not None and speculation.takes(cache, tokens):
            return speculation.step(partial(self._over_cache, cache, padding), kwargs)
        whole = kwargs.get("attention_mask")
        start, result = 0, None
        for stop in self._ends(cache, kwargs, rows, tokens):
            part, held = kwargs, cache.host_state.columns
            if stop - start < tokens:
                part = {name: _slice(name, value, start, stop) for name, value in kwargs.items()}
            if isinstance(whole, Tensor):
                mask = whole[:, : held + stop - start] if stop < tokens else whole
                part["attention_mask"] = padding.mask_for(mask, stop - start, held)
            is_step = stop - start == 1 or cache.is_verifying
            steps = current_steps((stop - start, cache.is_verifying)) if is_step else None
            result = self._watched(**part) if steps is None else self._step(steps, part)
            start = stop
        return result

    def _step(self, steps: Steps, kwargs: dict[str, Any]) -> Any:
        """Run a decode step of ``generate``: as the one before it, or through Dynamo."""
        known = steps.find(self, kwargs)
        if known is not None:
            return known.repeat(kwargs)
        runs: list[GraphRun] = []
        self.backend.runs = runs
        try:
            result = self._watched(**kwargs)
        finally:
            self.backend.runs = None
        steps.note(self, read_step(kwargs, runs[0], result) if len(runs) == 1 else None)
        return result

    def _ends(self, cache: Any, kwargs: Mapping[str, Any], rows: int, tokens: int) -> list[int]:
        """Where each chunk of a prompt ends. There is one chunk if the prompt is short, or has to run whole.

        Chunks consist of whole blocks of queries, so that a prompt in chunks has the same blocks.
        """
        if self.chunk is None or tokens <= 1:
            return [tokens]
        from sparse_compile.passes.ops.block_tables import BLOCK

        step = max(BLOCK, self.chunk // max(rows, 1) // BLOCK * BLOCK)
        if tokens <= step or not cache.is_chunkable or cache.host_state.columns + tokens > cache.max_length:
            return [tokens]
        kept, mask = kwargs.get("logits_to_keep"), kwargs.get("attention_mask")
        known = all(value is None or name in BY_TOKEN or name in WHOLE for name, value in kwargs.items())
        by_column = mask is None or (isinstance(mask, Tensor) and mask.dim() == 2)
        if not (isinstance(kept, int) and 0 < kept <= BLOCK and known and by_column):
            return [tokens]
        ends = list(range(step, tokens, step))
        if tokens - ends[-1] < max(kept, 2):  # the last chunk has all logits that are kept, and a chunk of one is a decode step
            ends.pop()
        return [*ends, tokens]

    def _watched(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model, and report a call that runs no compiled graph, and attention that a policy does not reach."""
        backend = self.backend
        before, compiles = backend.calls, backend.report.compiles
        result = self.run(*args, **kwargs)
        if backend.calls == before:
            backend.report_trouble(
                "the model ran un-compiled, without its policy, because Dynamo skipped it or reached its recompile limit"
            )
        elif backend.report.compiles != compiles:
            backend.check_reach()
            self._warn_of_modules_without_rows()
        return result

    def _warn_of_modules_without_rows(self) -> None:
        """Warn of attention modules that no row of the report covers. They may be unused, so ``strict`` does not raise."""
        report = self.backend.report
        missing = without_rows(self.model, report) if self.backend.policy is not None and report.sites else []
        message = (
            f"{len(missing)} attention modules have no row in the report, so the policy does not reach them if they run: "
            f"{', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}"
        )
        if missing and message not in report.notes:
            self.backend.report_note(message)
            warnings.warn(message, SparseCompileWarning, stacklevel=4)


def _argument(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], parameters: list[str]) -> Any:
    at = parameters.index(name) if name in parameters else len(args)
    return kwargs.get(name, args[at] if at < len(args) else None)


def _size(kwargs: Mapping[str, Any]) -> tuple[int, int]:
    """The numbers of sequences and of new tokens of a call."""
    given = [kwargs[name] for name in ("input_ids", "inputs_embeds") if isinstance(kwargs.get(name), Tensor)]
    return (len(given[0]), int(given[0].shape[1])) if given else (0, 0)


def _slice(name: str, value: Any, start: int, stop: int) -> Any:
    if name not in BY_TOKEN or not isinstance(value, Tensor):
        return value
    return value.narrow(BY_TOKEN[name], start, stop - start)
