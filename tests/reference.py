"""DESIGN section 2 in numpy float64, row by row: what every implementation is compared with.

Written from the formulas alone; nothing here imports jax_fa.
"""

import numpy as np


def as_float64(x):
    """A numpy or JAX array of any dtype, bfloat16 and fp8 included."""
    return None if x is None else np.asarray(x).astype(np.float64)


def dequantize(values, scale):
    """values `[..., S, K, H]` times scale `[..., K | 1, S | 1, G]` or None; G divides H."""
    values = as_float64(values)
    if scale is None:
        return values
    scale = np.swapaxes(as_float64(scale), -2, -3)  # [..., S | 1, K | 1, G]
    return values * np.repeat(scale, values.shape[-1] // scale.shape[-1], axis=-1)


def rounding_to(dtype):
    """Rounds float64 numbers to a dtype; float32 means TF32, in which tensor cores multiply it."""
    if dtype is None:
        return lambda x: x
    if np.dtype(dtype) != np.float32:
        return lambda x: x.astype(dtype).astype(np.float64)

    def tf32(x):
        bits = x.astype(np.float32).view(np.uint32)
        kept = (bits + np.uint32(0xFFF) + ((bits >> 13) & 1)) & np.uint32(0xFFFFE000)
        return np.where(np.isfinite(x), kept.view(np.float32), x).astype(np.float64)

    return tf32


def attention_row(
    q, k, v, *, scale=None, causal=False, window=None, softcap=None, slopes=None, sinks=None,
    bias=None, keep=None, dropout_rate=0.0, top_left=False, rounded=None,
):  # fmt: skip
    """One row: q `[T', N, H]`, k `[S', K, H]`, v `[S', K, Hv]`, slopes and sinks `[N]`, bias and
    keep `[N, T', S']`; returns o `[T', N, Hv]` and lse `[N, T']`.

    rounded: a dtype to which scores, probabilities and outputs are rounded, as in the naive
    computation in that dtype; None: float64 throughout.
    """
    to = rounding_to(rounded)
    q, k, v = to(q), to(k), to(v)
    len_q, heads, dim = q.shape
    len_kv, heads_kv, _ = k.shape
    scale = dim**-0.5 if scale is None else scale
    window = (window, window) if isinstance(window, int) else window
    i = np.arange(len_q)[:, None]
    j = np.arange(len_kv)[None]
    diagonal = i + (0 if top_left else len_kv - len_q)
    visible = np.ones((len_q, len_kv), bool)
    if causal:
        visible &= j <= diagonal
    if window is not None:
        left, right = window
        if left is not None:
            visible &= j - diagonal >= -left
        if right is not None:
            visible &= j - diagonal <= right
    out = np.zeros((len_q, heads, v.shape[-1]))
    lse = np.full((heads, len_q), -np.inf)
    for n in range(heads):
        head = n // (heads // heads_kv)
        score = to(scale * (q[:, n] @ k[:, head].T))
        if softcap:
            score = to(softcap * np.tanh(to(score / softcap)))
        if slopes is not None:
            score = to(score - slopes[n] * np.abs(diagonal - j))
        if bias is not None:
            score = to(score + bias[n])
        score = np.where(visible, score, -np.inf)
        if sinks is not None:
            score = np.concatenate([score, np.full((len_q, 1), sinks[n])], axis=1)
        for t in range(len_q):
            top = score[t].max(initial=-np.inf)
            if top == -np.inf:
                continue
            weights = np.exp(score[t] - top)
            lse[n, t] = top + np.log(weights.sum())
            p = (weights / weights.sum())[:len_kv]
            if keep is not None:
                p = np.where(keep[n, t], p, 0) / (1 - dropout_rate)
            seen = p > 0  # a NaN behind a probability of 0 is not seen
            out[t, n] = to(to(p[seen]) @ v[seen, head])
    return out, lse


def _rows_of(x, batch):
    return None if x is None else np.broadcast_to(x, (batch, np.shape(x)[-1]))


def attention(
    q, k, v, *, q_lengths=None, kv_lengths=None, alibi_slopes=None, sinks=None, bias=None,
    dropout_rate=0.0, seeds=None, broadcast_dropout=False, **options,
):  # fmt: skip
    """q `[B, T, N, H]`, k `[B, S, K, H]`, v `[B, S, K, Hv]`; o `[B, T, N, Hv]`, lse `[B, N, T]`."""
    q, k, v, bias = (as_float64(x) for x in (q, k, v, bias))
    slopes, sinks = (_rows_of(as_float64(x), q.shape[0]) for x in (alibi_slopes, sinks))
    batch, len_q, heads, _ = q.shape
    len_kv = k.shape[1]
    if bias is not None:
        bias = np.broadcast_to(bias, (batch, heads, len_q, len_kv))
    out = np.zeros((batch, len_q, heads, v.shape[-1]))
    lse = np.full((batch, heads, len_q), -np.inf)
    for b in range(batch):
        t = len_q if q_lengths is None else int(q_lengths[b])
        s = len_kv if kv_lengths is None else int(kv_lengths[b])
        keep = None
        if dropout_rate:
            keep = dropout_keep(seeds[b], heads, t, s, dropout_rate, broadcast_dropout)
        out[b, :t], lse[b, :, :t] = attention_row(
            q[b, :t], k[b, :s], v[b, :s], slopes=None if slopes is None else slopes[b],
            sinks=None if sinks is None else sinks[b],
            bias=None if bias is None else bias[b, :, :t, :s],
            keep=keep, dropout_rate=dropout_rate, **options,
        )  # fmt: skip
    return out, lse


def packed(q, rows_k, rows_v, starts, lengths, *, alibi_slopes=None, sinks=None, dropout_rate=0.0,
           seeds=None, **options):  # fmt: skip
    """Packed queries `[total, N, H]` of rows that start at `starts` and have `lengths` tokens, over
    each row's own keys and values; o `[total, N, Hv]`, lse `[N, total]`."""
    q = as_float64(q)
    total, heads, _ = q.shape
    batch = len(lengths)
    slopes, sinks = (_rows_of(as_float64(x), batch) for x in (alibi_slopes, sinks))
    out = np.zeros((total, heads, rows_v[0].shape[-1] if batch else 1))
    lse = np.full((heads, total), -np.inf)
    for b in range(batch):
        at = slice(int(starts[b]), int(starts[b]) + int(lengths[b]))
        keep = None
        if dropout_rate:
            size = len(rows_k[b])
            keep = dropout_keep(seeds[b], heads, at.stop - at.start, size, dropout_rate, False)
        out[at], lse[:, at] = attention_row(
            q[at], rows_k[b], rows_v[b], slopes=None if slopes is None else slopes[b],
            sinks=None if sinks is None else sinks[b], keep=keep, dropout_rate=dropout_rate,
            **options,
        )  # fmt: skip
    return out, lse


def varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, **options):
    k, v = as_float64(k), as_float64(v)
    cu_q, cu_k = np.asarray(cu_seqlens_q), np.asarray(cu_seqlens_k)
    rows = [slice(a, b) for a, b in zip(cu_k[:-1], cu_k[1:])]
    return packed(
        q, [k[r] for r in rows], [v[r] for r in rows], cu_q[:-1], np.diff(cu_q), **options
    )


