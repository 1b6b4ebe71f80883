"""The shapes that are measured, by operation and grid.

`seeds` are the five sweeps of the projects that this one follows, `design` the grids of
DESIGN.md section 5, `features` what those leave out, `quick` a handful for smoke tests.
"""

import dataclasses
import functools

import numpy as np

GRIDS = ("seeds", "design", "features", "quick")


@dataclasses.dataclass(frozen=True)
class Case:
    """One shape: `batch` rows of `len_q` queries over `len_kv` keys.

    Attributes:
      sweep: The chart that it belongs to.
      axis: What that chart's axis shows; empty for a list of shapes without an order.
      x: Where on that axis; a label where there is no order.
      decode_rows: Hybrid: how many rows, the first ones, have one query over `len_kv` keys; the
        others have `len_q` queries over `prefill_kv` keys.
      prefill_kv: Keys of those others.
      values_dim: Head dim of values; None: that of keys.
      shortest: Rows' lengths are drawn from `shortest` to `len_kv` (prefill: queries and keys
        alike); 0: all are full.
      page_size: Tokens of a page, where an implementation is paged.
      backward: Whether gradients are measured too.
    """

    sweep: str
    axis: str
    x: int | str
    batch: int
    len_q: int
    len_kv: int
    heads_q: int = 32
    heads_kv: int = 32
    head_dim: int = 128
    dtype: str = "bfloat16"
    causal: bool = False
    window: int | None = None
    softcap: float | None = None
    alibi: bool = False
    dropout: float = 0.0
    decode_rows: int = 0
    prefill_kv: int = 0
    shortest: int = 0
    page_size: int = 16
    backward: bool = False
    values_dim: int | None = None

    @property
    def head_dims(self):
        """Of a key and its value together."""
        return self.head_dim + (self.values_dim or self.head_dim)

    @property
    def id(self):
        name = f"{self.sweep}{'_backward' * self.backward}-{self.axis[:1]}{self.x}"
        return name.replace(" ", "_")

    @property
    def ragged(self):
        return self.shortest > 0

    @property
    def itemsize(self):
        return 4 if self.dtype == "float32" else 2

    @functools.cached_property
    def rows(self):
        """[B, 2]: each row's number of queries and of keys."""
        if self.decode_rows or self.prefill_kv:
            rows = [(1, self.len_kv)] * self.decode_rows
            rows += [(self.len_q, self.prefill_kv)] * (self.batch - self.decode_rows)
            return np.array(rows)
        if not self.ragged:
            return np.array([(self.len_q, self.len_kv)] * self.batch)
        drawn = np.random.default_rng(0).integers(self.shortest, self.len_kv + 1, self.batch)
        return np.stack([np.minimum(drawn, self.len_q), drawn], axis=1)

    @property
    def flops(self):
        """Of the matrix products over visible pairs: two forward, five more backward."""
        pairs = sum(_visible(q, kv, self.causal, self.window) for q, kv in self.rows)
        return (7 if self.backward else 2) * pairs * self.heads_q * self.head_dims

    def bytes(self, kv_bytes=None, scales=0):
        """Of what must be read and written once.

        Args:
          kv_bytes: Bytes of one element of the keys and values; those of the queries if None.
          scales: float32 scales of one head of one token.
        """
        size = self.itemsize
        queries, keys = self.rows.sum(0)
        kv_bytes = size if kv_bytes is None else kv_bytes
        kv_row = self.heads_kv * (self.head_dims * kv_bytes + 2 * 4 * scales)
        moved = queries * self.heads_q * self.head_dims * size + keys * kv_row
        return float(moved * (2 if self.backward else 1))  # dout, dq, dk, dv

    def bytes_appended(self, kv_bytes=None, scales=0):
        """Of `len_q` new tokens a row, read in the queries' dtype and written in the cache's."""
        size = self.itemsize
        kv_bytes = size if kv_bytes is None else kv_bytes
        per_head = 2 * (self.head_dim * (size + kv_bytes) + 4 * scales)
        return float(self.batch * self.len_q * self.heads_kv * per_head)


def _visible(len_q, len_kv, causal, window):
    """Pairs of a query and a key that it sees, aligned bottom-right."""
    if not causal:
        return int(len_q) * int(len_kv)
    last = np.arange(len_q, dtype=np.int64) + len_kv - len_q
    seen = last + 1 if window is None else np.minimum(last + 1, window + 1)
    return int(np.maximum(seen, 0).sum())


