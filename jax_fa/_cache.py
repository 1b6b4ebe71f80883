"""Key/value caches as pytrees: contiguous rows or pages of a pool, plain or quantized."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from . import _checks, _primitives, _rotary, _sharding
from ._decode import cache_maps, cache_operands
from ._quantize import QuantizedArray, check_dtype, groups_of, is_quantized_dtype


class _Cache:
    """What both caches share."""

    @property
    def _layers(self):
        return self.k.shape[0] if self.k.ndim == 5 else None

    def append(
        self, k, v, counts=None, layer=None, rotary=None, *, interleaved=False, batch_index=None,
        cu_seqlens=None, implementation=None,
    ):  # fmt: skip
        """Writes new tokens behind those that each row has.

        In place where the cache is donated or carried by a loop; the caller's arrays never change.
        Tokens past a row's capacity, and pages outside the pool, are dropped.

        Args:
          k: New keys `[B, T, K, H]`, or with `cu_seqlens` packed `[total, K, H]`; of any float
            dtype: they are cast or quantized to the cache's.
          v: New values, as k.
          counts: int32 `[B]`: how many of its T tokens each row appends; all if None.
          layer: int32 scalar, for a cache with layers: its k and v are written and `lengths` stays,
            to be moved by `advance` at the end of the step.
          rotary: None, or `(cos, sin)`, each `[max_position, R / 2]`: rotates the keys, each at its
            position in the cache, before they are quantized.
          interleaved: As in `apply_rotary`.
          batch_index: int32 `[B]`: the row of the cache of each new row; row b if None.
          cu_seqlens: int32 `[B + 1]`: where each row's tokens begin in packed k and v.
          implementation: As for `flash_attention`.

        Returns:
          The new cache; `lengths` grow by `counts` and stop at the capacity, without `layer`.

        Raises:
          ValueError: for shapes or dtypes that do not fit, and past capacity where lengths and
            counts are concrete.
        """
        k, v = jnp.asarray(k), jnp.asarray(v)
        packed = cu_seqlens is not None
        if packed:
            cu_seqlens = _checks.cu_seqlens("cu_seqlens", cu_seqlens)
            batch = cu_seqlens.shape[0] - 1
            lead, form = (None,), "[total, "
        else:
            lead, form = (None, None), "[B, T, "
        heads, dim = self.k.shape[-2:]
        dim_v = self.v.shape[-1]
        _checks.shape("k", k, (*lead, heads, dim), form=f"{form}{heads}, {dim}]")
        _checks.queries("k", k, k.ndim, form)
        _checks.shape("v", v, (*k.shape[:-1], dim_v), form=f"{[*k.shape[:-1], dim_v]} as k")
        if v.dtype != k.dtype:
            raise ValueError(f"v must have the dtype of k, {k.dtype.name}, got {v.dtype.name}")
        if not packed:
            batch = k.shape[0]
        form = f"[{batch}]"
        counts = _checks.int32("counts", counts, (batch,), form=form)
        if packed:
            if counts is not None:
                raise ValueError("counts must be None with cu_seqlens, which gives them")
            _checks.starts("cu_seqlens", cu_seqlens, k.shape[0])
            counts = cu_seqlens[1:] - cu_seqlens[:-1]
        if (layer is None) != (self._layers is None):
            raise ValueError(f"layer must be given for a cache with layers only, got {layer=}")
        batch_index = _checks.int32("batch_index", batch_index, (batch,), form=form)
        if batch_index is None and batch != self.lengths.shape[0]:
            raise ValueError(
                f"k must have the {self.lengths.shape[0]} rows of the cache without batch_index, "
                f"got {batch}"
            )
        table = getattr(self, "page_table", None)
        lengths, table, rows = self._rows(batch_index, table)
        if not packed:
            _checks.counts(counts, k.shape[1])
        added = k.shape[1] if counts is None else counts
        self._check_room(lengths, added)
        layer_stride = self.k.shape[-4]
        operands = {
            "k": self.k,
            "v": self.v,
            "k_new": k,
            "v_new": v,
            "new_start": cu_seqlens[:-1] if packed else None,
            "counts": counts,
            "lengths": lengths,
            **cache_maps(self.k, batch, table, rows, layer),
        }
        if rotary is not None:
            cos, sin = (jnp.asarray(x) for x in rotary)
            _rotary.check_tables(cos, sin, dim)
            dtype = _rotary.at_least_float32(k.dtype)
            operands |= {"cos": cos.astype(dtype), "sin": sin.astype(dtype)}
        new_k, new_v = self._bind(operands, layer_stride, interleaved, implementation)
        cache = dataclasses.replace(self, k=new_k, v=new_v)
        return cache if layer is not None else cache.advance(added, batch_index)

    def _rows(self, batch_index, table):
        """Lengths, page table and row map `[B]` of the rows that are appended to.

        Tokens for a row outside the cache are dropped, as those for a page outside the pool are.
        """
        lengths = jnp.asarray(self.lengths)
        if batch_index is None:
            return lengths, table, None
        lengths = self._at(lengths, batch_index, 0)
        if table is None:
            return lengths, None, batch_index
        return lengths, self._at(jnp.asarray(table), batch_index, -1), None

    def _at(self, x, batch_index, fill):
        """Rows of x, `fill` for those outside."""

        def call(operands):
            x, batch_index = operands
            return (x.at[self._inside(batch_index)].get(mode="fill", fill_value=fill),)

        axes = "BM"[: x.ndim]
        (out,) = _sharding.run(call, (x, batch_index), x, axes, ["R" + axes[1:]])
        return out

    def _inside(self, batch_index):
        """Indices with those below 0 moved out of bounds, where they do not wrap."""
        return jnp.where(batch_index < 0, self.lengths.shape[0], batch_index)

    def advance(self, counts, batch_index=None):
        """The cache with `lengths` grown by `counts` (int32 `[B]` or an int), up to capacity."""
        lengths, counts = jnp.asarray(self.lengths), jnp.asarray(counts, jnp.int32)
        if batch_index is None:
            lengths = lengths + counts
        else:
            batch_index = _checks.int32("batch_index", batch_index, (None,), form="[B]")

            def add(operands):
                lengths, batch_index, counts = operands
                return (lengths.at[self._inside(batch_index)].add(counts, mode="drop"),)

            operands = lengths, batch_index, counts
            (lengths,) = _sharding.run(add, operands, lengths, "B", ["B"])
        return dataclasses.replace(self, lengths=jnp.minimum(lengths, self.capacity))

    def _check_room(self, lengths, added):
        lengths, added = _checks.known(lengths), _checks.known(added)
        if lengths is None or added is None:
            return
        most = int((lengths + added).max(initial=0))
        if most > self.capacity:
            raise ValueError(f"rows must not grow past capacity {self.capacity}, got {most}")

    def _has_given_scales(self):
        """Whether scales stay as they are: those that tokens share do not follow a new one."""
        scaled = [x for x in (self.k, self.v) if getattr(x, "scale", None) is not None]
        shared = {x.scale.shape[-2] < x.values.shape[-3] for x in scaled}
        if len(shared) > 1:
            have = " and ".join(str(tuple(x.scale.shape)) for x in scaled)
            raise ValueError(f"scales of k and v must both be shared by tokens, or neither: {have}")
        return self.granularity == "tensor" or True in shared

    def _bind(self, operands, layer_stride, interleaved, implementation):
        """Appends; returns k and v in the form that they have in the cache."""
        given = self._has_given_scales()

        def call(operands):
            old_k, old_v = operands["k"], operands["v"]
            operands = cache_operands(operands)
            for name in ("k_new", "v_new"):
                x = operands[name]
                operands[name] = x.reshape(math.prod(x.shape[:-2]), *x.shape[-2:])
            k, v, k_scale, v_scale = _primitives.bind(
                "jax_fa_append",
                operands,
                layer_stride=layer_stride,
                row_limit=layer_stride,
                interleaved=bool(interleaved),
                implementation=_checks.implementation(implementation),
                scale_given=given,
            )
            new = (_restore(old_k, k, k_scale, given), _restore(old_v, v, v_scale, given))
            return tuple(jax.tree.leaves(new))

        like = jax.tree.leaves(self.k)[0]
        axes = "LXSKH"[-like.ndim :]
        results = [*_axes(self.k), *_axes(self.v)]
        new = _sharding.run(call, operands, like, axes, results)
        return jax.tree.unflatten(jax.tree.structure((self.k, self.v)), new)


def _axes(cache):
    """Letters of the axes of a cache's arrays; "1" for those of size 1, which are never sharded."""

    def letters(x, names):
        names = names[-x.ndim :]
        return "".join(name if size > 1 else "1" for name, size in zip(names, x.shape))

    if not isinstance(cache, QuantizedArray):
        return [letters(cache, "LXSKH")]
    scale = [] if cache.scale is None else [letters(cache.scale, "LXKSG")]
    return [letters(cache.values, "LXSKH"), *scale]