def cache_rows(x, kv_lengths, *, page_table=None, batch_index=None, layer=None):
    """Each row's own tokens `[S', K, H]` of a cache's float64 array (see decode_attention)."""
    x = x if layer is None else x[int(layer)]
    rows = []
    for b, length in enumerate(np.asarray(kv_lengths)):
        if page_table is None:
            row = b % x.shape[0] if batch_index is None else int(batch_index[b])
            rows.append(x[row, :length])
        else:
            j, page = np.arange(length), x.shape[1]
            rows.append(x[np.asarray(page_table)[b][j // page], j % page])
    return rows


def decode(q, k, v, kv_lengths, *, page_table=None, batch_index=None, layer=None, alibi_slopes=None,
           sinks=None, **options):  # fmt: skip
    """q `[B, T, N, H]`, caches as float64 arrays; o `[B, T, N, Hv]`, lse `[B, N, T]`."""
    q = as_float64(q)
    batch = q.shape[0]
    maps = {"page_table": page_table, "batch_index": batch_index, "layer": layer}
    rows_k, rows_v = (cache_rows(as_float64(x), kv_lengths, **maps) for x in (k, v))
    slopes, sinks = (_rows_of(as_float64(x), batch) for x in (alibi_slopes, sinks))
    results = [
        attention_row(
            q[b], rows_k[b], rows_v[b], causal=True, slopes=None if slopes is None else slopes[b],
            sinks=None if sinks is None else sinks[b], **options,
        )
        for b in range(batch)
    ]  # fmt: skip
    return np.stack([o for o, _ in results]), np.stack([lse for _, lse in results])


def hybrid(q, k, v, cu_seqlens_q, kv_lengths, *, page_table=None, batch_index=None, layer=None,
           causal=True, **options):  # fmt: skip
    """q `[total, N, H]`; o `[total, N, Hv]`, lse `[N, total]`."""
    maps = {"page_table": page_table, "batch_index": batch_index, "layer": layer}
    rows_k, rows_v = (cache_rows(as_float64(x), kv_lengths, **maps) for x in (k, v))
    cu = np.asarray(cu_seqlens_q)
    return packed(q, rows_k, rows_v, cu[:-1], np.diff(cu), causal=causal, **options)


def rotary(x, cos, sin, positions, interleaved):
    """x `[..., N, H]` with positions `[...]`, float64."""
    x, cos, sin = as_float64(x).copy(), as_float64(cos), as_float64(sin)
    positions = np.minimum(positions, cos.shape[0] - 1)
    half = cos.shape[1]
    c, s = cos[positions][..., None, :], sin[positions][..., None, :]
    first = slice(0, 2 * half, 2) if interleaved else slice(0, half)
    second = slice(1, 2 * half, 2) if interleaved else slice(half, 2 * half)
    a, b = x[..., first].copy(), x[..., second].copy()
    x[..., first], x[..., second] = a * c - b * s, b * c + a * s
    return x


def philox(counter, key):
    """Philox4x32-7 on Python integers or arrays of uint64 (Salmon et al. 2011)."""
    word = 0xFFFFFFFF
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(7):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & word, (p0 >> 32) ^ c3 ^ k1, p0 & word
        k0, k1 = (k0 + 0x9E3779B9) & word, (k1 + 0xBB67AE85) & word
    return c0, c1, c2, c3


def dropout_keep(seed, heads, len_q, len_kv, rate, broadcast):
    """bool `[N, T, S]` of one row: Philox draws for 32 pairs of each 16 queries and 64 keys."""
    shape = heads, -(-len_q // 16), 8, -(-len_kv // 64), 4
    n, i, i_of_8, j, j_of_8 = np.indices(shape, np.uint64)
    w = philox(
        (j * 4 + j_of_8, i * 8 + i_of_8, n * (not broadcast), 0 * n), tuple(int(x) for x in seed)
    )
    swapped = [x >> 16 | (x & 0xFFFF) << 16 for x in w]
    words = []  # four for each 16 keys
    for first, second, third in ((w, None, None), (w, w, w), (w, w, swapped), (w, swapped, w)):
        for m in range(4):
            sums = 0 * n if second is None else second[(m + 1) % 4] ^ third[(m + 2) % 4]
            words.append(first[m] ^ sums)
    lanes = np.stack([half & 0x7FFF for x in words for half in (x, x >> 16)], -1)
    # [N, T / 16, 8, S / 64, 4; 4 of 16 keys, 2 of 8 keys, 2 of 8 queries, 2 keys] -> [N, T, S]
    lanes = lanes.reshape(*shape, 4, 2, 2, 2).transpose(0, 1, 7, 2, 3, 5, 6, 4, 8)
    lanes = lanes.reshape(heads, shape[1] * 16, shape[3] * 64)[:, :len_q, :len_kv]
    return lanes >= round(rate * 32768)


def assert_close(actual, expected, tolerance, what="", relative=0.0):
    """Where nan and inf sit must agree first; then the largest and the mean error."""
    actual, expected = as_float64(actual), as_float64(expected)
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape}, not {expected.shape}"
    for test in (np.isnan, np.isposinf, np.isneginf):
        here, there = test(actual), test(expected)
        assert (here == there).all(), (
            f"{what}: {test.__name__} at {np.argwhere(here != there)[:4].tolist()} differ"
        )
    finite = np.isfinite(expected)
    actual, expected = np.where(finite, actual, 0), np.where(finite, expected, 0)
    error = np.abs(actual - expected)
    allowed = tolerance + relative * np.abs(expected)
    worst = np.unravel_index((error - allowed).argmax(), error.shape) if error.size else None
    assert error.size == 0 or (error <= allowed).all(), (
        f"{what}: {actual[worst]} at {worst}, expected {expected[worst]}, "
        f"error {error[worst]:.3g} > {allowed[worst]:.3g}"
    )
    if error.size:
        mean, bound = error.mean(), allowed.mean() / 2
        assert mean <= bound, f"{what}: mean error {mean:.3g} > {bound:.3g}"
