"""What the benchmarks run on: its name, its peak rates, its clock."""

import datetime
import importlib.metadata
import os
import platform

import jax
import jaxlib

from jax_fa._explain import DEVICES  # measured or published peak rates, kept in one place

try:
    import pynvml

    pynvml.nvmlInit()
    _HANDLE = pynvml.nvmlDeviceGetHandleByIndex(0)
except Exception:  # no package, no driver or no GPU
    _HANDLE = None

_PEERS = ("flash-attn3-jax", "tokamax", "torch", "fa3-fwd", "nvidia-cudnn-cu13", "cupti-python")


def gpu():
    """The GPU's name, None without one."""
    device = jax.devices()[0]
    return device.device_kind if device.platform == "gpu" else None


def peak():
    """The `Device` with the GPU's peak rates, None where they are not known."""
    name = (gpu() or "").lower()
    return next((device for key, device in DEVICES.items() if key in name), None)


def roofline(flops, moved):
    """Seconds that the hardware needs at least; None where its rates are not known."""
    rates = peak()
    if rates is None:
        return None
    return max(flops / (rates.tflops * 1e12), moved / (rates.gb_per_s * 1e9))


def sm_clock():
    """MHz of the multiprocessors now, None where NVML does not say."""
    if _HANDLE is None:
        return None
    return pynvml.nvmlDeviceGetClockInfo(_HANDLE, pynvml.NVML_CLOCK_SM)


def describe():
    """What a result must say about where it comes from."""
    rates = peak()
    return {
        "gpu": gpu(),
        "driver": None if _HANDLE is None else pynvml.nvmlSystemGetDriverVersion(),
        "cpu": platform.machine(),
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "arch": os.environ.get("JAX_FA_ARCH"),  # the tier that was asked for
        "peers": {name: version for name in _PEERS if (version := _version(name))},
        "peak_tflops": rates and rates.tflops,
        "peak_gb_per_s": rates and rates.gb_per_s,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
