"""What a call would run: kernels, tiles, splits, and the time that the hardware allows."""

import dataclasses
import math

import jax
import numpy as np

from . import _jax_fa, _layout, _limits
from ._lowering import (
    BACKWARD,
    as_decode,
    cache_length,
    copies,
    decode_key_bytes,
    decodes,
    has_fp8_keys,
    has_groups,
    prefill_key_bytes,
)
from ._primitives import OPERATIONS


@dataclasses.dataclass(frozen=True)
class Device:
    """Peak rates: TFLOP/s of 16-bit and TF32 matrix products with float32 sums and of float32 ones
    without tensor cores, and GB/s read.

    capability: 10 * major + minor. sms: multiprocessors. shared_kb: KiB of shared memory that a
    block can have.
    """

    name: str
    tflops: float
    tflops_tf32: float
    tflops_float32: float
    gb_per_s: float
    capability: int
    sms: int
    shared_kb: int


# H200: measured (bf16 8192^3 product on random data, read-only stream). Others: data sheets.
DEVICES = {
    device.name: device
    for device in [
        Device("h200", 780, 390, 67, 4560, 90, 132, 227),
        Device("h100", 989, 494, 67, 3350, 90, 132, 227),
        Device("a100", 312, 156, 19.5, 2039, 80, 108, 163),
        Device("l40s", 181, 90, 91.6, 864, 89, 142, 99),
    ]
}

# KiB of shared memory that a block can have, by 10 * major + minor; of others 99.
_SHARED_KB = {80: 163, 87: 163, 90: 227, 100: 227, 103: 227, 110: 227}

_OPERATION = {
    "jax_fa_fwd": "prefill",
    "jax_fa_varlen_fwd": "prefill",
    "jax_fa_decode": "decode",
    "jax_fa_hybrid": "hybrid",
}


@dataclasses.dataclass(frozen=True)
class Call:
    """One attention call of a traced function.

    Attributes:
      primitive: Its name in the jaxpr and the HLO.
      count: How often it runs: the trip counts of the scans around it.
      kernel: The kernel (of a gradient those of the matrix products, and the tile is the first
        one's; "..., copying" where it writes a copy of 8-bit keys and values in q's dtype that it
        reads, "widen, ..." where a launch before it does), or "reference" for what runs through
        XLA.
      reason: Why it is the reference or has no kernel; else empty.
      tile: Queries (decode: heads times tokens), keys and dims of a tile; None without a kernel.
      warps: Warps of a block.
      splits: Parts into which a row's keys are split.
      blocks: Blocks of the grid.
      flops: Of the two matrix products over visible pairs; rows count as full.
      bytes: Of every operand read and every result written once; rows count as full.
      roofline_us: The larger of both divided by the device's rates, in microseconds.
    """

    primitive: str
    count: int
    kernel: str
    reason: str
    tile: tuple[int, int, int] | None
    warps: int
    splits: int
    blocks: int
    flops: float
    bytes: float
    roofline_us: float

    def __str__(self):
        times = f" x {self.count}" if self.count > 1 else ""
        lines = [f"{self.primitive}{times}: {self.kernel}"]
        if self.reason:
            lines.append(f"  {self.reason}")
        if self.tile:
            lines.append(
                f"  tile {' x '.join(map(str, self.tile))}, {self.warps} warps, "
                f"{self.splits} split{'s' * (self.splits > 1)}, {self.blocks} blocks"
            )
        lines.append(
            f"  {self.flops / 1e9:.3g} GFLOP, {self.bytes / 1e6:.3g} MB, "
            f"at best {self.roofline_us:.3g} us"
        )
        return "\n".join(lines)


def explain(fn, *args, device=None):
    """Which kernels a function's attention calls run, and the time that the hardware allows.

    Nothing runs: the function is traced, and the plan is the one that the launches follow.

    Args:
      fn: A function of `args` that calls this library, under `jit` or not.
      *args: Its arguments: arrays or `jax.ShapeDtypeStruct`s.
      device: "h200", "h100", "a100", "l40s": on a machine without that GPU too. None: the GPU of
        this process, whose time at best is nan if it is none of these; without one the reference on
        the CPU.

    Returns:
      A list of `Call`, one for each attention call in the order of the program; print them.

    Raises:
      ValueError: for an unknown device.
    """
    peak = _device(device)
    closed = jax.make_jaxpr(fn)(*args)
    return [_explain(eqn, count, peak) for eqn, count in _calls(closed.jaxpr, 1)]


