"""Batching of every primitive: a mapped axis is folded into the axes that operands have already.

Queries and everything that is small fold into the batch. Keys, values and caches are never copied
where that can be helped: unmapped they stay, and rows find them by an index.
"""

import dataclasses
import enum
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax


class Kind(enum.Enum):
    """How an operand or result behaves when a mapped axis of size V is folded into it."""

    ROW = enum.auto()  # [B, ...]: always brought to the full batch
    KEYS = enum.auto()  # [B_x, ...], B_x divides B: stays as it is when unmapped
    TOKENS = enum.auto()  # [total, ...] of queries: lanes are concatenated
    TOKENS_1 = enum.auto()  # [N, total, 1]: the same along axis 1
    PACKED_KEYS = enum.auto()  # [total_k, ...]: concatenated when mapped, stays when not
    PACKED_KEYS_1 = enum.auto()  # [K, total_k | 1, G]
    CACHE = enum.auto()  # [X, ...]: lanes become further rows when mapped, stays when not
    Q_START = enum.auto()  # [B] into TOKENS
    K_START = enum.auto()  # [B] into PACKED_KEYS
    ROW_MAP = enum.auto()  # [B] rows of a CACHE
    PAGE_MAP = enum.auto()  # [B, max_pages] pages of a CACHE
    LAYER = enum.auto()  # [1] or [B]
    TABLE = enum.auto()  # no batch at all (cos, sin)


@dataclasses.dataclass(frozen=True)
class Operation:
    """A primitive as data."""

    name: str
    operands: dict[str, Kind]
    results: tuple[Kind, ...]
    abstract_eval: Callable  # (operands by name, static) -> avals
    batch: str  # the operand whose axis 0 is B
    aliases: dict[int, int] = dataclasses.field(default_factory=dict)


def batch(op, p, args, axes, **static):
    """The batching rule of primitive p."""
    size = next(x.shape[axis] for x, axis in zip(args, axes) if axis is not None)
    if size == 0:
        return _no_lanes(p, args, axes, static)
    if any(
        axis is not None for kind, axis in zip(op.operands.values(), axes) if kind is Kind.TABLE
    ):
        return _loop(p, size, args, axes, static)
    fold = _Fold(op, size, args, axes, static)
    outs = p.bind(*(fold(name) for name in op.operands), **fold.static)
    unfolded = [fold.unfold(i, x) for i, x in enumerate(outs)]
    return [x for x, _ in unfolded], [axis for _, axis in unfolded]


def _no_lanes(p, args, axes, static):
    lane = (
        jax.ShapeDtypeStruct([n for i, n in enumerate(x.shape) if i != axis], x.dtype)
        for x, axis in zip(args, axes)
    )
    outs = jax.eval_shape(functools.partial(p.bind, **static), *lane)
    return [jnp.zeros((0, *x.shape), x.dtype) for x in outs], [0] * len(outs)


def _loop(p, size, args, axes, static):
    """Lane by lane: rotary tables that differ between lanes have no axis to fold into."""
    lanes = []
    for lane in range(size):
        one = (
            x if axis is None else lax.index_in_dim(x, lane, axis, keepdims=False)
            for x, axis in zip(args, axes)
        )  # fmt: skip
        lanes.append(p.bind(*one, **static))
    return [jnp.stack(x) for x in zip(*lanes)], [0] * len(lanes[0])


