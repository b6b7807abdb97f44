"""Play a case with the library, and compare every logit with the oracle."""

from __future__ import annotations

import traceback
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

import sparse_compile as sc
from fuzz import models
from fuzz.case import Case, Chunk, Crop, Generate, Prompt, Reload, Reset, Select, Steps, Trip
from fuzz.formats import Stored
from fuzz.oracle import Oracle, Row, Token
from fuzz.refusals import Facts, is_ours, is_right
from fuzz.tripwire import Tripped, trip_in

TOLERANCE = {None: 2e-4, "int8": 0.03, "fp8": 0.06, "int4": 0.15}


@dataclass(frozen=True)
class Verdict:
    """How a case ended: ``equal``, ``refused`` with a right reason, ``told`` where the policy was lost with a word, ``tie``
    where rounding decides, or a fault: ``wrong`` values, a ``raw`` error, or a refusal that is not justified (``unjust``)."""

    kind: str
    detail: str = ""

    @property
    def is_fault(self) -> bool:
        """Whether the library did something wrong."""
        return self.kind in ("wrong", "raw", "unjust")


class _Fault(Exception):
    """Values differ from the oracle's."""


@dataclass
class Player:
    """The library's side of a case, and what its rows hold."""

    case: Case
    rows: list[Row] = field(default_factory=list)
    got: list[list[Tensor]] = field(default_factory=list)  # for each row, the logits of its tokens
    done: int = 0  # calls so far
    since: int = 0

    def __post_init__(self) -> None:
        case = self.case
        self.random = torch.Generator().manual_seed(case.seed)
        self.oracle = Oracle(case)
        self.policy: Any = eval(case.policy, {**vars(sc.masks), **vars(sc.policies), "Policy": sc.Policy})
        model = models.build(case.model)
        self.wires = {call.layer: trip_in(model, call.layer) for call in case.calls if isinstance(call, Trip)}
        compiled = None if case.cache.alone else self.policy
        self.plain, self.backend = model, sc.Backend(compiled, inner="eager")
        if case.entry == "backend":
            self.model: Any = torch.compile(model, backend=self.backend, dynamic=case.dynamic)
        else:
            self.model = sc.compile(model, compiled, inner="eager", dynamic=case.dynamic)
        self.cache = self.new_cache(case.cache.max_length)

    def new_cache(self, max_length: int) -> Any:
        """An empty cache of the case."""
        spec, config = self.case.cache, self.plain.config
        match spec.kind:
            case "dynamic":
                return DynamicCache(config=config)
            case "static":
                return StaticCache(config=config, max_cache_len=max_length)
            case "sparse":
                cache = sc.SparseCache(
                    config, self.policy, max_length=max_length, max_batch=spec.max_batch, page_size=spec.page_size, kv=spec.kv,
                    rollback=spec.rollback, mode=spec.mode, cache_positions=spec.cache_positions, dtype=torch.float32,
                )  # fmt: skip
                if spec.kv is not None:
                    self.oracle.formats = _formats(cache, Stored(spec.kv, spec.page_size))
                return cache
        return None

    def play(self) -> None:
        """Make every call, and compare what each text gave before its rows change."""
        for number, call in enumerate(self.case.calls):
            self.done = number
            match call:
                case Prompt(length, pads):
                    if self.case.cache.kind in ("none", "lent"):
                        self.check()
                    self.rows, self.got = [Row(pad) for pad in pads], [[] for _ in pads]
                    if self.case.cache.kind == "lent":
                        self.take(self.draw(length), "prefill")
                    else:
                        self.feed(self.draw(length))
                case Chunk(length):
                    self.feed(self.draw(length))
                case Steps(count):
                    for _ in range(count):
                        self.feed(self.draw(1))
                case Generate(count, implementation):
                    self.generate(count, implementation)
                case Reset():
                    self.check()
                    self.rows, self.got, self.since = [], [], 0
                    self.cache = self.new_cache(self.case.cache.max_length) if self.case.cache.kind == "dynamic" else self.cache
                    self.cache.reset()
                case Select(rows):
                    self.check()
                    self.cache.batch_select_indices(torch.tensor(rows, dtype=torch.int64))
                    self.rows, self.got, self.since = [self.rows[row] for row in rows], [[] for _ in rows], 0
                case Crop(count):
                    self.check()
                    count = min(count, *(len(row.tokens) - 1 for row in self.rows))  # never into padding
                    self.cache.crop(-count)
                    self.rows = [Row(row.pad, row.tokens[: len(row.tokens) - count]) for row in self.rows]
                    self.got, self.since = [[] for _ in self.rows], 0
                case Trip(length, layer):
                    self.trip(length, layer)
                case Reload(max_length):
                    self.check()
                    with TemporaryDirectory() as folder:
                        self.cache.save(Path(folder) / "cache")
                        self.cache = self.new_cache(max_length)
                        self.cache.load(Path(folder) / "cache")
                    self.since = 0
        self.done = len(self.case.calls)
        self.check()

    # -- calls -----------------------------------------------------------------------------------------------------------

    def draw(self, length: int) -> Tensor:
        """Random tokens ``[rows, length]``; padding where a prompt has padding."""
        ids = torch.randint(3, models.VOCABULARY, (len(self.rows), length), generator=self.random)
        if not self.columns_held():
            for row, at in enumerate(self.rows):
                ids[row, : at.pad] = 0
        return ids

    def columns_held(self) -> int:
        """The columns before the next call: padding counts once the prompt was fed."""
        return max((row.pad + len(row.tokens) if row.tokens else 0 for row in self.rows), default=0)

    def feed(self, ids: Tensor) -> None:
        """Run the model on more tokens of every row, and keep its logits."""
        inputs = self.inputs(ids)
        with torch.no_grad():
            logits = self.model(**inputs).logits
        lengths = [len(row.tokens) for row in self.rows]
        self.take(ids, "decode" if ids.shape[1] == 1 else "prefill")
        for row, (before, kept) in enumerate(zip(lengths, self.got, strict=True)):
            kept.append(logits[row, ids.shape[1] - (len(self.rows[row].tokens) - before) :])

    def inputs(self, ids: Tensor) -> dict[str, Any]:
        """The arguments of one call of the model."""
        held = self.columns_held()
        stop = held + ids.shape[1]
        inputs: dict[str, Any] = {"input_ids": ids, "use_cache": self.cache is not None}
        if self.cache is not None:
            inputs["past_key_values"] = self.cache
        if self.case.spelled or any(row.pad for row in self.rows):
            valid = torch.stack([torch.arange(stop) >= row.pad for row in self.rows]).long()
            inputs["attention_mask"] = valid
            inputs["position_ids"] = (valid.cumsum(dim=1) - 1).clamp(min=0)[:, held:]
        return inputs

    def take(self, ids: Tensor, phase: str) -> None:
        """Record tokens as part of every row."""
        for number, row in enumerate(self.rows):
            new = ids[number, row.pad if not row.tokens else 0 :].tolist()
            start = len(row.tokens)
            self.rows[number] = Row(
                row.pad,
                row.tokens + tuple(Token(one, phase, number, start, start + len(new), self.since) for one in new),
            )
        self.since = self.since + 1 if phase == "decode" else 0

    def generate(self, count: int, implementation: str | None) -> None:
        """Let ``generate`` continue the rows greedily, and keep the logits of the new tokens."""
        ids = torch.tensor([[0] * row.pad + [token.id for token in row.tokens] for row in self.rows])
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": (ids != 0).long()}
        if self.cache is not None:
            more = self.draw(2)  # a conversation goes on with a few tokens of the user
            inputs = {"input_ids": torch.cat([ids, more], dim=1), "past_key_values": self.cache}
            inputs["attention_mask"] = (inputs["input_ids"] != 0).long()
            self.take(more, "prefill")
        elif implementation:
            inputs["cache_implementation"] = implementation
        for kept, row in zip(self.got, self.rows, strict=True):
            kept[:] = [torch.full((len(row.tokens) - 1, models.VOCABULARY), torch.nan)]
        out = self.plain.generate(
            **inputs, max_new_tokens=count, do_sample=False, output_logits=True, return_dict_in_generate=True, pad_token_id=0
        )
        new = out.sequences[:, inputs["input_ids"].shape[1] :]
        for step, logits in enumerate(out.logits):
            for place, kept in enumerate(self.got):
                kept.append(logits[place, None])
            if step + 1 < len(out.logits):  # the last token is not fed
                self.take(new[:, step : step + 1], "decode")

    def trip(self, length: int, layer: int) -> None:
        """Feed tokens while a layer raises an error. The rows stay as they were."""
        self.check()
        with self.wires[layer] as wire:
            wire.is_armed = True
            try:
                self.model(**self.inputs(self.draw(length)))
            except Tripped:
                return
        raise _Fault("an error inside the graph did not reach the caller")

    # -- comparison ------------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Compare all logits of the rows with the oracle."""
        allowed = TOLERANCE[self.case.cache.kv]
        generates = any(isinstance(call, Generate) for call in self.case.calls)  # these keep no logits of prompts
        for number, (row, kept) in enumerate(zip(self.rows, self.got, strict=True)):
            if not kept or not row.tokens:
                continue
            got = torch.cat(kept)
            wanted = self.oracle.logits(row)[len(row.tokens) - len(got) :]
            known = ~got.isnan().all(dim=1) if generates else torch.ones(len(got)) > 0
            each = (got - wanted)[known].abs().amax(dim=1) / wanted.abs().max()
            if not bool((each < allowed).all()):
                first = int((~(each < allowed)).nonzero()[0])
                raise _Fault(f"row {number}: {float(each.max()):.3g} off, first at token {first} of {len(each)} compared")
            self.got[number] = []