def _restore(old, values, scale, given):
    """Results of the primitive with axes for layers and rows, as in the cache."""
    if not isinstance(old, QuantizedArray):
        return values.reshape(old.shape)
    fresh = old.scale is not None and not given
    scale = scale.reshape(old.scale.shape) if fresh else old.scale
    return QuantizedArray(values.reshape(old.shape), scale)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache(_Cache):
    """A contiguous cache: row b holds its tokens at the positions below `lengths[b]`.

    Attributes:
      k: `[B, S, K, H]`, or `[L, B, S, K, H]` with layers; an array or a `QuantizedArray`.
      v: As k.
      lengths: int32 `[B]`: tokens in each row.
      granularity: What shares a scale in a quantized cache. Scales that tokens share stay as they
        are when others come.
    """

    k: jax.Array | QuantizedArray
    v: jax.Array | QuantizedArray
    lengths: jax.Array
    granularity: str | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def capacity(self):
        """Tokens that a row can hold."""
        return self.k.shape[-3]

    @staticmethod
    def create(
        batch, max_length, kv_heads, head_dim, *, layers=None, dtype, v_dtype=None,
        granularity="head", group_size=None, k_scale=None, v_scale=None,
    ):  # fmt: skip
        """An empty cache.

        Args:
          batch: Rows B.
          max_length: Tokens S that a row can hold.
          kv_heads: Heads K.
          head_dim: Dim H of a head.
          layers: None, or L: one more axis in front, for models that scan over layers.
          dtype: Of the keys: a float dtype, or int8, float8_e4m3fn, float8_e5m2.
          v_dtype: Of the values; that of the keys if None.
          granularity: What shares a scale in a quantized cache, as in `quantize`.
          group_size: Elements in a group, for "group".
          k_scale: The scale of the keys, a float32 scalar, which "tensor" needs.
          v_scale: Likewise of the values.

        Raises:
          ValueError: for sizes, dtypes or granularities that do not fit.
        """
        k, v, granularity = _allocate(
            batch, max_length, kv_heads, head_dim, layers, dtype, v_dtype, granularity, group_size,
            k_scale, v_scale,
        )  # fmt: skip
        return KVCache(k, v, jnp.zeros((batch,), jnp.int32), granularity)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedKVCache(_Cache):
    """A cache in pages of a shared pool: key j of row b is token `j % page` of page
    `page_table[b, j // page]`.

    Attributes:
      k: `[P, page, K, H]`, or `[L, P, page, K, H]` with layers; an array or a `QuantizedArray`.
      v: As k.
      lengths: int32 `[B]`: tokens in each row.
      page_table: int32 `[B, max_pages]`; -1 for no page. Who fills it is the caller:
        `dataclasses.replace(cache, page_table=...)`.
      granularity: What shares a scale in a quantized cache. Scales that tokens share stay as they
        are when others come.
    """

    k: jax.Array | QuantizedArray
    v: jax.Array | QuantizedArray
    lengths: jax.Array
    page_table: jax.Array
    granularity: str | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def capacity(self):
        """Tokens that a row's part of the table can address."""
        return self.k.shape[-3] * self.page_table.shape[1]

    @staticmethod
    def create(
        num_pages, page_size, batch, max_pages, kv_heads, head_dim, *, layers=None, dtype,
        v_dtype=None, granularity="head", group_size=None, k_scale=None, v_scale=None,
    ):  # fmt: skip
        """An empty pool and table.

        Args:
          num_pages: Pages P of the pool, of each layer.
          page_size: Tokens of a page.
          batch: Rows B.
          max_pages: Pages that a row can hold.
          kv_heads, head_dim, layers, dtype, v_dtype, granularity, group_size, k_scale, v_scale: As
            for `KVCache.create`.

        Raises:
          ValueError: for sizes, dtypes or granularities that do not fit.
        """
        k, v, granularity = _allocate(
            num_pages, page_size, kv_heads, head_dim, layers, dtype, v_dtype, granularity,
            group_size, k_scale, v_scale,
        )  # fmt: skip
        table = jnp.full((batch, max_pages), -1, jnp.int32)
        return PagedKVCache(k, v, jnp.zeros((batch,), jnp.int32), table, granularity)


