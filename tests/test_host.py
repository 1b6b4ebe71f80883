"""What kernels compute on the device and planners on the host, checked on the host."""

import ast
import os
import pathlib
import re
import subprocess
import sys
import types

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

import jax_fa
from jax_fa import _jax_fa, cli


def test_the_stub_names_what_the_extension_has():
    stub = pathlib.Path(__file__).parents[1] / "jax_fa" / "_jax_fa.pyi"
    tree = ast.parse(stub.read_text())
    arguments = {f.name: f.args for f in tree.body if isinstance(f, ast.FunctionDef)}
    functions = {name for name in dir(_jax_fa) if callable(getattr(_jax_fa, name))}
    assert arguments.keys() == {name for name in functions if not name.startswith("_")}
    for name, args in arguments.items():
        declared = [a.arg for a in (*args.args, *args.kwonlyargs)]
        signature = getattr(_jax_fa, name).__doc__.splitlines()[0]
        assert declared == re.findall(r"(\w+): ", signature), name


def _visible(len_q, len_kv, left, right, top_left=False):
    """Which keys each query sees, by the definition."""
    diagonal = 0 if top_left else len_kv - len_q
    offset = np.arange(len_kv)[None] - (np.arange(len_q)[:, None] + diagonal)
    seen = np.ones((len_q, len_kv), bool)
    if left >= 0:
        seen &= offset >= -left
    if right >= 0:
        seen &= offset <= right
    return seen


def _random_mask(rng):
    len_q, len_kv = (int(x) for x in rng.integers(1, 70, 2))
    left, right = (int(x) for x in rng.choice([-1, 0, 1, 5, 30, 2**31 - 1], 2))
    return len_q, len_kv, left, right


def test_visible_keys_are_the_interval_of_the_definition():
    rng = np.random.default_rng(0)
    for _ in range(500):
        len_q, len_kv, left, right = _random_mask(rng)
        top_left = bool(rng.integers(2))
        seen = _visible(len_q, len_kv, left, right, top_left)
        for query in range(len_q):
            lo, hi = _jax_fa.visible_keys(query, len_q, len_kv, left, right, top_left)
            keys = np.arange(len_kv)
            np.testing.assert_array_equal(seen[query], (keys >= lo) & (keys < hi))


def test_tiles_are_skipped_only_where_unseen_and_unmasked_only_where_all_seen():
    rng = np.random.default_rng(1)
    kinds = set()
    for _ in range(3000):
        len_q, len_kv, left, right = _random_mask(rng)
        query0, key0 = int(rng.integers(len_q)), int(rng.integers(len_kv))
        query1 = int(rng.integers(query0 + 1, len_q + 1))
        key1 = key0 + int(rng.integers(1, 33))  # may reach past the last key
        kind = _jax_fa.classify_tile(query0, query1, key0, key1, len_q, len_kv, left, right)
        tile = _visible(len_q, len_kv, left, right)[query0:query1, key0:key1]
        whole = key1 <= len_kv and tile.all()
        assert not (kind == "skip" and tile.any())
        assert (kind == "full") == whole
        kinds.add(kind)
    assert kinds == {"skip", "partial", "full"}


def test_philox_known_answers():
    """Vectors of the authors' Random123 distribution."""
    ones = 0xFFFFFFFF
    for counter, key, expected in (
        ([0] * 4, [0] * 2, [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]),
        ([ones] * 4, [ones] * 2, [0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], [0xA4093822, 0x299F31D0],
            [0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A],
        ),
    ):  # fmt: skip
        assert _jax_fa.philox(counter, key) == expected


