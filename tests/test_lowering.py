"""What JAX hands to XLA for CUDA; needs no GPU."""

import re

import cases
import jax
import jax.numpy as jnp
import pytest

import jax_fa
from jax_fa import _jax_fa, _primitives, _reference


def avals(*shapes, dtype=jnp.bfloat16):
    return [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]


def lower(fn, *args):
    return jax.jit(fn).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


def calls(text):
    """Names of this library's custom calls, in order."""
    return re.findall(r"custom_call @(jax_fa_\w+)\(", text)


def operations(text):
    """Names of StableHLO operations but those that move and compute nothing."""
    free = {"constant", "custom_call", "reshape", "return"}
    lines = [line for line in text.splitlines() if "-> tensor<0x" not in line]
    return sorted(set(re.findall(r"stablehlo\.(\w+)", "\n".join(lines))) - free)


Q, KV = (2, 128, 8, 64), (2, 128, 2, 64)


def test_each_handler_is_a_primitive_of_its_name():
    if not _jax_fa.handlers():
        pytest.skip("the extension is a stub")
    assert set(_jax_fa.handlers()) == set(_primitives.OPERATIONS) - _primitives.REFERENCE_ONLY


def test_each_primitive_has_a_reference_and_its_own_name():
    assert _primitives.REFERENCE_ONLY <= set(_primitives.OPERATIONS)
    for name, p in _primitives.PRIMITIVES.items():
        assert p.name == name
        assert callable(getattr(_reference, name.removeprefix("jax_fa_")))


def flash(q, k, v):
    return jax_fa.flash_attention(q, k, v, causal=True)


def test_dense_is_one_call_and_nothing_else():
    text = lower(flash, *avals(Q, KV, KV))
    assert calls(text) == ["jax_fa_fwd"]
    assert operations(text) == []


@pytest.mark.parametrize(
    "q, kv, options, kernel",
    [
        ((2, 1, 8, 64), KV, {}, "decode"),
        ((2, 4, 8, 64), KV, {"kv_lengths": True}, "decode"),
        ((2, 5, 8, 64), KV, {}, "fwd"),  # 20 columns
        ((2, 5, 8, 64), (2, 4096, 2, 64), {}, "decode"),
        ((2, 17, 8, 64), (2, 4096, 8, 64), {}, "fwd"),
        ((64, 5, 8, 64), (64, 128, 2, 64), {}, "decode"),
        ((64, 16, 8, 64), (64, 128, 8, 64), {"causal": False}, "decode"),
        ((2, 9, 8, 256), (2, 128, 8, 256), {}, "fwd"),
        ((2, 1, 8, 64), KV, {"q_lengths": True}, "fwd"),
        ((2, 1, 8, 64), KV, {"bias": True}, "fwd"),
        ((2, 1, 8, 64), KV, {"dropout_rate": 0.5}, "fwd"),
    ],
    ids=str,
)
def test_few_queries_are_decoded(q, kv, options, kernel):
    options = {"causal": True} | options

    def fn(q, k, v, lengths):
        arrays = {name: lengths for name in options if name.endswith("lengths")}
        if "bias" in options:
            arrays["bias"] = jnp.zeros((1, 1, 1, k.shape[1]))
        if "dropout_rate" in options:
            arrays["dropout_rng"] = jax.random.key(0)
        return jax_fa.flash_attention(q, k, v, **options | arrays)

    args = *avals(q, kv, kv), jax.ShapeDtypeStruct(q[:1], jnp.int32)
    assert calls(lower(fn, *args)) == [f"jax_fa_{kernel}"]
    (call,) = jax_fa.explain(fn, *args, device="h200")
    assert call.primitive == "jax_fa_fwd" and (call.kernel == "decode") == (kernel == "decode")


@pytest.mark.parametrize("shapes", [
    (("b", 128, 8, 64), ("b", 128, 2, 64)), (("b", 1, 8, 64), ("b", 128, 2, 64)),
    ((2, 5, 8, 64), (2, "b", 2, 64)), ((2, "b", 8, 64), (2, "b", 2, 64)),
], ids=str)  # fmt: skip
def test_symbolic_shapes_are_exported(shapes):
    (b,) = jax.export.symbolic_shape("b")
    q, k = (tuple(b if x == "b" else x for x in shape) for shape in shapes)
    exported = jax.export.export(
        jax.jit(flash), platforms=["cuda"], disabled_checks=jax_fa.DISABLED_EXPORT_CHECKS
    )(*avals(q, k, k))
    assert "jax_fa_fwd" in exported.mlir_module()


