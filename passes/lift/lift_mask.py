"""Lift the tensors that a model adds to its scores into the mask language: ``[B, 1, Q, KV]`` becomes ``causal & padding(m)``.

A mask that cannot be lifted is used as a tensor, so the result is exact in any case. The output of a query that sees no key is
zero, as in ``scaled_dot_product_attention`` with a boolean mask. A model that adds a large negative number instead gives such a
row (padding) the average of all values; the report says so.
"""

from __future__ import annotations

from functools import reduce

import sympy
import torch
from torch.fx import Node

from sparse_compile.masks import Mask, ScoreMod, bias, causal, clamped, full, scaled, sink_logits, softcap
from sparse_compile.masks.score_mods import in_order
from sparse_compile.passes.ir.attention import Attention, phase_of
from sparse_compile.passes.ir.fx_nodes import Order, expr_of, shape_of, sizes_of, value_of, writers
from sparse_compile.passes.ir.kv_source import Dense
from sparse_compile.passes.ir.left import Left
from sparse_compile.passes.ir.positions import Positions
from sparse_compile.passes.ir.score_steps import Add, Clamp, Hide, Scale, ScaleBy, Tanh
from sparse_compile.passes.ir.written_call import WrittenCall
from sparse_compile.passes.lift.pullback import Pullback
from sparse_compile.passes.lift.symbolic_element import (
    AXES,
    BATCH,
    HEAD,
    KEY,
    QUERY,
    All,
    Element,
    Negation,
    Number,
    Relation,
    Some,
    Sum,
    Value,
    Where,
    negation,
)
from sparse_compile.passes.lift.to_mask import NotLiftable, Words
from sparse_compile.passes.ops.block_tables import KV_START, Q_START

# Adding this or less to a score makes its weight zero. Models write -10000, -1e9, the smallest float or -inf.
HIDDEN = -1e4
# Numbers above this one may be reached by real scores.
WEAK = -1e6


def lift_call(call: WrittenCall, order: Order) -> Attention | Left:
    """Recover the mask, the score mod and the positions of a call, or return the reason why it cannot be lifted."""
    try:
        return _Lift(call, order).run()
    except NotLiftable as reason:
        return Left(call.node, str(reason))


