"""Define ops whose operands are one named structure. Its fields make the schema; eager and fake forms receive the structure.

``torch.library`` requires flat arguments. A nested structure becomes one argument for each of its fields. A structure that is
None becomes as many empty arguments. Values such as formats are passed as text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from inspect import Parameter, Signature
from types import NoneType, UnionType
from typing import Any, Generic, TypeVar, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from sparse_compile.passes.storage.graph_text import from_text, to_text
from sparse_compile.passes.torch_private import overload

S = TypeVar("S")
EMPTY: dict[Any, Any] = {int: 0, float: 0.0, bool: False, str: "", list[int]: []}
# The types that an op accepts as they are. Every other value is passed as text.
PLAIN = (Tensor, torch.device, *EMPTY, list[Tensor])


@dataclass(frozen=True)
class _Field:
    """One field of a structure: an argument of the op, or a nested structure with ``fields``."""

    name: str
    kind: Any
    optional: bool
    fields: tuple[_Field, ...] = ()

    def arguments(self, prefix: str = "", *, optional: bool = False) -> Iterator[tuple[str, Any]]:
        """Yield the names and types of the arguments that the field becomes."""
        optional = optional or self.optional
        if self.fields:
            for field in self.fields:
                yield from field.arguments(f"{prefix}{self.name}_", optional=optional)
        else:
            kind = self.kind if self.kind in PLAIN else str
            yield f"{prefix}{self.name}", Union[kind, None] if optional and kind is Tensor else kind  # noqa: UP007

    def flatten(self, value: Any) -> Iterator[Any]:
        if self.fields:
            for at, field in enumerate(self.fields):
                yield from field.flatten(None if value is None else value[at])
        elif self.kind not in PLAIN:
            yield to_text(value)
        else:
            yield EMPTY.get(self.kind) if value is None else value

    def build(self, arguments: Iterator[Any]) -> Any:
        if not self.fields:
            value = next(arguments)
            return value if self.kind in PLAIN else from_text(value)
        values = [field.build(arguments) for field in self.fields]
        return None if self.optional and _is_absent(values[0]) else self.kind(*values)


def _is_absent(first: Any) -> bool:
    """Whether the first field of a structure shows that the structure is None."""
    return first is None or (isinstance(first, tuple) and _is_absent(first[0]))


def _fields(structure: Any) -> tuple[_Field, ...]:
    fields = []
    for name, hint in get_type_hints(structure).items():
        parts = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        kinds = [part for part in parts if part is not NoneType]
        kind = Tensor if any(isinstance(part, TypeVar) for part in kinds) else kinds[0]
        kind = list[Tensor] if get_origin(kind) is list and isinstance(get_args(kind)[0], TypeVar) else kind
        base = get_origin(kind) if get_origin(kind) not in (None, list) else kind
        nested = _fields(base) if hasattr(base, "_fields") else ()
        fields.append(_Field(name, base, len(kinds) < len(parts), nested))
    return tuple(fields)


class StructuredOp(Generic[S]):
    """An op over one structure, which is a ``NamedTuple``. Fields named in ``mutates`` are written in place."""

    def __init__(
        self,
        name: str,
        structure: type[S],
        eager: Callable[[S], Any],
        *,
        fake: Callable[[S], Any],
        mutates: Sequence[str] = (),
    ) -> None:
        self._whole = _Field("", structure, False, _fields(structure))
        arguments = [(argument, kind) for field in self._whole.fields for argument, kind in field.arguments()]

        def run(*values: Any, **named: Any) -> Any:
            return eager(self.build((*values, *named.values())))

        parameters = [Parameter(argument, Parameter.POSITIONAL_OR_KEYWORD, annotation=kind) for argument, kind in arguments]
        returns = get_type_hints(eager)["return"]
        run.__signature__ = Signature(parameters, return_annotation=None if returns is NoneType else returns)  # type: ignore[attr-defined]
        run.__name__ = name
        written = {argument for argument, _ in arguments if any(_is_part(argument, field) for field in mutates)}
        self._op = torch.library.custom_op(f"sparse_compile::{name}", run, mutates_args=written)
        self._op.register_fake(lambda *values: fake(self.build(values)))
        self.target = overload(self._op)

    def arguments(self, operands: Any) -> tuple[Any, ...]:
        """Return the flat arguments of a graph node. ``operands`` is a structure of nodes."""
        return tuple(self._whole.flatten(operands))

    def build(self, arguments: Sequence[Any]) -> S:
        """Rebuild the structure from its flat ``arguments``."""
        whole: S = self._whole.build(iter(arguments))
        return whole

    def __call__(self, operands: S) -> Any:
        return self._op(*self.arguments(operands))


def _is_part(argument: str, field: str) -> bool:
    return argument == field or argument.startswith(f"{field}_")