def _formats(cache: sc.SparseCache, form: Stored) -> dict[int, dict[int, Stored]]:
    """The KV heads of each layer that the cache quantizes: those with pages. Rings are not quantized."""
    return {
        layer.plan.layer: {
            head: form
            for storage in layer.plan.storages
            if getattr(storage, "forms", None) is not None
            for head in storage.heads
        }
        for layer in cache.cached_layers
    }


def play(case: Case) -> Verdict:
    """Play a case, and judge it."""
    torch.compiler.reset()
    player: Player | None = None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            player = Player(case)
            player.play()
        except _Fault as fault:
            words = [str(warning.message) for warning in caught if issubclass(warning.category, sc.SparseCompileWarning)]
            if player is not None and player.oracle.is_tie:
                return Verdict("tie")
            return Verdict("told", words[0]) if words else Verdict("wrong", str(fault))
        except Exception as error:  # noqa: BLE001  # whatever is raised is judged
            inner = getattr(error, "inner_exception", None)  # what torch.compile wraps when a backend raises
            return _judged(case, player, inner if isinstance(inner, Exception) else error)
    return Verdict("equal")


def _judged(case: Case, player: Player | None, error: Exception) -> Verdict:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{type(error).__name__} at {frame.name} ({Path(frame.filename).name}): {str(error)[:200]}"
    if not is_ours(error, frame.filename):
        return Verdict("raw", where)
    facts = Facts(case, player.done if player else 0, player.columns_held() if player else 0)
    return Verdict("refused" if is_right(str(error), facts) else "unjust", where)
