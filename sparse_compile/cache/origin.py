"""Which model filled a cache: a fingerprint of its weights, so that a cache of another checkpoint is not taken for its own."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sparse_compile.passes.ops.cache.cache_update import SparseCacheError
from sparse_compile.passes.torch_private import is_wrapper

SAMPLES = 64  # values that the fingerprint reads of each weight


def fingerprint(model: nn.Module) -> str:
    """A hash of the shapes of all weights, and of some values of each.

    Values are compared as float32, so the same weights in a wider dtype or on another device have the same fingerprint. Names
    do not count, so neither do wrappers. Weights that are not in memory count with their shapes alone.
    """
    digest, values = hashlib.sha256(), []
    for weight in _weights(model):
        digest.update(str(tuple(weight.shape)).encode())
        if weight.numel() and not weight.is_meta:
            flat = weight.detach().reshape(-1) if weight.is_contiguous() else weight.detach().flatten()
            at = torch.linspace(0, flat.numel() - 1, min(SAMPLES, flat.numel()), dtype=torch.float64).long()
            values.append(flat[at.to(flat.device)].float())
    for device in dict.fromkeys(value.device for value in values):  # the host waits once for each device
        read = torch.cat([value for value in values if value.device == device]).cpu()
        digest.update(str(read.tolist()).encode())
    return digest.hexdigest()


def _weights(model: nn.Module) -> Iterator[Tensor]:
    """The parameters and persistent buffers of a model. Of a quantized or distributed one, the tensors that it consists of."""
    for module in model.modules():
        fleeting = module._non_persistent_buffers_set
        buffers = [tensor for name, tensor in module.named_buffers(recurse=False) if name not in fleeting]
        for tensor in (*module.parameters(recurse=False), *buffers):
            yield from _plain(tensor)


def _plain(tensor: Tensor) -> Iterator[Tensor]:
    if is_wrapper(tensor):
        inner: Any = tensor
        for name in inner.__tensor_flatten__()[0]:
            yield from _plain(getattr(inner, name))
    else:
        yield tensor


class Origin:
    """The model that uses a cache, and the weights that its tokens were made with if they come from a file.

    The model is not kept alive. A cache that no model of ``sparse_compile.compile`` has used, and that was not read from a
    file of one that was used, has no origin, and then no weights are compared.
    """

    def __init__(self) -> None:
        self._model: weakref.ref[nn.Module] | None = None
        self._of_file = self._name = ""

    @property
    def model(self) -> nn.Module | None:
        """The model that uses the cache, while it exists."""
        return None if self._model is None else self._model()

    @property
    def name(self) -> str:
        """The class of the model and the name of its checkpoint; empty if no model is known."""
        return self._name

    def weights(self) -> str:
        """The fingerprint of the weights that made the contents of the cache; empty if it is not known."""
        return self._of_file or (fingerprint(self.model) if self.model is not None else "")

    def use(self, model: nn.Module, tokens: int) -> None:
        """Record that ``model`` uses the cache, which holds ``tokens`` tokens.

        Raises ``SparseCacheError`` if these were made with other weights.
        """
        if self._model is not None and self._model() is model:
            return
        if not tokens:
            self.forget()
        known = self.weights() if tokens else ""
        if known and known != fingerprint(model):
            raise SparseCacheError(
                f"the cache holds {tokens} tokens of {self.name}, and {name_of(model)} has other weights: use the cache with "
                "the model that filled it, or reset() it. The cache is unchanged"
            )
        self._model, self._name = weakref.ref(model), name_of(model)

    def read(self, weights: str, name: str) -> None:
        """Record that the contents come from a file of ``name`` with these ``weights``."""
        self._of_file, self._name = weights, name or self._name

    def forget(self) -> None:
        """Forget the contents. The model that uses the cache stays."""
        self._of_file = ""

    def __deepcopy__(self, memo: Any) -> Origin:
        other = Origin()
        other.__dict__.update(self.__dict__)
        return other

    def __getstate__(self) -> dict[str, Any]:
        return {"_model": None, "_of_file": self.weights(), "_name": self._name}


def name_of(model: nn.Module) -> str:
    """The class of a model, with the name of its checkpoint if it has one."""
    checkpoint = getattr(getattr(model, "config", None), "name_or_path", "")
    return f"{type(model).__name__} ({checkpoint})" if checkpoint else type(model).__name__