def _allocate(
    rows, tokens, heads, dim, layers, dtype, v_dtype, granularity, group_size, k_scale, v_scale
):
    """k and v of an empty cache, and the granularity that its scales have."""
    sizes = {"rows or pages": rows, "tokens": tokens, "heads": heads, "head_dim": dim}
    for name, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"{name} of a cache must be a positive int, got {size!r}")
    lead = () if layers is None else (layers,)
    v_dtype = dtype if v_dtype is None else v_dtype
    if not (is_quantized_dtype(dtype) or is_quantized_dtype(v_dtype)):
        granularity = None

    def one(dtype, scale, name):
        dtype = jnp.dtype(dtype)
        if not is_quantized_dtype(dtype):
            if dtype.name not in _checks.FLOATS:
                check_dtype(dtype)
            return jnp.zeros((*lead, rows, tokens, heads, dim), dtype)
        groups = groups_of(dtype, granularity, group_size, dim)
        values = jnp.zeros((*lead, rows, tokens, heads, dim), dtype)
        if groups == 0:
            return QuantizedArray(values, None)
        if granularity == "tensor":
            if scale is None:
                raise ValueError(f"{name}_scale must be given for granularity='tensor', got None")
            scale = jnp.asarray(scale, jnp.float32).reshape((1,) * values.ndim)
            return QuantizedArray(values, scale)
        if scale is not None:
            raise ValueError(f"{name}_scale must be None for {granularity=}, got {scale}")
        shape = (*lead, rows, 1 if granularity == "token" else heads, tokens, groups)
        return QuantizedArray(values, jnp.ones(shape, jnp.float32))

    return one(dtype, k_scale, "k"), one(v_dtype, v_scale, "v"), granularity