def test_few_queries_are_decoded_where_their_diagonal_is_that_of_decoding():
    def drop_in(len_q, **options):
        def fn(q, k):
            return jax_fa.dot_product_attention(q, k, k, **options)

        return calls(lower(fn, *avals((2, len_q, 2, 64), (2, 8, 2, 64))))

    assert drop_in(8, is_causal=True) == ["jax_fa_decode"]
    assert drop_in(2, is_causal=True) == ["jax_fa_fwd"]
    assert drop_in(2) == ["jax_fa_decode"]


def test_packed_buffers_are_bound_as_they_are():
    text = lower(lambda x: jax_fa.flash_attention_qkvpacked(x), *avals((2, 128, 3, 8, 64)))
    assert calls(text) == ["jax_fa_fwd"] and operations(text) == []
    assert "custom_call @jax_fa_fwd(%arg0, %arg0, %arg0," in text
    text = lower(lambda q, x: jax_fa.flash_attention_kvpacked(q, x), *avals(Q, (2, 128, 2, 2, 64)))
    assert calls(text) == ["jax_fa_fwd"] and operations(text) == []
    assert "custom_call @jax_fa_fwd(%arg0, %arg1, %arg1," in text


@pytest.mark.parametrize(
    "queries, dtypes, keys, kernel",
    [
        ((2, 128, 16, 64), ("int8", "int8"), 512, "widen, sm90/fwd"),
        ((2, 1024, 2, 64), ("int8", "float8_e4m3fn"), 512, "widen, sm90/fwd"),
        ((2, 128, 16, 72), ("int8", "int8"), 510, "widen, sm90/fwd"),
        ((2, 128, 16, 80), ("int8", "int8"), 510, "sm90/fwd, copying"),
        ((16, 1, 128, 96), ("int8", "int8"), 512, "sm90/fwd, copying"),  # 8 queries share keys
        ((2, 127, 14, 64), ("int8", "int8"), 512, "sm90/fwd"),
        ((2, 1024, 16, 64), ("int8", "bfloat16"), 512, "sm80/fwd"),
        ((2, 128, 16, 64), ("int8", "int8"), 1 << 23, "sm90/fwd"),  # 4 GiB
        ((2, 896, 2, 128), ("float8_e5m2", "float8_e5m2"), 512, "sm90/fwd"),
        ((2, 1024, 2, 96), ("float8_e5m2", "float8_e5m2"), 512, "sm90/fwd, copying"),
        ((2, 1024, 4, 128), ("float8_e5m2", "float8_e5m2"), 512, "sm90/fwd, copying"),
    ],
    ids=str,
)
def test_many_queries_read_a_copy_of_8_bits(queries, dtypes, keys, kernel):
    batch, dim = 2, queries[-1]
    shape = batch, keys, 2, dim

    def fn(q, *arrays):
        k, v = (
            jax_fa.QuantizedArray(x, scale) if x.dtype.itemsize == 1 else x
            for x, scale in zip(arrays[::2], arrays[1::2])
        )
        sharing = q.reshape(-1, batch, *q.shape[1:])
        return jax.vmap(lambda q: jax_fa.flash_attention(q, k, v))(sharing)

    args = avals(queries)
    for dtype in dtypes:
        scaled = dtype == "int8"
        scale = avals((batch, 2, keys, 1), dtype=jnp.float32)[0] if scaled else None
        args += [*avals(shape, dtype=dtype), scale]
    text = lower(fn, *args)
    assert calls(text) == ["jax_fa_fwd"]
    padded = "x".join(map(str, (batch, -(-keys // 8) * 8, 2, dim)))
    copies = "," in kernel
    assert (f"tensor<{padded}xbf16>, tensor<{padded}xbf16>)" in text) == copies
    (call,) = jax_fa.explain(fn, *args, device="h200")
    assert call.kernel == kernel
    (call,) = jax_fa.explain(fn, *args, device="a100")
    assert call.kernel == ("widen, sm80/fwd" if copies else "sm80/fwd")


def test_copies_of_short_rows_have_their_bounds():
    """A row of one token takes the place of eight."""

    def fn(q, values, scale):
        return jax_fa.flash_attention(q, *(jax_fa.QuantizedArray(values, scale),) * 2)

    def kernel(rows):
        scale = jax.ShapeDtypeStruct((rows, 8, 1, 1), jnp.float32)
        args = avals((rows, 1, 64, 128)) + avals((rows, 1, 8, 128), dtype="int8") + [scale]
        return jax_fa.explain(fn, *args, device="h200")[0].kernel

    assert [kernel(1 << 16), kernel(1 << 17)] == ["sm90/fwd, copying", "sm90/fwd"]


def test_rows_of_keys_that_are_not_those_of_values_are_copied_before():
    """As vmap over keys alone, and not over values, makes them."""

    def fn(q, keys, values):
        return jax.vmap(lambda k: jax_fa.flash_attention(q, k, values))(keys)

    def quantized(*rows):
        values = jax.ShapeDtypeStruct((*rows, 512, 2, 128), jnp.int8)
        return jax_fa.QuantizedArray(values, jax.ShapeDtypeStruct((*rows, 2, 512, 1), jnp.float32))

    args = *avals((2, 512, 16, 128)), quantized(3, 2), quantized(2)
    (call,) = jax_fa.explain(fn, *args, device="h200")
    assert call.kernel == "widen, sm90/fwd"


def test_explain_of_no_batch_row_of_8_bits():
    def fn(q, x):
        return jax_fa.flash_attention(q, x, x)

    values = jax.ShapeDtypeStruct((0, 512, 2, 64), jnp.int8)
    scale = jax.ShapeDtypeStruct((0, 2, 512, 1), jnp.float32)
    keys = jax_fa.QuantizedArray(values, scale)
    (call,) = jax_fa.explain(fn, *avals((0, 512, 16, 64)), keys, device="h200")
    assert call.kernel == "sm90/fwd"


def test_quantized_keys_are_bound_as_they_are():
    def fn(q, values, scale):
        x = jax_fa.QuantizedArray(values, scale)
        return jax_fa.flash_attention(q, x, x)

    values = jax.ShapeDtypeStruct(KV, jnp.int8)
    scale = jax.ShapeDtypeStruct((2, 2, 128, 1), jnp.float32)
    text = lower(fn, *avals(Q), values, scale)
    assert calls(text) == ["jax_fa_fwd"] and operations(text) == []


def test_every_forward_is_one_call():
    packed, cache = (100, 8, 64), (4, 256, 2, 64)
    lengths, cu = jax.ShapeDtypeStruct((4,), jnp.int32), jax.ShapeDtypeStruct((5,), jnp.int32)

    def varlen(q, k, cu):
        return jax_fa.flash_attention_varlen(q, k, k, cu, cu, max_seqlen_q=50, max_seqlen_k=50)

    def decode(q, k, lengths):
        return jax_fa.decode_attention(q, k, k, lengths)

    def hybrid(q, k, cu, lengths):
        return jax_fa.hybrid_attention(q, k, k, cu, lengths)

    assert calls(lower(varlen, *avals(packed, (100, 2, 64)), cu)) == ["jax_fa_varlen_fwd"]
    text = lower(decode, *avals((4, 1, 8, 64), cache), lengths)
    assert calls(text) == ["jax_fa_decode"] and operations(text) == []
    assert calls(lower(hybrid, *avals(packed, cache), cu, lengths)) == ["jax_fa_hybrid"]


@pytest.mark.parametrize("in_axes", [(0, 0, 0), (0, None, None), (None, 0, None)], ids=str)
def test_vmap_is_one_call_and_copies_no_keys(in_axes):
    args = [
        jax.ShapeDtypeStruct(s if a is None else (3, *s), jnp.bfloat16)
        for s, a in zip((Q, KV, KV), in_axes)
    ]
    text = lower(jax.vmap(flash, in_axes), *args)
    assert calls(text) == ["jax_fa_fwd"]
    call = next(line for line in text.splitlines() if "@jax_fa_fwd" in line)
    types = re.findall(r"tensor<(\d+)x128x[28]x64xbf16>", call)[:3]
    assert types == ["6", *("2" if a is None else "6" for a in in_axes[1:])]


def cache_step(layers):
    def step(cache, k, layer):
        return cache.append(k, k, layer=None if layers is None else layer)

    return step


@pytest.mark.parametrize("layers", [None, 3])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.int8])
@pytest.mark.parametrize("paged", [False, True])
def test_append_declares_its_aliases(paged, dtype, layers):
    if paged:
        cache = jax_fa.PagedKVCache.create(8, 16, 2, 4, 2, 64, layers=layers, dtype=dtype)
    else:
        cache = jax_fa.KVCache.create(2, 64, 2, 64, layers=layers, dtype=dtype)
    text = lower(cache_step(layers), cache, *avals((2, 1, 2, 64)), jnp.int32(0))
    assert calls(text) == ["jax_fa_append"]
    call = next(line for line in text.splitlines() if "@jax_fa_append" in line)
    aliases = re.findall(
        r"output_operand_alias<output_tuple_indices = \[(\d)\], operand_index = (\d)", call
    )
    assert aliases == [("0", "0"), ("1", "1"), ("2", "2"), ("3", "3")]
    for name in ("transpose", "slice", "concatenate", "gather", "scatter", "copy"):
        assert f"stablehlo.{name}" not in text


def gradients(fn, *args):
    """Gradients of a function of floats, lowered: those of its first argument."""
    return lower(jax.grad(lambda *x: fn(*x).astype(jnp.float32).sum()), *args)


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_gradient_is_one_call(deterministic):
    def fn(q, k, v):
        return jax_fa.flash_attention(q, k, v, deterministic=deterministic)

    text = gradients(fn, *avals(Q, KV, KV))
    assert calls(text) == ["jax_fa_fwd", "jax_fa_fwd_bwd"] and "stablehlo.while" not in text
    (call,) = (line for line in text.splitlines() if "@jax_fa_fwd_bwd(" in line)
    assert f"deterministic = {str(deterministic).lower()}" in call
    sums = re.findall(r"tensor<(\d+)xf32>", call.split("->")[1])
    # a float for each query and dim, a counter of tiles of keys, and who adds next to which sums
    assert int(sums[-1]) == 2 * 128 * 8 * 64 + 1 + (2 * 2 * 8 if deterministic else 0)

    def varlen(q, k, cu):
        return jax_fa.flash_attention_varlen(q, k, k, cu, cu, max_seqlen_q=50, max_seqlen_k=50)

    cu = jax.ShapeDtypeStruct((5,), jnp.int32)
    text = gradients(varlen, *avals((100, 8, 64), (100, 2, 64)), cu)
    assert calls(text) == ["jax_fa_varlen_fwd", "jax_fa_varlen_bwd"]


@pytest.mark.parametrize("parts", [2, 3])
def test_gradients_of_packed_buffers_are_written_in_place(parts):
    if parts == 3:
        text = gradients(jax_fa.flash_attention_qkvpacked, *avals((2, 128, 3, 8, 64)))
    else:
        text = gradients(
            lambda x, q: jax_fa.flash_attention_kvpacked(q, x), *avals((2, 128, 2, 2, 64), Q)
        )
    assert calls(text) == ["jax_fa_fwd", "jax_fa_fwd_bwd"]
    for name in ("concatenate", "stack", "dynamic_update_slice"):
        assert f"stablehlo.{name}" not in text


def test_gradients_that_no_kernel_covers_run_through_xla():
    values = jax.ShapeDtypeStruct(KV, jnp.int8)
    scale = jax.ShapeDtypeStruct((2, 2, 128, 1), jnp.float32)
    for implementation in (None, "cuda"):

        def fn(q, values, scale, implementation=implementation):
            x = jax_fa.QuantizedArray(values, scale)
            return jax_fa.flash_attention(q, x, x, implementation=implementation)

        text = gradients(fn, *avals(Q), values, scale)
        assert calls(text) == ["jax_fa_fwd"] and "stablehlo.while" in text


def test_reference_on_request():
    text = lower(
        lambda q, k: jax_fa.flash_attention(q, k, k, implementation="reference"), *avals(Q, KV)
    )
    assert calls(text) == [] and "stablehlo.while" in text


def test_cuda_on_request_needs_cuda():
    q = jnp.ones((1, 5, 2, 8))
    if jax.default_backend() == "cpu":
        with pytest.raises(
            NotImplementedError, match="implementation='cuda' of jax_fa_fwd needs a CUDA device"
        ):
            jax_fa.flash_attention(q, q, q, implementation="cuda")


def dense(shape=Q, kv=KV, dim_v=None, dtype=jnp.bfloat16, **options):
    v = kv if dim_v is None else (*kv[:-1], dim_v)
    return lambda: lower(
        lambda q, k, v: jax_fa.flash_attention(q, k, v, **options),
        *avals(shape, kv, v, dtype=dtype),
    )


def wide(dim):
    return (2, 128, 8, dim), (2, 128, 2, dim)


MOST, MOST_FLOAT32 = _jax_fa.max_head_dim(2, False), _jax_fa.max_head_dim(4, False)
UNCOVERED = {
    "float64": (dense(dtype=jnp.float64), "q is float64; kernels take float16, bfloat16, float32"),
    "Hv": (
        dense(dim_v=36),
        f"head dim 36 of v; bfloat16 kernels take multiples of 8 up to {MOST}",
    ),
    "H=260": (
        dense(*wide(260)),
        f"head dim 260 of k; bfloat16 kernels take multiples of 8 up to {MOST}",
    ),
    "H=520": (
        dense(*wide(520)),
        f"head dim 520 of k; bfloat16 kernels take multiples of 8 up to {MOST}",
    ),
    "H=36": (
        dense(*wide(36)),
        f"head dim 36 of k; bfloat16 kernels take multiples of 8 up to {MOST}",
    ),
    "float32 H=264": (
        dense(*wide(264), dtype=jnp.float32),
        f"head dim 264 of k; float32 kernels take multiples of 8 up to {MOST_FLOAT32}",
    ),
}


@pytest.mark.parametrize("name", UNCOVERED)
def test_what_no_kernel_covers_says_why(name):
    call, reason = UNCOVERED[name]
    with jax.enable_x64(name == "float64"):
        with pytest.raises(NotImplementedError, match=f"jax_fa_fwd has no CUDA kernel .*{reason}"):
            call()


def test_values_of_another_head_dim_lower_to_kernels():
    q, k, v = avals((2, 128, 8, 64), (2, 128, 2, 64), (2, 128, 2, 32))
    assert calls(dense(dim_v=32)()) == ["jax_fa_fwd"]

    def gradients(q, k, v):
        loss = lambda *x: jax_fa.flash_attention(*x).astype(jnp.float32).sum()  # noqa: E731
        return jax.grad(loss, (0, 1, 2))(q, k, v)

    assert calls(lower(gradients, q, k, v)) == ["jax_fa_fwd", "jax_fa_fwd_bwd"]
    lengths = jax.ShapeDtypeStruct((2,), jnp.int32)
    text = lower(jax_fa.decode_attention, avals((2, 8, 64))[0], k, v, lengths)
    assert calls(text) == ["jax_fa_decode"]


def test_gradients_of_wide_heads_run_through_xla():
    q, k = avals((2, 64, 4, MOST), (2, 64, 1, MOST))

    def gradients(q, k):
        return jax.grad(lambda q, k: flash(q, k, k).astype(jnp.float32).sum(), (0, 1))(q, k)

    assert calls(lower(gradients, q, k)) == ["jax_fa_fwd"]


def quantized(values, scale, fn):
    """fn of keys of that shape in int8 with scales of that shape, lowered."""
    values = jax.ShapeDtypeStruct(values, jnp.int8)
    scale = jax.ShapeDtypeStruct(scale, jnp.float32)
    return lower(lambda values, scale: fn(jax_fa.QuantizedArray(values, scale)), values, scale)


def test_scales_that_no_kernel_reads_say_why():
    q = jnp.ones(Q, jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="groups of 4 elements in k; .* multiples of 8"):
        quantized(KV, (2, 2, 128, 16), lambda k: jax_fa.flash_attention(q, k, k))
    with pytest.raises(NotImplementedError, match="scales of k with batch 2 for values with batch"):
        values = jax.ShapeDtypeStruct((3, *KV), jnp.int8)
        scale = jax.ShapeDtypeStruct((2, 2, 128, 1), jnp.float32)
        axes = (jax_fa.QuantizedArray(0, None),)
        fn = jax.vmap(lambda k: jax_fa.flash_attention(q, k, k), axes)
        lower(fn, jax_fa.QuantizedArray(values, scale))


def test_dropout_over_quantized_keys_says_why():
    q = jnp.ones(Q, jnp.bfloat16)
    options = {"dropout_rate": 0.5, "dropout_rng": jax.random.key(0)}
    with pytest.raises(NotImplementedError, match="dropout over int8 keys; kernels have it for"):
        quantized(KV, (2, 2, 128, 1), lambda k: jax_fa.flash_attention(q, k, k, **options))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_gradients_with_dropout_have_kernels(dtype):
    options = {"dropout_rate": 0.5, "dropout_rng": jax.random.key(0)}

    def loss(q, k, v):
        return jax_fa.flash_attention(q, k, v, **options).astype(jnp.float32).sum()

    found = calls(lower(jax.grad(loss), *avals(Q, KV, KV, dtype=dtype)))
    assert found == ["jax_fa_fwd", "jax_fa_fwd_bwd"]


def test_more_rows_than_a_grid_has_say_why():
    q, k = avals((65536, 1, 8, 64), (1, 64, 2, 64))
    lengths = jax.ShapeDtypeStruct((65536,), jnp.int32)
    with pytest.raises(NotImplementedError, match="batch 65536; kernels take up to 65535"):
        lower(lambda q, k, n: jax_fa.decode_attention(q, k, k, n), q, k, lengths)


def test_append_of_odd_heads_says_why():
    cache = jax_fa.KVCache.create(2, 8, 2, 6, dtype=jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="head dim 6 of k; kernels take multiples of 4"):
        lower(cache_step(None), cache, *avals((2, 1, 2, 6)), jnp.int32(0))


def test_split_size_is_covered():
    cu, lengths = jnp.array([0, 2, 5], jnp.int32), jnp.array([2, 3], jnp.int32)

    def fn(q, k):
        return jax_fa.hybrid_attention(q, k, k, cu, lengths, split_size=64)

    assert calls(lower(fn, *avals((5, 8, 64), (2, 128, 2, 64)))) == ["jax_fa_hybrid"]


EMPTY = [
    ((0, 5, 4, 64), (0, 7, 2, 64)),
    ((2, 0, 4, 64), (2, 7, 2, 64)),
    ((2, 5, 4, 64), (2, 0, 2, 64)),
]


@pytest.mark.parametrize("q, k", EMPTY, ids=str)
def test_empty_arrays_launch_nothing(q, k):
    assert calls(lower(flash, *avals(q, k, k))) == []


def test_the_same_call_lowers_for_both_platforms():
    lowered = jax.jit(flash).trace(*avals(Q, KV, KV)).lower(lowering_platforms=("cpu", "cuda"))
    assert calls(lowered.as_text()) == ["jax_fa_fwd"]


def test_every_option_lowers(rng):
    shape = cases.Shape(2, 128, 128, 8, 2, 64)
    q, k, v = cases.qkv(rng, shape, jnp.bfloat16)
    options = cases.options_of(cases.FEATURES, rng, shape)
    text = lower(
        lambda q, k, v: jax_fa.flash_attention(q, k, v, return_lse=True, **options), q, k, v
    )
    assert calls(text) == ["jax_fa_fwd"]


def test_explain_counts_calls_without_running_them():
    def model(q, k):
        def layer(x, _):
            return jax_fa.flash_attention(x, k, k, causal=True), None

        return jax.lax.scan(layer, q, length=4)[0]

    (call,) = jax_fa.explain(model, *avals((1, 256, 8, 64), (1, 256, 8, 64)))
    assert call.primitive == "jax_fa_fwd" and call.count == 4
    assert call.flops == 4 * 64 * 8 * 256 * 257 / 2
    if jax.default_backend() == "cpu":
        assert call.kernel == "reference" and call.reason
    grad = jax_fa.explain(
        jax.grad(lambda q, k: flash(q, k, k).astype(jnp.float32).sum()),
        *avals((1, 64, 8, 64), (1, 64, 8, 64)),
    )
    assert [c.primitive for c in grad] == ["jax_fa_fwd", "jax_fa_fwd_bwd"]
    with pytest.raises(ValueError, match="device must be one of h200, .* got 'tpu'"):
        jax_fa.explain(model, *avals((1, 256, 8, 64), (1, 256, 8, 64)), device="tpu")