def _device(name):
    if name is None:
        device = jax.devices()[0]
        kind = device.device_kind.lower()
        listed = (peak for key, peak in DEVICES.items() if key in kind)
        return next(listed, None) or _unlisted(device)
    if name not in DEVICES:
        raise ValueError(f"device must be one of {', '.join(DEVICES)}, got {name!r}")
    return DEVICES[name]


def _unlisted(device):
    """What a GPU says of itself, without peak rates; None if kernels do not run on it."""
    try:
        capability = capability_of(device)
    except (AttributeError, ValueError):  # no NVIDIA GPU
        return None
    if capability < 80:
        return None
    unknown = [math.nan] * 4
    shared_kb = _SHARED_KB.get(capability, 99)
    return Device(device.device_kind, *unknown, capability, device.core_count, shared_kb)


def capability_of(device):
    """10 * major + minor of a GPU."""
    major, minor = (int(x) for x in device.compute_capability.split("."))
    return 10 * major + minor


def _calls(jaxpr, count):
    """Equations of this library's primitives, with how often they run."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in OPERATIONS:
            yield eqn, count
            continue
        length = eqn.params.get("length", 1) if eqn.primitive.name == "scan" else 1
        for value in eqn.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from _calls(inner, count * length)


def _explain(eqn, count, peak):
    name = eqn.primitive.name
    static = dict(eqn.params)
    implementation = static.pop("implementation")
    x = {key: var.aval for key, var in zip(OPERATIONS[name].operands, eqn.invars)}
    reason = _why_reference(name, x, static, implementation, peak)
    moved = sum(_nbytes(var.aval) for var in eqn.outvars) + _operand_bytes(name, x)
    flops = 0.0 if name == "jax_fa_append" else _flops(name, x, static)
    plan = {"kernel": "append", "tile": None, "warps": 0, "splits": 1, "blocks": 0}
    if reason:
        plan["kernel"] = "none" if reason.startswith("no kernel") else "reference"
    elif name in BACKWARD:
        shape = _backward_shape(name, x, static)
        plan = _jax_fa.plan_backward(**shape, **_limits_of(peak))
    elif name in _OPERATION:
        called = name, x, static
        if name == "jax_fa_fwd" and decodes(x, static):
            called = "jax_fa_decode", *as_decode(x, static)
        shape = _plan_shape(*called)
        plan = _jax_fa.plan(_OPERATION[called[0]], **shape, **_limits_of(peak))
    roofline = math.nan
    if peak is not None:
        rate = peak.tflops_tf32 if x["k"].dtype == np.float32 else peak.tflops
        rate = peak.tflops_float32 if static.get("exact") else rate
        roofline = max(flops / (rate * 1e6), moved / (peak.gb_per_s * 1e3))
    return Call(
        name, count, plan["kernel"], reason, plan["tile"], plan["warps"], plan["splits"],
        plan["blocks"], flops, moved, roofline,
    )  # fmt: skip


def _limits_of(peak):
    return {"capability": peak.capability, "sms": peak.sms, "shared_kb": peak.shared_kb}


def _why_reference(name, x, static, implementation, peak):
    if implementation == "reference":
        return "implementation='reference'"
    if peak is None:
        return "no NVIDIA GPU of compute capability 8.0 or later"
    reason = _limits.no_kernel(name, x, static)
    if reason and name in BACKWARD:
        return f"through XLA, recomputed from lse in chunks: {reason}"
    return f"no kernel: {reason}" if reason else ""


def _views(name, x, static):
    layout = static.get("layout", _layout.SEPARATE)
    return _layout.shapes(layout, x["q"].shape, x["k"].shape, x["v"].shape)


def _plan_shape(name, x, static):
    q, k, v = _views(name, x, static)
    copied = name == "jax_fa_fwd" and copies(x, static)
    apart = copied and k[0] != v[0]  # a launch copies rows of keys and of values together
    shape = {
        "heads_q": q[-2],
        "heads_kv": k[-2],
        "head_dim": q[-1],
        "head_dim_v": v[-1],
        "element_bytes": x["q"].dtype.itemsize,
        "kv_bytes": 0 if apart else prefill_key_bytes(x),
        "general": _is_general(x, static),
        "bias": _has_bias(x),
        "masked": _is_masked(static),
        "exact": static["exact"],
        "dropout_rate": static.get("dropout_rate", 0.0),
        "grouped": False,
        "fp8_keys": has_fp8_keys(x),
        "copied": copied,
        "page_size": k[1] if "page_table" in x and len(x["page_table"].shape) == 2 else 0,
    }
    if name == "jax_fa_fwd":
        return shape | {"batch": q[0], "len_q": q[1], "total_q": 0, "max_len_kv": k[1]}
    if name == "jax_fa_decode":
        shape |= {"batch": q[0], "len_q": q[1], "total_q": 0, "max_len_kv": cache_length(x)}
        return shape | {"kv_bytes": decode_key_bytes(x), "grouped": has_groups(x)}
    batch = x["q_start"].shape[0]
    longest = static["max_len_kv"] if name == "jax_fa_varlen_fwd" else cache_length(x)
    return shape | {"batch": batch, "len_q": q[0], "total_q": q[0], "max_len_kv": longest}


def _backward_shape(name, x, static):
    q, k, v = _views(name, x, static)
    packed = "q_start" in x
    return {
        "batch": x["q_start"].shape[0] if packed else q[0],
        "len_q": q[0] if packed else q[1],
        "total_q": q[0] if packed else 0,
        "len_kv": k[0] if packed else k[1],
        "heads_q": q[-2],
        "heads_kv": k[-2],
        "head_dim": q[-1],
        "head_dim_v": v[-1],
        "element_bytes": x["q"].dtype.itemsize,
        "general": _is_general(x, static) or x["k"].dtype != x["q"].dtype,
        "bias": _has_bias(x),
        "masked": _is_masked(static),
        "dropout_rate": static.get("dropout_rate", 0.0),
        "deterministic": static["deterministic"],
        "exact": static["exact"],
    }


def _has_bias(x):
    return "bias" in x and x["bias"].shape != (0,)


def _is_masked(static):
    return static["window_left"] >= 0 or static["window_right"] >= 0


def _is_general(x, static):
    """Whether scores are more than a scaled product."""
    extras = (x[name].shape != (0,) for name in ("slopes", "bias") if name in x)
    return static["scale"] <= 0 or bool(static["softcap"]) or any(extras)


def _nbytes(aval):
    return math.prod(aval.shape) * aval.dtype.itemsize


def _operand_bytes(name, x):
    """Bytes of the operands that a call reads: of a cache the rows that it can see."""
    if name == "jax_fa_append":
        return sum(_nbytes(x[i]) for i in ("k_new", "v_new"))
    total = 0
    for key, aval in x.items():
        if key in ("k", "v", "k_scale", "v_scale") and "kv_lengths" in x and "layer" in x:
            tokens = max(x["k"].shape[0] * x["k"].shape[1], 1)
            total += _nbytes(aval) * x["kv_lengths"].shape[0] * cache_length(x) / tokens
        else:
            total += _nbytes(aval)
    return total


def _flops(name, x, static):
    """2 per product, visible pair and dim: one of H, one of Hv; three and two backward."""
    q, k, v = _views(name, x, static)
    per_pair = 2 * (3 * q[-1] + 2 * v[-1] if name in BACKWARD else q[-1] + v[-1])
    if "q_start" not in x:
        len_kv = k[1] if "layer" not in x else cache_length(x)
        return per_pair * q[0] * q[-2] * _visible(q[1], len_kv, static)
    rows = max(x["q_start"].shape[0], 1)
    len_kv = k[0] / rows if "k_start" in x else cache_length(x)
    return per_pair * rows * q[-2] * _visible(round(q[0] / rows), round(len_kv), static)


def _visible(len_q, len_kv, static):
    """Pairs of a query and a key that it sees."""
    left, right = static["window_left"], static["window_right"]
    center = np.arange(len_q) + (0 if static.get("top_left") else len_kv - len_q)
    hi = np.full(len_q, len_kv) if right < 0 else np.minimum(len_kv, center + right + 1)
    lo = np.zeros(len_q) if left < 0 else np.maximum(0, center - left)
    return float(np.maximum(hi - lo, 0).sum())
