"""``generate(custom_generate=sparse_compile.lossless(policy))``: the tokens of full attention, drafted by a sparse policy."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from sparse_compile.dynamo import SparseCompileWarning
from sparse_compile.masks import Mask, full
from sparse_compile.passes import torch_private
from sparse_compile.policy import Policy, as_policy
from sparse_compile.speculative.draft import Drafter
from sparse_compile.speculative.pace import Pace
from sparse_compile.speculative.speculation import Speculation, Statistics, speculating

if TYPE_CHECKING:
    from sparse_compile.cache.sparse_cache import SparseCache


def lossless(draft: Policy | Mask, *, ahead: int | Literal["auto"] = "auto") -> Lossless:
    """Return a decoding method for ``generate`` whose tokens are those of full attention, and that drafts them with ``draft``.

    Decode steps under the policy ``draft`` propose a few tokens. One run of the model under full attention then verifies all of
    them, which takes about as long as one decode step, because a step mostly reads weights and keys. One ``SparseCache`` serves
    both: it keeps every key, steps read what the policy shows, and verifications read everything. ``draft`` restricts decode
    steps only; a policy with phases gives its ``decode`` mask.

    ``generate`` itself is unchanged: its own greedy search or sampling chooses each token, from logits of full attention, with
    its processors, stopping criteria and streamers. With the same random seed, sampled tokens are the same too. Results are
    equal up to the rounding of a model that gets several tokens at once instead of one. In a batch, a draft counts only if it
    is right in every row that has not ended.

    ``ahead`` is the number of tokens drafted before each verification. With ``"auto"`` it follows the acceptance and the times
    that are measured, up to 7. If drafts do not pay, as with short texts, this warns once with ``SparseCompileWarning`` and
    decodes without drafts. ``statistics`` describes the last call. With ``return_dict_in_generate=True``, ``generate`` returns
    it as ``lossless``.

        >>> model = sc.compile(model, inner="eager")
        >>> drafts = sc.lossless(causal & (sink(4) | sliding_window(64)), ahead=3)
        >>> tokens_out = model.generate(tokens, max_new_tokens=8, do_sample=False, custom_generate=drafts)
        >>> tokens_out.shape, drafts.statistics.verifications < 8
        (torch.Size([1, 16]), True)

    For several turns over one cache, build it with ``model.sparse_cache(max_length=..., **drafts.cache_options)``, with room
    for ``drafts.room`` more tokens than the text has.

    Raises ``ValueError`` or ``TypeError`` for a wrong policy or number; in ``generate``, ``ValueError`` for a model that
    ``sparse_compile.compile`` has not compiled or that has a policy of its own, for beams, for ``inputs_embeds``, and for a
    cache that was built for another policy or is too small. The method is that of MagicDec
    (https://arxiv.org/abs/2408.11049), without a second cache.
    """
    return Lossless(draft, ahead=ahead)


class Lossless:
    """A decoding method for ``generate``, as ``lossless`` makes it. It may be used for several calls and models in turn."""

    def __init__(self, draft: Policy | Mask, *, ahead: int | Literal["auto"] = "auto") -> None:
        policy = as_policy(draft)
        if policy is None:
            raise TypeError(
                "lossless needs a policy for its drafts, got None: pass a mask or a Policy, such as policies.quest()"
            )
        if ahead != "auto" and (not isinstance(ahead, int) or isinstance(ahead, bool)):
            raise TypeError(f"ahead needs a number of tokens or 'auto', got {ahead!r}")
        if ahead != "auto" and not 1 <= ahead <= 31:
            raise ValueError(f"ahead needs to be from 1 to 31, got {ahead}")
        steps = policy.decode if policy.decode is not None else Policy(policy.default, layers=dict(policy.layers))
        self.policy = Policy(prefill=full, decode=steps)
        self.ahead = ahead
        self.statistics = Statistics()
        self._has_warned = False

    @property
    def room(self) -> int:
        """The number of tokens that a cache needs beside those of the text, because a verification has more."""
        return self._pace().most + 1

    @property
    def cache_options(self) -> dict[str, Any]:
        """The options of a ``SparseCache`` for this method: its policy, and room to take drafts back."""
        return {"policy": self.policy, "rollback": self.room}

    def _pace(self) -> Pace:
        return Pace(None if isinstance(self.ahead, str) else self.ahead)

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        *,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **kwargs: Any,
    ) -> Any:
        """Decode. ``generate`` calls this with what it has prepared, and returns the result."""
        if kwargs.get("inputs_embeds") is not None:
            raise ValueError("lossless drafts tokens after input_ids, got inputs_embeds: pass input_ids")
        cache = self._cache_for(model, generation_config, kwargs.get("past_key_values"))
        drafter = Drafter(logits_processor, samples=bool(generation_config.do_sample))
        speculation = Speculation(cache, input_ids, self._pace(), drafter, generation_config.max_length, self._give_up)
        try:
            with speculating(speculation):
                result = type(model)._sample(
                    model,
                    input_ids,
                    logits_processor=logits_processor,
                    stopping_criteria=_observed(stopping_criteria, speculation),
                    generation_config=generation_config,
                    **kwargs,
                )
        finally:
            self.statistics = speculation.statistics
            speculation.statistics.read(speculation.pace)
        if not isinstance(result, Tensor):
            result.lossless = speculation.statistics
        return result

    def _cache_for(self, model: Any, generation_config: Any, cache: Any) -> SparseCache:
        """The cache of this call. Raises ``ValueError`` if it does not serve this method."""
        from sparse_compile.cache.sparse_cache import SparseCache

        backend = getattr(torch_private.compiled_call(model), "backend", None)
        if backend is None:
            raise ValueError(f"lossless needs a compiled model, got {type(model).__name__}: call sparse_compile.compile(model)")
        if backend.policy is not None:
            raise ValueError(
                f"lossless verifies with full attention, but this model was compiled with {backend.policy}: compile it without "
                "a policy, and give that policy to lossless"
            )
        if (generation_config.num_beams or 1) > 1:
            raise ValueError(
                f"lossless decodes greedily or samples, got num_beams={generation_config.num_beams}: leave num_beams out"
            )
        if not isinstance(cache, SparseCache):
            raise ValueError(
                f"lossless needs a SparseCache, got {_named(cache)}: leave out past_key_values and "
                "cache_implementation. If the model cannot have one, the notes of its report say why"
            )
        if cache.policy != self.policy or cache.rollback < self.room:
            raise ValueError(
                f"lossless needs a cache with its own policy and rollback={self.room}, got policy={cache.policy} and "
                f"rollback={cache.rollback}: build it with model.sparse_cache(max_length=..., **drafts.cache_options)"
            )
        if cache.max_length < generation_config.max_length + self.room:
            raise ValueError(
                f"lossless needs a cache for {generation_config.max_length + self.room} tokens, {self.room} more than the text "
                f"may have, got max_length={cache.max_length}: build a larger cache, or pass a smaller max_new_tokens"
            )
        return cache

    def _give_up(self, pace: Pace) -> None:
        if self._has_warned:
            return
        self._has_warned = True
        warnings.warn(
            f"lossless decodes without drafts from here on, because they do not pay: {pace.acceptance:.0%} of them are right, "
            f"and a draft takes {pace.break_even:.0%} of the time of a verification. Longer texts, or a policy that shows "
            "more, may change that. ahead=n drafts n tokens in any case",
            SparseCompileWarning,
            stacklevel=2,
        )

    def __repr__(self) -> str:
        return f"lossless({self.policy.decode}, ahead={self.ahead!r})"


def _named(cache: Any) -> str:
    return "no cache" if cache is None else type(cache).__name__


def _observed(criteria: Any, speculation: Speculation) -> Any:
    """The stopping criteria, with a look at the text and at the rows that have ended."""
    from transformers import StoppingCriteriaList

    class Observed(StoppingCriteriaList):
        def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
            ended = super().__call__(input_ids, scores, **kwargs)
            speculation.note_text(input_ids, ended)
            return ended

    return Observed(criteria)