def cases(operation, grids, gpu, backward=False):
    """The cases of an operation in the named grids.

    Args:
      operation: "prefill", "decode", "hybrid", "quantized", "append".
      grids: Names out of GRIDS.
      gpu: Whether there is one: `quick` has small shapes without.
      backward: Whether prefill's forward and backward grid is wanted too.
    """
    found = []
    for grid in grids:
        if grid == "quick":
            found += [c for c in _quick(gpu) if c.sweep.split("_")[1] == operation]
        elif builder := _BUILDERS.get((operation, grid)):
            found += builder()
    if backward and operation == "prefill":
        found += _quick_backward(gpu) if grids == ["quick"] else _backward()
    return found


_SEQ = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 3072, 4096, 5120, 6144, 7168, 8192)
_BATCH = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 768, 1024, 1536, 2048)


def _seeds(len_q):
    def make(name, causal):
        seq = [
            Case(f"{name}_seq", "T", n, 1, len_q or n, n, dtype="float16", causal=causal)
            for n in _SEQ
        ]
        batch = [
            Case(f"{name}_batch", "B", b, b, len_q or 128, 128, dtype="float16", causal=causal)
            for b in _BATCH
        ]
        return seq + batch

    return make


def _prefill_seeds():
    return _seeds(None)("prefill", True)


def _decode_seeds():
    return _seeds(1)("decode", True)


def _hybrid_seeds():
    return [
        Case("hybrid", "prefill %", share, 100, 128, 128, dtype="float16", causal=True,
             decode_rows=100 - share, prefill_kv=128)
        for share in range(0, 101, 10)
    ]  # fmt: skip