class _Lift:
    """One call on its way into the language: what is added to its scores and what hides them, and the words for both."""

    def __init__(self, call: WrittenCall, order: Order) -> None:
        self.call, self.order, self.pull = call, order, Pullback()
        self.q_len, self.kv_len = call.q_len, call.kv_len
        self.scale, self.steps = self._steps()
        if call.attn_mask is not None:
            self.steps.append(call.attn_mask)
        conditions = [step for step in self.steps if isinstance(step, Hide)]
        self.values = [self._at_scores(step) for step in self.steps if isinstance(step, Node)]
        self.hidden = [self._at_scores(step) for step in conditions]
        self.positions = self._positions([*self.values, *self.hidden])
        self.words = Words(self.pull, self.positions, self.kv_len)
        self.fills = {step.fill for step in conditions}  # the numbers with which the model hides keys

    def run(self) -> Attention:
        call = self.call
        mask, mods = self._mask()
        if call.sink is not None:
            at_head = tuple(HEAD if s != 1 else sympy.Integer(0) for s in shape_of(call.sink) or ())
            mods.append(sink_logits(self.words.capture(Element(call.sink, at_head), (HEAD,))))
        # Attention that compares query and key positions is over one text, whatever its operands are projected from.
        of_one_text = call.is_self_attention or mask.implies(causal)
        kv = Dense(call.k, call.v)
        return Attention(
            node=call.node,
            q=call.q,
            kv=kv,
            scale=call.scale * self.scale,
            mask=mask,
            score_mod=in_order(tuple(mods)) if mods else None,
            positions=self.positions,
            phase=phase_of(call.q_len, kv, mask, is_self_attention=of_one_text),
            is_self_attention=of_one_text,
            sources=dict(self.words.sources),
            mask_nodes=call.mask_nodes,
            caveat=self._caveat(mask),
            unplaced=self._unplaced(),
        )

    def _caveat(self, mask: Mask) -> str:
        """For which queries or scores the call differs from the model, because the model hides keys with a number."""
        unseeing = self.call.unseeing
        outputs = {unseeing.finite if fill > -torch.inf else unseeing.infinite for fill in self.fills} - {"zeros"}
        caveats = []
        # Without a tensor, every query of a mask sees its own key. A learned sink takes the weight that no key gets.
        if outputs and mask.captures() and self.call.sink is None:
            caveats.append(f"a query that sees no key gets zeros, and in the model {' or '.join(sorted(outputs))}")
        if (weak := max(self.fills, default=-torch.inf)) > WEAK:
            caveats.append(f"keys with a score of {weak:g} get no weight, and in the model some if all scores are that low")
        return "; ".join(caveats)

    def _mask(self) -> tuple[Mask, list[ScoreMod]]:
        """What the terms and conditions show, and what is done to the scores, in order."""
        own: Mask = causal if self.call.is_causal else full
        mask, mods = own, list[ScoreMod]()
        values, hidden = iter(self.values), iter(self.hidden)
        for step in self.steps:
            if isinstance(step, Node):
                seen, added = self._term(step, next(values))
                mask, mods = mask & seen, mods + added
            elif isinstance(step, Hide):
                mask = mask & self._mask_or_explicit(step, next(hidden))
            elif mask != own:
                raise NotLiftable("scores are scaled, capped or clamped after keys were hidden: hide keys in the last step")
            else:
                mods.append(self._factor(step) if isinstance(step, ScaleBy) else step)
        return mask, mods

    def _factor(self, step: ScaleBy) -> ScoreMod:
        return scaled(self.words.capture(self._itself(step.node)), Q_START, KV_START)

    def _steps(self) -> tuple[float, list[ScoreMod | ScaleBy | Node | Hide]]:
        """The scale of the products, and all further steps: score mods, factors, added tensors and hiding conditions."""
        scale = 1.0
        done: list[ScoreMod | ScaleBy | Node | Hide] = []
        steps = list(self.call.score_steps)
        while steps:
            match steps.pop(0):
                case Scale(factor):
                    scale, done = (scale, [*done, scaled(factor)]) if done else (scale * factor, done)
                case Tanh():
                    following = steps[0] if steps else None
                    cap = following.factor if isinstance(following, Scale) and following.factor > 0 else 1.0
                    steps = steps[cap != 1 :]
                    if done and cap != 1:
                        done.append(scaled(cap))
                    scale = scale if done else scale * cap
                    done.append(softcap(cap))
                case Clamp(low, high):
                    done.append(clamped(low, high))
                case Add(node):
                    done.append(node)
                case ScaleBy() | Hide() as step:
                    done.append(step)
        return scale, done

    def _at_scores(self, node: Node | Hide) -> Value:
        """The element of a mask or bias at ``(b, h, i, j)``, broadcast to the scores. True means visible in a condition."""
        if isinstance(node, Hide):
            value = self._at_scores(node.node)
            return value if node.unless else negation(value)
        shape = shape_of(node)
        if shape is None or len(shape) > 4:
            raise NotLiftable(f"the mask {node.name} has shape {shape}, not that of scores [batch, heads, queries, keys]")
        batch, heads, *_ = sizes_of(self.call.q)
        return self.pull.operand(node, AXES, (batch, heads, self.q_len, self.kv_len))

    # -- positions --------------------------------------------------------------------------------------------------

    def _positions(self, values: list[Value]) -> Positions:
        """The positions of queries and keys, from the first comparison of a query with a key, or from the lengths."""
        for relation in _relations(values):
            positions = self._compared(relation)
            if positions is not None:
                return positions
        if self.call.is_self_attention and not self.call.is_causal:
            return Positions(q_start=sympy.expand(expr_of(self.kv_len) - expr_of(self.q_len)))
        return Positions()

    def _unplaced(self) -> str:
        """Why the positions of queries or keys are not known; "" if they are.

        Without a comparison of the two, the queries are taken for the last keys. They need not be in a buffer that is longer
        than the text.
        """
        if self.call.in_parts:
            return "its queries and keys have five axes, so they may be parts of a text"
        compared = any(self._compared(relation) for relation in _relations([*self.values, *self.hidden]))
        if compared or self.call.is_causal or expr_of(self.q_len) == expr_of(self.kv_len) or not writers(self.call.k):
            return ""
        return (
            "its keys are in a buffer that this graph fills, and its mask is made outside of the graph, so it is not known "
            "which keys are those of the queries: pass a mask [batch, keys], or a SparseCache"
        )

    def _compared(self, relation: Relation) -> Positions | None:
        """Positions from ``kv_start + j <= q_start + i``, the only comparison from which both starts can be read; else None."""
        gap = relation.gap
        if relation.equal or sympy.expand(gap - QUERY + KEY).has(QUERY, KEY, BATCH):
            return None
        rest = sympy.expand(gap - QUERY + KEY)
        if rest.is_Integer and rest != 0 and expr_of(self.q_len) == expr_of(self.kv_len):
            return None  # with as many queries as keys, j <= i + 2 is a window that looks ahead, not an offset
        q_start, kv_start, shift = sympy.Integer(0), sympy.Integer(0), None
        for term in sympy.Add.make_args(rest):
            node = self.pull.atoms.node(term)
            if node is not None and not term.args and shift is None:
                shift = node
            elif self.pull.atoms.node(-term) is not None or node is not None:
                return None
            elif term.could_extract_minus_sign():
                kv_start -= term
            else:
                q_start += term
        return Positions(q_start, kv_start, shift)

    # -- terms ------------------------------------------------------------------------------------------------------

    def _term(self, node: Node, value: Value) -> tuple[Mask, list[ScoreMod]]:
        """The mask and the biases of a tensor that is added to the scores, or of a bool mask."""
        if value_of(node).dtype == torch.bool:
            return self._mask_or_explicit(node, value), []
        mask: Mask = full
        biases: list[ScoreMod] = []
        fills = set(self.fills)
        try:
            for part in value.parts if isinstance(value, Sum) else (value,):
                seen, added = self._float_part(node, part, whole=part is value)
                mask = mask & seen
                biases += added
        except NotLiftable:
            self.fills = fills
            return self._float_part(node, self._itself(node), whole=True)
        return mask, biases

    def _float_part(self, node: Node, value: Value, *, whole: bool) -> tuple[Mask, list[ScoreMod]]:
        if isinstance(value, Number) and value.expr == 0:
            return full, []
        if isinstance(value, Where):
            for shown, other, condition in (
                (value.yes, value.no, value.condition),
                (value.no, value.yes, negation(value.condition)),
            ):
                if isinstance(other, Number) and other.expr.is_number and other.expr <= HIDDEN:
                    try:
                        mask = self.words.mask(condition)
                    except NotLiftable:
                        break
                    self.fills.add(float(other.expr))
                    more, biases = self._float_part(node, shown, whole=False)
                    return mask & more, biases
        if isinstance(value, Element) and all(x == 0 or x in AXES for x in value.index):
            return full, [bias(self.words.capture(value), Q_START, KV_START)]
        if whole:
            return full, [bias(self.words.capture(self._itself(node)), Q_START, KV_START)]
        raise NotLiftable(f"a part of the bias {node.name} cannot be expressed as a mask or a bias")

    def _itself(self, node: Node) -> Element:
        """A mask or bias as a plain tensor, indexed by the axes that it has."""
        shape = shape_of(node)
        assert shape is not None
        index = AXES[4 - len(shape) :]
        return Element(node, tuple(sympy.Integer(0) if s == 1 else x for s, x in zip(shape, index, strict=True)))

    def _mask_or_explicit(self, node: Node | Hide, value: Value) -> Mask:
        """The lifted mask. If only parts can be lifted, those parts and the tensor itself; if none can, the tensor alone."""
        try:
            return self.words.mask(value)
        except NotLiftable:
            pass
        tensor = node.node if isinstance(node, Hide) else node
        itself = self.words.explicit(self._itself(tensor))
        whole = ~itself if isinstance(node, Hide) and not node.unless else itself
        lifted = []
        for part in value.parts if isinstance(value, All) else ():
            try:
                lifted.append(self.words.mask(part))
            except NotLiftable:
                continue
        return reduce(lambda a, b: a & b, [*lifted, whole])


def _relations(values: list[Value]) -> list[Relation]:
    """All comparisons inside ``values``."""
    relations: list[Relation] = []
    for value in values:
        if isinstance(value, Relation):
            relations.append(value)
        elif isinstance(value, All | Some | Sum):
            relations += _relations(list(value.parts))
        elif isinstance(value, Negation):
            relations += _relations([value.part])
        elif isinstance(value, Where):
            relations += _relations([value.condition, value.yes, value.no])
    return relations
