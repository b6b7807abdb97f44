"""``generate()`` of a compiled transformers model: it makes, uses and keeps the ``SparseCache`` that the policy needs.

Five methods of transformers are replaced on the compiled model alone. ``_prepare_cache_for_generation`` supplies the cache, and
``generate`` keeps it for the next call. ``_update_model_kwargs_for_generation`` chooses the mask of the next step. These three
call the original. For a static cache, ``create_masks_for_generate`` leaves masks to the graph, and ``get_compiled_call`` keeps
``generate`` from compiling a second time.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from threading import Lock
from typing import Any

from torch import Tensor, nn

from sparse_compile.cache.padding import Padding
from sparse_compile.dynamo import Backend
from sparse_compile.masks.optional_packages import needed
from sparse_compile.repeated_steps import repeating_steps
from sparse_compile.speculative.lossless import Lossless

HOOKS = (
    "generate", "_prepare_cache_for_generation", "_update_model_kwargs_for_generation", "create_masks_for_generate",
    "get_compiled_call",
)  # fmt: skip
REPLACED = (*HOOKS, "sparse_cache")  # the attributes that a compiled model has of its own
# Candidate tokens of assisted decoding that a cache can take back.
ROLLBACK = 64
_lock = Lock()


@dataclass
class _Kept:
    """A cache and the options that it was built with. The cache is None before there is one, and while it is in use.

    ``length`` is that of the longest text of a call of ``generate``. ``method`` is its decoding method, if that is ours.
    """

    cache: Any = None
    length: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)
    method: Lossless | None = None

    @property
    def room(self) -> int:
        """The number of tokens that a cache needs beside those of the text."""
        return 0 if self.method is None else self.method.room


_in_use: ContextVar[_Kept | None] = ContextVar("sparse_compile_generate", default=None)  # by this call of ``generate``


@dataclass
class Generation:
    """The caches of ``model.generate()``. ``options`` are arguments of ``SparseCache``, such as ``kv``."""

    model: Any
    backend: Backend
    options: Mapping[str, Any]
    refused: str = ""  # why this model gets the caches of transformers
    _spare: _Kept = field(default_factory=_Kept)

    def install(self) -> None:
        """Replace the methods of the model, and give it ``sparse_cache``."""
        for name in HOOKS:
            object.__setattr__(self.model, name, getattr(self, name.removeprefix("_")))
        object.__setattr__(self.model, "sparse_cache", self.sparse_cache)

    def sparse_cache(self, max_length: int, max_batch: int = 1, **options: Any) -> Any:
        """Return a ``SparseCache`` for this model and its policy, for ``max_batch`` sequences of ``max_length`` tokens.

        ``options`` are those of ``SparseCache``. Those that were passed to ``sparse_compile.compile`` as ``cache`` apply
        unless they are given here.

            >>> model = sc.compile(model, sc.policies.streaming_llm(sink=4, recent=28), inner="eager")
            >>> cache = model.sparse_cache(max_length=64)
            >>> model.generate(tokens, max_new_tokens=2, past_key_values=cache).shape
            torch.Size([1, 10])
        """
        with needed("SparseCache", "transformers"):
            from sparse_compile.cache.sparse_cache import SparseCache
        settings = {"policy": self.backend.policy, "dtype": self.model.dtype, "device": self.model.device, **self.options}
        cache = SparseCache(self.model.config, max_length=max_length, max_batch=max_batch, **settings | options)
        cache.origin.use(self.model, tokens=0)
        return cache

    # -- what replaces the methods of transformers ------------------------------------------------------------------

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Run ``generate`` of transformers, and keep its cache for the next call unless the caller gets it."""
        from sparse_compile.passes.ops.cache.cache_update import SparseCacheError

        used, method = _Kept(), kwargs.get("custom_generate")
        if isinstance(method, Lossless):  # transformers does not pass the streamer to a method of the caller
            used.method = method
            kwargs["custom_generate"] = partial(method, streamer=kwargs.get("streamer"))
        token = _in_use.set(used)
        try:
            with repeating_steps():
                result = type(self.model).generate(self.model, *args, **kwargs)
        except SparseCacheError as error:
            if used.cache is None or kwargs.get("streamer") is not None or used.method is not None:
                raise
            used.cache = None
            self._refuse(str(error))
            result = type(self.model).generate(self.model, *args, **kwargs)
        finally:
            _in_use.reset(token)
        if used.cache is not None and getattr(result, "past_key_values", None) is not used.cache:
            with _lock:
                self._spare = used
        return result

    def prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], mode: Any, batch: int, length: int, *rest: Any
    ) -> Any:
        """Supply a ``SparseCache`` where transformers would make a ``DynamicCache``."""
        given, used = model_kwargs.get("past_key_values"), _in_use.get() or _Kept()
        used.length = length
        if given is not None:
            self._check_text(given, model_kwargs)
            if getattr(given, "made_by_generate", False):
                given.reserve(rounded(length + used.room))
        elif self._supplies(generation_config):
            rows = max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1) * batch
            assisted = getattr(mode, "value", "") == "assisted_generation"
            options = dict(generation_config.cache_config or {})
            if used.method is not None:
                options |= used.method.cache_options
            cache = self._supply(rows, length + used.room, assisted, options)
            if cache is not None:
                model_kwargs["past_key_values"] = cache
                return None
        original = type(self.model)._prepare_cache_for_generation
        return original(self.model, generation_config, model_kwargs, mode, batch, length, *rest)

    def update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """Extend the arguments of the next step, whose mask needs no look if that of the prompt was understood."""
        original = type(self.model)._update_model_kwargs_for_generation
        updated: dict[str, Any] = original(self.model, outputs, model_kwargs, *args, **kwargs)
        padding = getattr(getattr(updated.get("past_key_values"), "positions", None), "padding", None)
        if isinstance(padding, Padding) and updated.get("attention_mask") is not None:
            mask = padding.for_next_step(updated.pop("attention_mask"))
            if mask is not None:  # assisted decoding of transformers 5.17 takes a mask that is there for a tensor
                updated["attention_mask"] = mask
        return updated

    def create_masks_for_generate(self, *, attention_mask: Tensor | None, **rest: Any) -> Any:
        """Return the mask of the tokenizer, of fixed length, from which the graph computes the mask over a static cache.

        A policy needs the text positions of queries. A mask of queries times keys from outside of the graph does not contain
        them.
        """
        used = _in_use.get()
        if used is None or self.model.config.is_encoder_decoder:
            from transformers.masking_utils import create_masks_for_generate

            original = getattr(type(self.model), "create_masks_for_generate", create_masks_for_generate)
            return original(attention_mask=attention_mask, **rest)
        if attention_mask is None:
            return None
        return nn.functional.pad(attention_mask, (0, max(0, used.length - attention_mask.shape[1])), value=1)

    def get_compiled_call(self, *args: Any, **kwargs: Any) -> Any:
        """Return the model itself, which is compiled already."""
        return self.model.__call__

    # -- caches -----------------------------------------------------------------------------------------------------

    def _supplies(self, generation_config: Any) -> bool:
        config, model = generation_config, self.model
        if not self.refused and model.config.is_encoder_decoder:
            self._refuse("it has an encoder, whose keys are cached as well")
        if not self.refused and len({weight.device for weight in model.parameters()}) > 1:
            self._refuse("its weights are on several devices")
        ours = config.cache_implementation is None and config.use_cache is not False and not config.is_assistant
        return bool(ours and not self.refused and model._supports_default_dynamic_cache())

    def _supply(self, rows: int, length: int, assisted: bool, options: Mapping[str, Any]) -> Any:
        """A cache that is empty and large enough; None if this model cannot have one."""
        options = dict(options)
        if assisted:
            options.setdefault("rollback", ROLLBACK)
            length += ROLLBACK
        with _lock:
            spare, self._spare = self._spare, _Kept()
        cache = spare.cache if spare.options == options and self._fits(spare.cache, rows, length) else None
        if cache is None:
            spare.cache = None  # before the next one is allocated
            try:
                cache = self.sparse_cache(rounded(length), rows, **options)
            except (ValueError, TypeError, ImportError) as error:
                if self.options or options.keys() - {"rollback"}:
                    raise
                self._refuse(str(error))
                return None
        cache.reset()
        cache.made_by_generate = True  # its length was not chosen by anyone, so it may grow
        used = _in_use.get()
        if used is not None:
            used.cache, used.options = cache, options
        return cache

    def _fits(self, cache: Any, rows: int, length: int) -> bool:
        if cache is None or cache.max_batch < rows or cache.max_length < length:
            return False
        return bool(cache.positions.columns.device == self.model.device and cache.dtype == self.model.dtype)

    def _refuse(self, why: str) -> None:
        """Use the caches of transformers from now on. Options such as ``kv`` are then lost, so this warns if there are any."""
        self.refused = why
        message = f"generate() uses the caches of transformers, because a SparseCache does not work here: {why}"
        if self.options:
            self.backend.report_trouble(f"{message}. The options {dict(self.options)} of its cache do not apply")
        else:
            self.backend.report_note(message)

    def _check_text(self, cache: Any, model_kwargs: Mapping[str, Any]) -> None:
        """Raise if the prompt of a second call does not contain the text that the cache holds."""
        from sparse_compile.passes.ops.cache.cache_update import SparseCacheError

        held = getattr(getattr(cache, "host_state", None), "columns", 0)
        mask = model_kwargs.get("attention_mask")
        positions = model_kwargs.get("position_ids")
        given = mask.shape[1] if mask is not None else positions.shape[-1] if positions is not None else None
        if held and given is not None and given <= held:
            raise SparseCacheError(
                f"the cache holds {held} tokens, and the prompt has {given}: call reset() on the cache for another text, or "
                "pass the whole conversation, with the tokens that the cache holds. The cache is unchanged"
            )


def rounded(length: int) -> int:
    """``length`` rounded up by at most a thirty-second, so that texts of similar length share a cache."""
    unit = max(64, 1 << max(0, length.bit_length() - 6))
    return -(-length // unit) * unit


def generating(model: nn.Module) -> nn.Module | None:
    """The model whose ``generate`` runs: ``model`` itself, or the first one inside it, as in a PEFT model; None without one."""
    if not hasattr(model, "generate"):
        return None
    return next((module for module in model.modules() if hasattr(type(module), "_prepare_cache_for_generation")), None)