class _Fold:
    """How the operands of one call fold.

    A query row b of lane v becomes row `(r * V + v) * period + c` with `b = r * period + c`, where
    `period` is the batch of the mapped keys: they become `[V * period, ...]` and are still read at
    `row % rows`, as are unmapped keys whose batch divides the period.
    """

    def __init__(self, op, size, args, axes, static):
        self.op, self.size = op, size
        self.args = dict(zip(op.operands, args))
        self.axes = dict(zip(op.operands, axes))
        self.batch = self._shape(op.batch)[0]
        self.period = self._period()
        kinds = set(op.operands.values())
        keys = {Kind.PACKED_KEYS, Kind.PACKED_KEYS_1} & kinds
        # gradients of packed keys are formed lane by lane
        self.keys_folded = self._any_mapped(keys) or Kind.PACKED_KEYS in op.results
        self.cache_folded = self._any_mapped({Kind.CACHE}) or Kind.CACHE in op.results
        self.static = dict(static)
        self.row_limit = static.get("row_limit")
        if self.cache_folded and self.row_limit is not None:
            self.static["row_limit"] = size * self._shape("k")[0]

    def _shape(self, name):
        shape, axis = self.args[name].shape, self.axes[name]
        return shape if axis is None else (*shape[:axis], *shape[axis + 1 :])

    def _is_absent(self, name):
        return self._shape(name) == (0,)

    def _any_mapped(self, kinds):
        return any(
            self.axes[name] is not None and kind in kinds for name, kind in self.op.operands.items()
        )

    def _period(self):
        names = [
            name
            for name, kind in self.op.operands.items()
            if kind is Kind.KEYS and not self._is_absent(name)
        ]
        mapped = [self._shape(name)[0] for name in names if self.axes[name] is not None]
        period = max(mapped, default=self.batch)
        fits = all(period % self._shape(name)[0] == 0 for name in names)
        return period if fits else self.batch

    def _lanes(self, name, to=0):
        """The operand with an axis of all lanes at position `to`."""
        x, axis = self.args[name], self.axes[name]
        if axis is not None:
            return jnp.moveaxis(x, axis, to)
        return jnp.broadcast_to(jnp.expand_dims(x, to), (*x.shape[:to], self.size, *x.shape[to:]))

    def _merge(self, x, at=0):
        """[.., V, n, ..] to [.., V * n, ..]."""
        return x.reshape(*x.shape[:at], x.shape[at] * x.shape[at + 1], *x.shape[at + 2 :])

    def _offset(self, count):
        """`[V, 1]`: what each lane adds to an index into `count` things."""
        return (jnp.arange(self.size, dtype=jnp.int32) * count)[:, None]

    def __call__(self, name):
        """The operand as it is bound."""
        kind = self.op.operands[name]
        implicit_rows = kind is Kind.ROW_MAP and self.cache_folded and self._is_absent("page_table")
        if kind is Kind.TABLE or (self._is_absent(name) and not implicit_rows):
            x = self.args[name]
            return x if self.axes[name] is None else jnp.zeros((0,), x.dtype)
        return getattr(self, f"_{kind.name.lower()}")(name)

    def _row(self, name):
        x = self._lanes(name)
        if self.period != self.batch:
            x = x.reshape(self.size, -1, self.period, *x.shape[2:])
            x = jnp.moveaxis(x, 0, 1)
            x = self._merge(x)
        return self._merge(x)

    def _keys(self, name):
        if self.axes[name] is None:
            return self.args[name]
        x = self._lanes(name)
        repeats = self.period // x.shape[1]
        if repeats > 1:  # no order of rows serves every operand: this one is copied
            x = jnp.tile(x, (1, repeats, *[1] * (x.ndim - 2)))
        return self._merge(x)

    def _tokens(self, name):
        return self._merge(self._lanes(name))

    def _tokens_1(self, name):
        return self._merge(self._lanes(name, 1), 1)

    def _packed_keys(self, name):
        return self._merge(self._lanes(name)) if self.keys_folded else self.args[name]

    def _packed_keys_1(self, name):
        if not self.keys_folded or (self.axes[name] is None and self._shape(name)[1] == 1):
            return self.args[name]
        x = self._lanes(name, 1)
        total = self._shape("k")[0]
        x = jnp.broadcast_to(x, (*x.shape[:2], total, *x.shape[3:]))
        return self._merge(x, 1)

    def _cache(self, name):
        rows = self._shape("k")[0]
        if not self._is_cache_folded(name):
            return self.args[name]
        x = self._lanes(name)
        return self._merge(jnp.broadcast_to(x, (self.size, rows, *x.shape[2:])))

    def _is_cache_folded(self, name):
        shared = self.axes[name] is None and self._shape(name)[0] == 1 < self._shape("k")[0]
        return self.cache_folded and not shared and not self._is_absent(name)

    def _q_start(self, name):
        first = next(n for n, kind in self.op.operands.items() if kind is Kind.TOKENS)
        return (self._lanes(name) + self._offset(self._shape(first)[0])).reshape(-1)

    def _k_start(self, name):
        x = self._lanes(name)
        if self.keys_folded:
            x = x + self._offset(self._shape("k")[0])
        return x.reshape(-1)

    def _row_map(self, name):
        if self._is_absent(name):
            rows = jnp.arange(self.batch, dtype=jnp.int32) % self.static["layer_stride"]
            rows = jnp.broadcast_to(rows[None], (self.size, self.batch))
        else:
            rows = self._lanes(name)
        return self._shift(rows).reshape(-1)

    def _shift(self, index):
        """An index into the cache's rows as one into those of all lanes; invalid ones become -1."""
        if not self.cache_folded:
            return index
        offset = self._offset(self._shape("k")[0])
        shifted = index + offset.reshape(-1, *[1] * (index.ndim - 1))
        if self.row_limit is None:
            return shifted
        return jnp.where((index >= 0) & (index < self.row_limit), shifted, -1)

    def _page_map(self, name):
        return self._merge(self._shift(self._lanes(name)))

    def _layer(self, name):
        if self.axes[name] is None and self._shape(name) == (1,):
            return self.args[name]
        x = self._lanes(name)
        return jnp.broadcast_to(x, (self.size, self.batch)).reshape(-1)

    def unfold(self, i, x):
        """Result i with its mapped axis, and where that is."""
        kind = self.op.results[i]
        if x.shape == (0,):
            return x, None
        if kind is Kind.TOKENS_1:
            return self._split(x, 1, self.size), 1
        if kind is Kind.CACHE and not self._is_cache_folded(list(self.op.operands)[i]):
            return x, None
        if kind is not Kind.ROW or self.period == self.batch:
            return self._split(x, 0, self.size), 0
        x = self._split(self._split(x, 0, self.batch // self.period), 1, self.size)
        return self._merge(jnp.moveaxis(x, 1, 0), 1), 0

    def _split(self, x, at, count):
        """[.., V * n, ..] to [.., V, n, ..]."""
        return x.reshape(*x.shape[:at], count, x.shape[at] // count, *x.shape[at + 1 :])
