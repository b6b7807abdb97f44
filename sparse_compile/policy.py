"""Policy: choose the mask of each attention call of a model by layer, module and phase."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparse_compile.masks import Mask
from sparse_compile.masks.json_format import decode, encode, read_json
from sparse_compile.masks.patterns.per_head import PerHead
from sparse_compile.masks.selection.page_topk import PageTopK, has_selector

VERSION = 1
Layer = int | range | str
# What DistributedDataParallel, torch.compile, FSDP and checkpointing put before the path of a module. Dynamo traces what is
# inside of some of them, and its paths begin there.
WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


@dataclass(frozen=True, init=False)
class Policy:
    """A mask for every attention call, which further restricts what the model's own mask shows.

    ``default`` applies to every call without a more specific entry. None leaves such calls exact. ``layers`` maps a layer
    index, a ``range`` of them, or a module-path pattern (``"model.layers.*.self_attn"``, matched by ``fnmatch``) to a mask. An
    index takes precedence over a range, and a range over a pattern. Among entries of the same kind, the first one wins.
    ``prefill`` and ``decode`` replace everything else in their phase. Each is a mask, or a ``Policy`` without phases.

    Use ``per_head([...])`` for a mask that differs by head. Policies are immutable and hashable, and are stored as JSON.

        >>> from sparse_compile import Policy
        >>> from sparse_compile.masks import causal, sink, sliding_window
        >>> streaming = causal & (sink(4) | sliding_window(256))
        >>> policy = Policy(streaming, layers={0: causal, range(1, 3): causal & sliding_window(1024)})
        >>> policy.mask_for("model.layers.0.self_attn", 0, "prefill")
        causal
        >>> policy.mask_for("model.layers.7.self_attn", 7, "decode")
        causal & (sink(4) | sliding_window(256))
    """

    default: Mask | None
    layers: tuple[tuple[Layer, Mask], ...]
    prefill: Policy | None
    decode: Policy | None

    def __init__(
        self,
        default: Mask | Policy | None = None,
        *,
        layers: Mapping[Layer, Mask] | None = None,
        prefill: Mask | Policy | None = None,
        decode: Mask | Policy | None = None,
    ) -> None:
        if isinstance(default, Policy):
            if layers or prefill is not None or decode is not None:
                raise TypeError("Policy(policy) copies a policy and takes nothing else: build one from masks instead")
            for name in ("default", "layers", "prefill", "decode"):
                object.__setattr__(self, name, getattr(default, name))
            return
        if default is not None and not isinstance(default, Mask):
            raise TypeError(f"a policy is made of masks, got {default!r}")
        entries = tuple((layers or {}).items())
        for layer, mask in entries:
            _check_entry(layer, mask)
        object.__setattr__(self, "default", default)
        object.__setattr__(self, "layers", entries)
        object.__setattr__(self, "prefill", _phase("prefill", prefill))
        object.__setattr__(self, "decode", _phase("decode", decode))

    def mask_for(self, module: str, layer: int | None, phase: str, *, by_path: bool = False) -> Mask | None:
        """The mask of one call, or None if the policy leaves the call exact.

        With ``by_path``, only entries for module paths count, as for an encoder beside a text decoder.
        """
        chosen = {"prefill": self.prefill, "decode": self.decode}.get(phase)
        if chosen is not None:
            return chosen.mask_for(module, layer, phase, by_path=by_path)
        for kind in (str,) if by_path else (int, range, str):
            for key, mask in self.layers:
                if isinstance(key, kind) and _matches(key, module, layer):
                    return mask
        return None if by_path else self.default

    def names_layers(self) -> bool:
        """Whether the policy has entries for single layers or modules."""
        return bool(self.layers) or any(phase is not None and phase.names_layers() for phase in (self.prefill, self.decode))

    def names_modules(self) -> bool:
        """Whether the policy has entries for modules by path."""
        phases = (phase for phase in (self.prefill, self.decode) if phase is not None)
        return any(isinstance(key, str) for key, _ in self.layers) or any(phase.names_modules() for phase in phases)

    def unmatched(self, modules: Collection[str]) -> list[str]:
        """The patterns for module paths, each once, that match none of ``modules``."""
        phases = (phase for phase in (self.prefill, self.decode) if phase is not None)
        patterns = [key for key, _ in self.layers if isinstance(key, str)]
        missing = [key for key in patterns if not any(_is_path(key, module) for module in modules)]
        return list(dict.fromkeys([*missing, *(key for phase in phases for key in phase.unmatched(modules))]))

    def selects(self) -> bool:
        """Whether decode steps select pages by queries and keys (``page_topk``), which needs a ``SparseCache``."""
        masks = [mask for mask in (self.default, *(mask for _, mask in self.layers)) if mask is not None]
        return self.decode.selects() if self.decode is not None else any(map(has_selector, masks))

    def check_layers(self, layers: int) -> None:
        """Raise ``ValueError`` if the policy names a layer that a model with this number of layers does not have."""
        for key, _ in self.layers:
            highest = key if isinstance(key, int) else max(key, default=-1) if isinstance(key, range) else -1
            if highest >= layers:
                raise ValueError(f"the policy names layer {highest}, but the model has {layers} layers (0 to {layers - 1})")
        for mask in [self.default, *(mask for _, mask in self.layers)]:
            for node in mask.walk() if mask is not None else ():
                shared = node.share if isinstance(node, PageTopK) and isinstance(node.share, tuple) else ()
                if max((layer for pair in shared for layer in pair), default=-1) >= layers:
                    raise ValueError(f"{node} shares layers that the model does not have: it has {layers} (0 to {layers - 1})")
        for phase in (self.prefill, self.decode):
            if phase is not None:
                phase.check_layers(layers)

    def check(self, layers: int, heads: int, kv_heads: int) -> None:
        """Raise ``ValueError`` if the policy names a layer or a head count that a model of these sizes does not have."""
        self.check_layers(layers)
        for mask in [self.default, *(mask for _, mask in self.layers)]:
            for node in mask.walk() if mask is not None else ():
                if isinstance(node, PerHead) and len(node.masks) not in (heads, kv_heads):
                    raise ValueError(
                        f"the policy has a per_head of {len(node.masks)} masks, but the model has {heads} query heads "
                        f"and {kv_heads} KV heads: pass one mask per query head or per KV head"
                    )
        for phase in (self.prefill, self.decode):
            if phase is not None:
                phase.check(layers, heads, kv_heads)

    def to_json(self) -> str:
        """The policy as JSON text, which ``Policy.from_json`` reads."""
        return json.dumps({"version": VERSION, "policy": _encode(self)}, indent=1)

    @staticmethod
    def from_json(text: str) -> Policy:
        """Read the text of ``to_json``. Raises ``ValueError`` for broken text or another version."""
        return _decode(read_json(text, "policy", VERSION, "save it again with this library"))

    def save(self, path: str | Path) -> None:
        """Write the policy to a JSON file."""
        Path(path).write_text(self.to_json() + "\n", encoding="utf-8")

    @staticmethod
    def load(path: str | Path) -> Policy:
        """Read a policy from a JSON file."""
        return Policy.from_json(Path(path).read_text(encoding="utf-8"))

    def __repr__(self) -> str:
        parts = [] if self.default is None else [repr(self.default)]
        if self.layers:
            parts.append(f"layers={dict(self.layers)!r}")
        parts += [
            f"{name}={value!r}" for name, value in (("prefill", self.prefill), ("decode", self.decode)) if value is not None
        ]
        return f"Policy({', '.join(parts)})"


def as_policy(policy: Policy | Mask | None) -> Policy | None:
    """Return a policy: a mask becomes the default for every call, None stays None. Raises ``TypeError`` for other types."""
    if policy is None or isinstance(policy, Policy):
        return policy
    if isinstance(policy, Mask):
        return Policy(policy)
    remedy = ": build one with sparse_compile.policies, or read a file with Policy.load" if isinstance(policy, str) else ""
    raise TypeError(f"policy needs a Policy, a mask or None, got {policy!r}{remedy}")


def _phase(name: str, value: Mask | Policy | None) -> Policy | None:
    policy = as_policy(value)
    if policy is not None and (policy.prefill is not None or policy.decode is not None):
        raise ValueError(f"the {name} policy has phases of its own: give it masks and layers only")
    return policy


def _check_entry(layer: Layer, mask: Mask) -> None:
    if not isinstance(mask, Mask):
        raise TypeError(f"a policy is made of masks, got {mask!r} for layer {layer!r}")
    if isinstance(layer, bool) or not isinstance(layer, int | range | str):
        raise TypeError(f"a policy names layers by index, range or module-path pattern, got {layer!r}")
    if not isinstance(layer, str) and min([layer] if isinstance(layer, int) else layer, default=0) < 0:
        raise ValueError(f"a policy counts layers from 0, got {layer!r}")


def _matches(key: Layer, module: str, layer: int | None) -> bool:
    if isinstance(key, str):
        return _is_path(key, module)
    return layer is not None and (layer in key if isinstance(key, range) else layer == key)


def _is_path(pattern: str, module: str) -> bool:
    """Whether a pattern matches the path of a module, also if only one of them names the wrappers around a model."""
    return fnmatch.fnmatchcase(module, pattern) or fnmatch.fnmatchcase(_unwrapped(module), _unwrapped(pattern))


def _unwrapped(path: str) -> str:
    return ".".join(part for part in path.split(".") if part not in WRAPPERS)


def _encode(policy: Policy) -> dict[str, Any]:
    content: dict[str, Any] = {"default": None if policy.default is None else encode(policy.default)}
    content["layers"] = [
        {"range": [key.start, key.stop, key.step], "mask": encode(mask)}
        if isinstance(key, range)
        else {"layer" if isinstance(key, int) else "module": key, "mask": encode(mask)}
        for key, mask in policy.layers
    ]
    for name, phase in (("prefill", policy.prefill), ("decode", policy.decode)):
        content[name] = None if phase is None else _encode(phase)
    return content


def _decode(content: Any) -> Policy:
    if not isinstance(content, dict) or not isinstance(content.get("layers", []), list):
        raise ValueError(f"a policy in JSON is an object with default, layers, prefill and decode, got {content!r}")
    layers: dict[Layer, Mask] = {}
    for entry in content.get("layers", []):
        match entry:
            case {"mask": mask, "layer": int(key)} | {"mask": mask, "module": str(key)} if key is not True and key is not False:
                layers[key] = decode(mask)
            case {"mask": mask, "range": [int(start), int(stop), int(step)]} if step != 0:
                layers[range(start, stop, step)] = decode(mask)
            case _:
                raise ValueError(f"a layer of a policy in JSON needs a mask and one of layer, range, module; got {entry!r}")
    default, prefill, later = (content.get(name) for name in ("default", "prefill", "decode"))
    return Policy(
        None if default is None else decode(default),
        layers=layers,
        prefill=None if prefill is None else _decode(prefill),
        decode=None if later is None else _decode(later),
    )