def _square(sweep, len_q, head_dim, **options):
    """B*T = 16384 and N*H = 2048 unless said otherwise."""
    heads = 2048 // head_dim
    options = {"heads_q": heads, "heads_kv": heads} | options
    return Case(sweep, "T", len_q, 16384 // len_q, len_q, len_q, head_dim=head_dim, **options)


def _prefill_design():
    return [
        _square(f"prefill_h{dim}_{'causal' if causal else 'full'}", n, dim, causal=causal)
        for dim in (64, 128, 256)
        for causal in (False, True)
        for n in (512, 1024, 2048, 4096, 8192, 16384)
    ]


def _backward():
    return [
        _square(f"prefill_h{dim}_{'causal' if causal else 'full'}", n, dim, causal=causal,
                backward=True)
        for dim in (64, 128, 256)
        for causal in (False, True)
        for n in ((512, 1024, 2048, 4096, 8192, 16384) if dim < 256 else (2048, 8192, 16384))
    ] + _feature_table(backward=True)  # fmt: skip


# batch, keys, query heads, key heads: DESIGN section 5
_DECODE = (
    (128, 4096, 32, 32), (128, 2048, 32, 32), (128, 512, 32, 32), (128, 256, 32, 32),
    (128, 128, 32, 32), (64, 8192, 32, 8), (16, 32768, 32, 8), (1, 131072, 32, 8), (8, 4096, 64, 8),
    (1, 4096, 32, 32), (128, 1024, 32, 1), (16, 128, 32, 32), (1, 128, 32, 32),
)  # fmt: skip


def _cached(sweep, batch, len_kv, heads_q, heads_kv, label="", len_q=1, **options):
    x = label or f"{batch}x{len_kv},{heads_q}:{heads_kv}"
    return Case(
        sweep, "", x, batch, len_q, len_kv, heads_q=heads_q, heads_kv=heads_kv, causal=True,
        **options,
    )  # fmt: skip


def _decode_design():
    return [_cached("decode_table", *shape) for shape in _DECODE]


def _quantized_design():
    """Rows past 256 MB of bf16 cache, and those of G = 4, 8, 32."""
    shapes = [s for s in _DECODE if s[0] * s[1] * s[3] * 512 >= 256 << 20 or s[2] > s[3]]
    return [_cached("quantized_table", *shape) for shape in shapes]


def _prefill_features():
    found = [
        _square(f"prefill_gqa_{n}_{k}", t, 128, heads_q=n, heads_kv=k, causal=True)
        for n, k in ((32, 8), (64, 8))
        for t in (1024, 4096, 16384)
    ]

    found += _feature_table()
    found += [
        Case("prefill_long", "", label, 1, 32768, 32768, 16, 16, causal=True, window=window)
        for label, window in (("causal", None), ("window 1024", 1024))
    ]
    ragged = Case("prefill_varlen", "", "32 rows of 17 to 8192", 32, 8192, 8192, 16, 16,
                  causal=True, shortest=17)  # fmt: skip
    return [*found, ragged]


def _feature_table(backward=False):
    def one(label, len_q=4096, **options):
        options = {"heads_q": 16, "heads_kv": 16, "causal": True, "backward": backward} | options
        return Case("prefill_features", "", label, 16384 // len_q, len_q, len_q, **options)

    found = [one("plain"), one("float16", dtype="float16"), one("softcap 50", softcap=50.0)]
    found += [one("ALiBi", alibi=True), one("dropout 0.1", dropout=0.1)]
    found += [one(f"window {w}", window=w) for w in (128, 1024, 4096)]
    if not backward:
        found += [one("H 192, Hv 128", head_dim=192, values_dim=128)]
        found += [one("H 512", head_dim=512, heads_kv=2)]
    return found


def _decode_features():
    speculative = [
        _cached("decode_tokens", 64, 8192, 32, 8, label=f"{t} tokens", len_q=t) for t in (1, 4, 8)
    ]
    paged = [
        _cached("decode_pages", 64, 8192, 32, 8, label=f"pages of {size}", page_size=size)
        for size in (1, 8, 16, 64, 256)
    ]
    ragged = _cached("decode_ragged", 64, 32768, 32, 8, label="64 rows of 1 to 32768", shortest=1)
    return [*speculative, *paged, ragged]


def _hybrid_features():
    return [
        Case("hybrid_serving", "", f"128x{decode} + {chunk} on {cached}", 129, chunk, decode, 32, 8,
             causal=True, decode_rows=128, prefill_kv=chunk + cached)
        for decode in (2048, 4096, 8192)
        for chunk in (512, 2048, 4096)
        for cached in (0, 4096)
    ]  # fmt: skip


def _quantized_features():
    return [_cached("quantized_prefill", 8, 8192 + 512, 32, 8, label="512 on 8192", len_q=512)]


def _append_features():
    return [
        _cached("append_table", 128, 4096, 8, 8, label=f"128 rows, {t} tokens", len_q=t)
        for t in (1, 16, 512)
    ]


def _quick(gpu):
    if gpu:
        return [
            _square("quick_prefill", 1024, 128, causal=True),
            _square("quick_prefill", 8192, 128, causal=True),
            _cached("quick_decode", 64, 8192, 32, 8),
            _cached("quick_decode", 1, 4096, 32, 32),
            dataclasses.replace(_hybrid_seeds()[5], sweep="quick_hybrid"),
            _cached("quick_quantized", 64, 8192, 32, 8),
            _cached("quick_append", 128, 4096, 8, 8),
        ]
    small = {"heads_q": 4, "heads_kv": 2, "head_dim": 64, "dtype": "float32"}
    return [
        Case("quick_prefill", "T", 33, 2, 33, 33, causal=True, **small),
        Case("quick_decode", "S", 256, 3, 1, 256, causal=True, shortest=1, **small),
        Case("quick_hybrid", "prefill %", 50, 6, 32, 64, causal=True, decode_rows=3,
             prefill_kv=48, **small),
        Case("quick_quantized", "S", 128, 3, 1, 128, causal=True, **small),
        Case("quick_append", "T", 4, 3, 4, 128, causal=True, **small),
    ]  # fmt: skip


def _quick_backward(gpu):
    forward = [c for c in _quick(gpu) if c.sweep == "quick_prefill"][:1]
    return [dataclasses.replace(c, backward=True) for c in forward]


_BUILDERS = {
    ("prefill", "seeds"): _prefill_seeds,
    ("decode", "seeds"): _decode_seeds,
    ("hybrid", "seeds"): _hybrid_seeds,
    ("prefill", "design"): _prefill_design,
    ("decode", "design"): _decode_design,
    ("quantized", "design"): _quantized_design,
    ("prefill", "features"): _prefill_features,
    ("decode", "features"): _decode_features,
    ("hybrid", "features"): _hybrid_features,
    ("quantized", "features"): _quantized_features,
    ("append", "features"): _append_features,
}
