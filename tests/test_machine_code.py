"""What ptxas made of the Hopper kernels, read from the extension: no GPU is needed."""

import collections
import functools
import importlib.util
import re
import shutil
import subprocess

import pytest

from jax_fa import _jax_fa

KINDS = [
    "full",
    "masked",
    "general",
    "quantized",
    "quantized general",
    "dropout",
    "bytes",
    "copies",
]  # FwdClass, in its order
EIGHT_BITS = ["quantized", "quantized general", "bytes", "copies"]
DTYPES = {"float16": 0, "bfloat16": 1}  # DType
# Tiles of keys and of values, and what has instances on them.
FORWARD = [
    (dim, dim, kind, dtype)
    for dim in _jax_fa.head_dims
    for kind in KINDS
    for dtype in DTYPES
    if dim <= 256 and kind != "bytes" and (kind != "copies" or dim > 64)
]
if 128 in _jax_fa.head_dims:
    FORWARD += [(128, 128, "bytes", "bfloat16")]
if 192 in _jax_fa.head_dims:
    FORWARD += [
        (192, 128, kind, dtype) for kind in KINDS if kind not in EIGHT_BITS for dtype in DTYPES
    ]


def _cuobjdump():
    """A CUDA toolkit's, or that of nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm."""
    package = importlib.util.find_spec("nvidia")
    folders = [f"{path}/cu13/bin" for path in package.submodule_search_locations] if package else []
    return next(filter(None, (shutil.which("cuobjdump", path=p) for p in [None, *folders])), None)


def _dump(*options):
    command = [_cuobjdump(), *options, _jax_fa.__file__]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@functools.cache
def _resources():
    """Of each Hopper kernel, by its mangled name."""
    if not _cuobjdump():
        pytest.skip("cuobjdump is not installed")
    name = r"\S*\d(?:fwd|bwd(?:_pair)?)_sm90I\S*"
    found = re.findall(rf"Function ({name}):\s*(.*)", _dump("-res-usage"))
    if not found:
        pytest.skip("the extension was built without Hopper kernels")
    return {name: dict(re.findall(r"(\w+):(\d+)", usage)) for name, usage in found}


def _kernel(part):
    """The one whose mangled name has that part; it keeps everything in registers."""
    kernel = next(name for name in _resources() if part in name)
    usage = _resources()[kernel]
    assert usage["STACK"] == usage["LOCAL"] == "0"
    return kernel


def _instructions(kernel):
    pattern = r"/\*([0-9a-f]+)\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)([^;]*);"
    found = re.findall(pattern, _dump("-sass", "-fun", kernel))
    return [(int(address, 16), name, operands) for address, name, operands in found]


def _loops(instructions):
    """From the target of each jump back to the jump, the shortest first."""
    places = {address: i for i, (address, _, _) in enumerate(instructions)}
    jumps = [
        (places.get(int(target[1], 16), i + 1), i)
        for i, (_, name, operands) in enumerate(instructions)
        if name.startswith("BRA") and (target := re.search(r"0x([0-9a-f]+)", operands))
    ]
    return sorted((instructions[a : b + 1] for a, b in jumps if a <= b), key=len)


def _loop_with(instructions, name):
    return next(loop for loop in _loops(instructions) if any(name in i[1] for i in loop))


def _products(instructions):
    names = ("HGMMA", "QGMMA")  # of 16 and of 8 bits
    return [operands for _, name, operands in instructions if name.startswith(names)]


def _draws_under_products(instructions):
    """Whether what dropout drew is compared between matrix products and their wait."""
    marks = {"HGMMA": "p", "WARPGROUP.DEPBAR": "w", "HSET2": "d"}

    def mark(name):
        return next((marks[start] for start in marks if name.startswith(start)), "")

    order = "".join(mark(name) for _, name, _ in instructions)
    draws = list(re.finditer("d{16,}", order))
    return draws and all(order[d.start() - 1] == "p" and order[d.end()] == "w" for d in draws)


def _count(instructions):
    count = collections.Counter(name.split(".")[0] for _, name, _ in instructions)
    assert count["LDL"] == count["STL"] == 0
    return count


@pytest.mark.parametrize("dim, dim_v, kind, dtype", FORWARD)
def test_hopper_forward_multiplies_and_copies_as_written(dim, dim_v, kind, dtype):
    part = f"ILi{dim}ELi{dim_v}ELNS_5DTypeE{DTYPES[dtype]}ELNS_8FwdClassE{KINDS.index(kind)}E"
    instructions = _instructions(_kernel(part))
    # producers (and dequantizers or copiers) give registers back, consumers take them
    assert _count(instructions)["USETMAXREG"] == 2 + (kind in EIGHT_BITS)

    products = _products(_loop_with(instructions, "HGMMA"))
    assert any("tnspB" in p for p in products)  # p v
    assert any("tnspB" not in p for p in products)  # q k
    # a group of products each, waited for once: else they would run one by one; of bytes there are
    # those of two formats
    assert sum("gsb0" in p for p in products) == 2 + (kind == "bytes")
    # one copy of each step: warps of a warpgroup leave the loop one by one, and yet run the same
    # products
    groups = sum("gsb0" in p for p in _products(instructions))
    assert groups == (9 if kind == "bytes" else 6)
    count = _count(_loop_with(instructions, "HGMMA"))
    if kind == "dropout":  # two comparisons of each word of p at once
        assert count["HSET2"] >= 16
    if dim <= 128 or kind not in ("general", "quantized general", "dropout"):
        assert count["FMNMX"] <= 4  # no maximum is looked for
    assert _loop_with(instructions, "UTMALDG")


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("general", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [dim for dim in _jax_fa.head_dims if dim <= 256])
def test_hopper_backward_multiplies_and_copies_as_written(dim, dtype, general, dropout):
    part = f"15HopperBwdTraitsILi{dim}ELNS_5DTypeE{DTYPES[dtype]}"
    part += f"ELb{int(general)}ELb{int(dropout)}E"
    instructions = _instructions(_kernel(part))
    # the producers and those of dq give registers back, those of keys take them
    pair = dim > 128
    assert _count(instructions)["USETMAXREG"] == 3 + pair

    products = _products(instructions)
    assert sum("gsb0" in p for p in products) == 5  # a group each, for s, dp, dv, dk and dq
    assert any("tnspA" in p for p in products)  # ds^T k
    if dropout:
        assert _draws_under_products(instructions)
    assert _loop_with(instructions, "UTMALDG")
    assert _loop_with(instructions, "UBLKRED")  # dq is added by bulk copies
    if pair:
        assert _loop_with(instructions, "UBLKCP")  # ds goes to the other block