@pytest.mark.parametrize("longest_first", [False, True])
def test_hopper_takes_each_tile_once_and_the_longest_of_a_section_first(longest_first):
    rng = np.random.default_rng(3)
    for _ in range(200):
        tiles, pairs, section = (int(x) for x in rng.integers(1, 14, 3))
        places = [
            _jax_fa.hopper_place(i, tiles, pairs, min(section, pairs), longest_first)
            for i in range(tiles * pairs)
        ]
        assert sorted(places) == [(p, t) for p in range(pairs) for t in range(tiles)]
        sections = [pair // min(section, pairs) for pair, _ in places]
        if longest_first:
            assert sections == sorted(sections)
            for one in set(sections):
                order = [t for (_, t), s in zip(places, sections) if s == one]
                assert order == sorted(order, reverse=True)


def _hybrid_time(sms, tiles, prefill, decode, share):
    """When both launches have ended: half of the multiprocessors read as fast as all."""
    prefill_end = -(-tiles // share) * prefill * sms / tiles
    return prefill_end + max(decode - min(2 * (sms - share) / sms, 1) * prefill_end, 0)


@hypothesis.given(tiles=st.integers(1, 5000), prefill=st.floats(1, 1000), decode=st.floats(1, 1000))
def test_prefill_takes_the_share_that_ends_first(tiles, prefill, decode):
    sms = 132
    times = [_hybrid_time(sms, tiles, prefill, decode, share) for share in range(1, sms + 1)]
    share = _jax_fa.prefill_share(sms, tiles, prefill, decode)
    assert times[share - 1] <= 1.01 * min(times)


def test_prefill_takes_all_or_nothing_without_the_other():
    assert _jax_fa.prefill_share(132, 0, 0, 10) == 0
    assert _jax_fa.prefill_share(132, 7, 10, 0) == 132


def _python(code, arch):
    """Runs code in a process of its own, with the package that this one has."""
    env = os.environ | {"JAX_FA_ARCH": arch, "JAX_PLATFORMS": "cpu"}
    env["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, "-P", "-c", code]
    return subprocess.run(command, env=env, capture_output=True, text=True)


@pytest.mark.parametrize(
    "arch, kernels", [("", ["sm90/fwd", "sm90/bwd"]), ("sm80", ["sm80/fwd", "sm80/bwd_keys"])]
)
def test_arch_forces_the_portable_tier(arch, kernels):
    code = (
        "import jax, jax.numpy as jnp, jax_fa\n"
        "q = jax.ShapeDtypeStruct((1, 256, 2, 64), jnp.bfloat16)\n"
        "grad = jax.grad(lambda q: jax_fa.flash_attention(q, q, q).astype(jnp.float32).sum())\n"
        "for device in ('h200', 'a100'):\n"
        "    print(*(call.kernel for call in jax_fa.explain(grad, q, device=device)))\n"
    )
    out = _python(code, arch)
    assert out.stdout.split() == [*kernels, "sm80/fwd", "sm80/bwd_keys"], out.stderr


@pytest.mark.parametrize("device, tier", [("h200", "sm90"), ("a100", "sm80")])
def test_dropout_has_kernels_and_tiles_of_its_own(device, tier):
    q = jax.ShapeDtypeStruct((2, 4096, 16, 128), jnp.bfloat16)

    def explained(**options):
        def loss(q):
            return jax_fa.flash_attention(q, q, q, **options).astype(jnp.float32).sum()

        return jax_fa.explain(jax.grad(loss), q, device=device)

    plain = explained()
    dropped = explained(dropout_rate=0.1, dropout_rng=jax.random.key(0))
    assert [call.kernel[:4] for call in dropped] == [tier] * 2
    assert [call.kernel for call in dropped] == [call.kernel for call in plain]
    assert dropped[0].tile[1] < plain[0].tile[1]  # fewer keys: registers for general scores
    dropped = explained(dropout_rate=0.97, dropout_rng=jax.random.key(0))
    assert [call.kernel[:4] for call in dropped] == ["sm80"] * 2


@pytest.mark.parametrize(
    "dtypes, head_dim, group, page, kernel",
    [
        (("int8", "int8"), 128, None, None, "sm90/fwd"),
        (("int8", "float8_e5m2"), 64, 32, None, "sm90/fwd"),
        (("float8_e4m3fn", "float8_e4m3fn"), 80, None, 24, "decode, sm90/fwd"),
        (("int8", "int8"), 128, 8, None, "sm80/fwd"),  # groups of 8
        (("int8", "int8"), 72, None, None, "sm80/fwd"),  # rows of no whole 16 bytes
        (("int8", "bfloat16"), 128, None, None, "sm80/fwd"),  # one of them quantized
        (("int8", "int8"), 128, None, 4, "decode, sm80/fwd"),
        (("bfloat16", "bfloat16"), 256, None, 48, "decode, sm90/fwd"),  # tiles of 64 keys
        (("bfloat16", "bfloat16"), 256, None, 4, "decode, sm80/fwd"),
    ],
)
def test_hopper_takes_prefill_over_quantized_keys(dtypes, head_dim, group, page, kernel):
    q = jax.ShapeDtypeStruct((2, 256, 4, head_dim), jnp.bfloat16)
    shape = (2, 512, 2, head_dim) if page is None else (32, page, 2, head_dim)

    def keys(dtype):
        x = jnp.zeros(shape, jnp.bfloat16)
        if dtype == "bfloat16":
            return x
        return jax_fa.quantize(x, dtype, "group" if group else "head", group)

    def prefill(q):
        return jax_fa.flash_attention(q, *map(keys, dtypes), causal=True)

    def hybrid(q):
        table, lengths = jnp.zeros((2, 8), jnp.int32), jnp.array([3, 4])
        starts = jnp.array([0, 200, 256])
        return jax_fa.hybrid_attention(
            q.reshape(-1, 4, head_dim)[:256], *map(keys, dtypes), starts, lengths, page_table=table
        )

    (call,) = jax_fa.explain(prefill if page is None else hybrid, q, device="h200")
    assert call.kernel == kernel
    if kernel.endswith("sm90/fwd") and "int8" in dtypes:
        assert call.warps == 20 and call.blocks <= 132


@pytest.mark.parametrize(
    "q_dtype, formats, options, bytes_stay",
    [
        ("bfloat16", (("float8_e4m3fn", None), ("float8_e4m3fn", "head")), {}, True),
        ("bfloat16", (("float8_e4m3fn", "head"), ("int8", "token")), {"causal": True}, True),
        ("bfloat16", (("float8_e4m3fn", "head"), ("float8_e5m2", "head")), {}, True),
        ("bfloat16", (("float8_e5m2", None), ("float8_e4m3fn", "head")), {}, True),
        ("bfloat16", (("float8_e4m3fn", "head"), ("float8_e4m3fn", "group")), {}, False),
        ("bfloat16", (("float8_e4m3fn", "head"),) * 2, {"softcap": 9.0}, False),
        ("bfloat16", (("int8", "head"),) * 2, {}, False),
        ("float16", (("float8_e4m3fn", "head"),) * 2, {}, False),
    ],
    ids=str,
)
def test_hopper_multiplies_keys_of_fp8_as_they_are(q_dtype, formats, options, bytes_stay):
    q, x = (jax.ShapeDtypeStruct((2, 64 * n, n, 128), q_dtype) for n in (2, 2))

    def prefill(q, *keys):
        quantized = [
            jax_fa.quantize(x, dtype, how, 32 if how == "group" else None)
            for x, (dtype, how) in zip(keys, formats)
        ]
        return jax_fa.flash_attention(q, *quantized, **options)

    (call,) = jax_fa.explain(prefill, q, x, x, device="h200")
    assert call.tile == (128, 128 if bytes_stay else 96, 128)
    assert call.warps == (16 if bytes_stay else 20)


def test_an_unknown_arch_is_refused():
    out = _python("import jax_fa", "sm75")
    assert "ValueError: JAX_FA_ARCH must be sm80 or unset, got sm75" in out.stderr


@pytest.mark.parametrize("dims", [(64, 64), (96, 96), (128, 128), (256, 256), (64, 256)], ids=str)
def test_decode_splits_bound_scratch_and_leave_work_for_each(dims):
    rng = np.random.default_rng(2)
    for _ in range(2000):
        batch, len_q = int(rng.integers(1, 300)), int(rng.integers(1, 17))
        heads_kv, group = int(rng.choice([1, 2, 8, 32])), int(rng.choice([1, 4, 8]))
        length = int(rng.integers(1, 1 << 17))
        splits = _jax_fa.decode_splits(batch, len_q, heads_kv * group, heads_kv, *dims, length)
        assert 1 <= splits <= 256
        if splits > 1:
            rows = splits * batch * len_q * heads_kv * group
            assert rows * (dims[1] + 1) * 4 <= 64 << 20
            assert length // splits >= 32


def test_few_rows_are_split_into_clusters_that_run_at_once():
    for batch, splits in ((1, 8), (2, 4), (3, 4), (4, 2), (6, 2), (8, 1), (16, 1)):
        assert _jax_fa.decode_splits(batch, 1, 32, 8, 128, 128, 1024, 2) == splits


def test_rows_are_split_no_more_than_memory_needs():
    for batch, length, splits in (
        (64, 8192, 1), (128, 4096, 2), (16, 32768, 2), (4, 131072, 8)
    ):  # fmt: skip
        assert _jax_fa.decode_splits(batch, 1, 32, 8, 128, 128, length, 2) == splits


@pytest.mark.parametrize("key_bytes, grouped", [(0, False), (1, False), (1, True), (2, False)])
def test_decode_splits_of_few_keys_stay_whole(key_bytes, grouped):
    for length in (1, 64, 127):
        assert _jax_fa.decode_splits(4, 1, 32, 8, 128, 128, length, key_bytes, grouped) == 1


def test_scales_of_groups_need_more_blocks():
    cache = jax.ShapeDtypeStruct((64, 8192, 8, 128), jnp.bfloat16)
    q, lengths = jax.ShapeDtypeStruct((64, 32, 128), jnp.bfloat16), jnp.zeros(64, jnp.int32)

    def blocks(size):
        def attend(q, cache):
            x = jax_fa.quantize(cache, "int8", "group" if size else "head", size)
            return jax_fa.decode_attention(q, x, x, lengths)

        (plan,) = jax_fa.explain(attend, q, cache, device="h200")
        return plan.blocks

    assert blocks(None) == 512 and blocks(32) == 1024


def test_parts_of_packed_rows_take_every_step_once_in_equal_shares():
    rng = np.random.default_rng(3)
    candidates = [_jax_fa.part_candidate(i) for i in range(32)]
    assert candidates == sorted(set(candidates)) and candidates[0] == 64
    for _ in range(3000):
        steps, part = int(rng.integers(0, 8192)), int(rng.choice(candidates)) // 16
        begins = _jax_fa.parts_of_row(steps, part)
        sizes = np.diff(begins)
        assert begins[0] == 0 and begins[-1] == steps
        assert sizes.max() <= part and sizes.max() - sizes.min() <= 1
        assert steps == 0 or sizes.min() > 0


def test_scratch_of_packed_rows_is_bounded_and_holds_a_fixed_split():
    rng = np.random.default_rng(4)
    for _ in range(2000):
        batch, heads_kv = int(rng.integers(1, 2000)), int(rng.choice([1, 2, 8, 32]))
        group = int(rng.choice([1, 3, 4, 8, 16, 40]))
        dim, dim_v = (int(x) for x in rng.choice([64, 128, 256], 2))
        length, split = int(rng.integers(1, 1 << 17)), int(rng.integers(1, 5000))
        shape = batch, heads_kv * group, heads_kv, dim, dim_v, length
        for size in (0, split):
            columns, part_keys = _jax_fa.packed_scratch(*shape, size)
            assert columns * (dim_v + 1) * 4 <= 96 << 20
            assert part_keys >= size and (size == 0) == (part_keys == 0)
        parts = -(-length // part_keys)
        row_columns = _jax_fa.decode_max_len_q(group) * group
        assert parts <= 256
        assert parts == 1 or parts * batch * heads_kv * row_columns <= columns


def test_explain_names_kernels_and_counts_work():
    q = jax.ShapeDtypeStruct((2, 1024, 8, 64), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((2, 1024, 2, 64), jnp.bfloat16)

    def layers(q, k):
        def layer(q, _):
            return jax_fa.flash_attention(q, k, k, causal=True), None

        return jax.lax.scan(layer, q, None, length=3)[0]

    (call,) = jax_fa.explain(jax.jit(layers), q, k, device="h200")
    assert (call.primitive, call.count, call.kernel) == ("jax_fa_fwd", 3, "sm90/fwd")
    pairs = 1024 * 1025 / 2
    assert call.flops == 4 * 64 * 8 * 2 * pairs
    assert call.bytes == 2 * (2 * q.size + 2 * k.size) + 4 * 2 * 8 * 1024
    assert call.roofline_us == pytest.approx(max(call.flops / 780e6, call.bytes / 4560e3))


def test_queries_that_see_keys_are_the_interval_of_the_definition():
    rng = np.random.default_rng(3)
    for _ in range(1000):
        len_q, len_kv, left, right = _random_mask(rng)
        top_left = bool(rng.integers(2))
        key0 = int(rng.integers(len_kv + 5))
        key1 = key0 + int(rng.integers(1, 33))  # may reach past the last key
        lo, hi = _jax_fa.seeing_queries(key0, key1, len_q, len_kv, left, right, top_left)
        seeing = _visible(len_q, len_kv, left, right, top_left)[:, key0:key1].any(1).nonzero()[0]
        if len(seeing):
            assert (lo, hi) == (seeing[0], seeing[-1] + 1)
        else:
            assert lo >= hi


def test_explain_of_a_gradient_names_its_kernels():
    def kernels(dtype, device, head_dim=64, **options):
        q = jax.ShapeDtypeStruct((1, 64, 2, head_dim), dtype)
        grad = jax.grad(
            lambda q: jax_fa.flash_attention(q, q, q, **options).astype(jnp.float32).sum()
        )
        return [call.kernel for call in jax_fa.explain(grad, q, device=device)]

    both = "sm80/bwd_keys + sm80/bwd_queries"
    assert kernels(jnp.float32, "a100") == ["sm80/fwd", both]
    assert kernels(jnp.bfloat16, "a100") == ["sm80/fwd", "sm80/bwd_keys"]
    assert kernels(jnp.bfloat16, "a100", 128) == ["sm80/fwd", "sm80/bwd_shared"]
    assert kernels(jnp.bfloat16, "l40s", 128) == ["sm80/fwd", both]  # too little shared memory
    assert kernels(jnp.bfloat16, "a100", deterministic=True) == ["sm80/fwd", both]
    for head_dim in (64, 96, 128, 192, 256):
        assert kernels(jnp.bfloat16, "h200", head_dim) == ["sm90/fwd", "sm90/bwd"]
        assert kernels(jnp.float16, "h200", head_dim, softcap=5.0) == ["sm90/fwd", "sm90/bwd"]
    assert kernels(jnp.float32, "h200") == ["sm80/fwd", both]
    assert kernels(jnp.bfloat16, "a100", 256) == ["sm80/fwd", "sm80/bwd_shared"]
    assert kernels(jnp.bfloat16, "h200", deterministic=True) == ["sm90/fwd", "sm90/bwd"]
    assert kernels(jnp.bfloat16, "h200", 256, deterministic=True) == ["sm90/fwd", "sm90/bwd"]
    assert kernels(jnp.bfloat16, "a100", 256, deterministic=True) == ["sm80/fwd", both]
    bias = jnp.zeros((1, 1, 64, 64))
    assert kernels(jnp.bfloat16, "h200", bias=bias) == ["sm80/fwd", "sm80/bwd_keys"]


@pytest.mark.parametrize(
    "device, len_q, head_dim, tile, warps",
    [
        ("h200", 1, 128, (8, 16, 128), 8), ("a100", 1, 128, (8, 16, 128), 2),
        ("l40s", 1, 128, (8, 16, 128), 2), ("h200", 8, 128, (32, 16, 128), 8),
        ("a100", 8, 128, (16, 16, 128), 4), ("a100", 4, 256, (16, 16, 256), 4),
        ("l40s", 4, 256, (8, 16, 256), 2),
    ],
)  # fmt: skip
def test_blocks_of_decode_fit_shared_memory(device, len_q, head_dim, tile, warps):
    q = jax.ShapeDtypeStruct((1, len_q, 32, head_dim), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((1, 1024, 8, head_dim), jnp.bfloat16)
    lengths = jax.ShapeDtypeStruct((1,), jnp.int32)
    (call,) = jax_fa.explain(jax_fa.decode_attention, q, k, k, lengths, device=device)
    assert (call.tile, call.warps) == (tile, warps)


def test_explain_of_exact_float32_names_its_kernels():
    q = jax.ShapeDtypeStruct((1, 64, 2, 128), jnp.float32)

    def loss(q, bias=None):
        return jax_fa.flash_attention(q, q, q, bias=bias).sum()

    with jax.default_matmul_precision("highest"):
        calls = jax_fa.explain(jax.grad(loss), q, device="h200")
        of_bias = jax_fa.explain(jax.grad(loss, 1), q, jnp.zeros((1, 1, 64, 64)), device="h200")
    assert [call.kernel for call in calls] == ["float32/attention"] * 2
    assert [call.tile for call in calls] == [(64, 64, 128), (32, 32, 128)]
    assert of_bias[1].kernel == "reference" and "gradient of bias" in of_bias[1].reason
    (call,) = jax_fa.explain(loss, q.update(dtype=jnp.bfloat16), device="h200")
    assert call.kernel == "sm90/fwd"


def test_explain_of_a_gradient_without_a_kernel_names_xla():
    q = jax.ShapeDtypeStruct((1, 64, 2, 64), jnp.bfloat16)
    values = jax.ShapeDtypeStruct(q.shape, jnp.int8)
    scale = jax.ShapeDtypeStruct((1, 2, 64, 1), jnp.float32)

    def loss(q, values, scale):
        x = jax_fa.QuantizedArray(values, scale)
        return jax_fa.flash_attention(q, x, x).astype(jnp.float32).sum()

    calls = jax_fa.explain(jax.grad(loss), q, values, scale, device="h200")
    assert [call.kernel for call in calls] == ["sm90/fwd", "reference"]
    assert "k is int8" in calls[1].reason and "XLA" in calls[1].reason


def test_explain_says_why_there_is_no_kernel():
    q = jax.ShapeDtypeStruct((1, 64, 2, 60), jnp.float16)
    (call,) = jax_fa.explain(lambda q: jax_fa.flash_attention(q, q, q), q, device="h200")
    assert call.kernel == "none" and "head dim 60" in call.reason


def explain_heads(dim, dim_v, dtype=jnp.bfloat16, device="h200", grad=False, **options):
    q, k, v = (jax.ShapeDtypeStruct((1, 512, 4, d), dtype) for d in (dim, dim, dim_v))
    fn = lambda q, k, v: jax_fa.flash_attention(q, k, v, **options)  # noqa: E731
    loss = jax.grad(lambda *x: fn(*x).astype(jnp.float32).sum(), (0, 1, 2))
    return jax_fa.explain(loss if grad else fn, q, k, v, device=device)


@pytest.mark.parametrize(
    "dims, kernel, tile",
    [
        ((64, 128), "sm90/fwd", 128),
        ((128, 64), "sm90/fwd", 128),
        ((40, 256), "sm90/fwd", 256),
        ((192, 128), "sm90/fwd", 192),
        ((512, 512), "sm80/fwd", 512),
        ((264, 64), "sm80/fwd", 512),
        ((64, 320), "sm80/fwd", 512),
    ],
    ids=str,
)
def test_explain_of_heads_takes_the_tile_that_holds_keys_and_values(dims, kernel, tile):
    (call,) = explain_heads(*dims)
    assert call.kernel == kernel and call.tile[2] == tile
    assert call.flops == 2 * sum(dims) * 4 * 512 * 512


def test_explain_of_narrow_values_has_wider_tiles_of_keys():
    (wide,), (narrow,), (softcap,) = (
        explain_heads(*dims)
        for dims, softcap in (((192, 192), None), ((192, 128), None), ((160, 96), None))
    )
    assert wide.tile[1] < narrow.tile[1] == softcap.tile[1]
    (portable,) = explain_heads(192, 128, device="a100")
    assert portable.kernel == "sm80/fwd"


def test_explain_of_gradients_of_two_head_dims():
    forward, backward = explain_heads(192, 128, grad=True)
    assert backward.kernel == "sm90/bwd" and backward.tile[2] == 192
    assert backward.flops == 2 * (3 * 192 + 2 * 128) * 4 * 512 * 512
    assert explain_heads(64, 96, grad=True)[1].kernel == "sm90/bwd"
    forward, backward = explain_heads(512, 512, grad=True)
    assert forward.kernel == "sm80/fwd" and backward.kernel == "reference"
    assert "head dim 512 of k; bfloat16 kernels take multiples of 8 up to 256" in backward.reason


def test_explain_of_caches_with_wide_heads_names_the_prefill_kernel():
    def kernel(dim, dim_v):
        q = jax.ShapeDtypeStruct((2, 1, 8, dim), jnp.bfloat16)
        k, v = (jax.ShapeDtypeStruct((2, 4096, 1, d), jnp.bfloat16) for d in (dim, dim_v))
        lengths = jax.ShapeDtypeStruct((2,), jnp.int32)
        (decode,) = jax_fa.explain(jax_fa.decode_attention, q, k, v, lengths, device="h200")
        packed = jax.ShapeDtypeStruct((9, 8, dim), jnp.bfloat16)
        cu = jax.ShapeDtypeStruct((3,), jnp.int32)
        (hybrid,) = jax_fa.explain(
            jax_fa.hybrid_attention, packed, k, v, cu, lengths, device="h200"
        )
        return decode.kernel, hybrid.kernel

    assert kernel(192, 128) == ("decode", "decode, sm90/fwd")
    assert kernel(512, 512) == kernel(64, 512) == ("sm80/fwd", "sm80/fwd")


def test_explain_on_a_gpu_that_is_not_listed(monkeypatch):
    gpu = types.SimpleNamespace(
        device_kind="NVIDIA GeForce RTX 4090", compute_capability="8.9", core_count=128
    )
    x = jnp.zeros((1, 64, 4, 64), jnp.bfloat16)
    for capability, kernel in [("8.9", "sm80/fwd"), ("9.0", "sm90/fwd"), ("7.5", "reference")]:
        gpu.compute_capability = capability
        monkeypatch.setattr(jax, "devices", lambda: [gpu])
        (call,) = jax_fa.explain(jax_fa.flash_attention, x, x, x)
        assert call.kernel == kernel and "nan us" in str(call)


def test_explain_of_nothing():
    q = jnp.zeros((0, 4, 64), jnp.bfloat16)
    starts = jnp.zeros((1,), jnp.int32)

    def varlen(q):
        return jax_fa.flash_attention_varlen(
            q, q, q, starts, starts, max_seqlen_q=1, max_seqlen_k=1
        )

    (call,) = jax_fa.explain(varlen, q, device="h200")
    assert call.flops == 0


@pytest.mark.parametrize(
    "options, message",
    [
        (["--window=-3"], "window must be"),
        (["--softcap=0"], "softcap must be"),
        (["--heads=5", "--kv-heads=2"], "heads"),
        (["--decode", "--kv-dtype=float16"], "float16"),
        (["--kv-dtype=float16"], "float16"),
        (["--page-size=16"], "--page-size must come with --decode"),
    ],
)
def test_the_command_explain_says_what_does_not_fit(options, message, capsys):
    assert cli.main(["explain", "--device=h200", *options]) == 1
    out, err = capsys.readouterr()
    assert not out and err.startswith("jax-fa: error:") and message in err


def test_explain_of_an_unknown_device_lists_those_known():
    with pytest.raises(ValueError, match="h200.*got 'b200'"):
        jax_fa.explain(lambda: None, device="b200")


@pytest.mark.parametrize(
    "rows, tokens, heads, dims, units",
    [
        (2, 301, 3, (96, 64), 2 * 5 * 2 * 2),  # chunks of 64 tokens, keys and values, 2 + 1 heads
        (1, 64, 8, (128, 128), 2 * 4),
        (3, 65, 1, (16, 256), 3 * 2 * 2),
        (0, 64, 8, (128, 128), 0),
    ],
)
def test_scratch_of_copies_of_8_bits(rows, tokens, heads, dims, units):
    assert _jax_fa.copy_scratch(rows, tokens, heads, *dims) == (1 + units, -(-tokens // 8) * 8)


@pytest.mark.skipif(
    not {96, 128, 192} <= set(_jax_fa.head_dims), reason="a build of some head dims alone"
)
@pytest.mark.parametrize(
    "dims, expected",
    [((128, 128), True), ((104, 64), True), ((96, 96), False), ((64, 136), False)],
)
def test_hopper_multiplies_bytes_on_tiles_of_128_dims(dims, expected):
    assert _jax_fa.multiplies_bytes(*dims) == expected
