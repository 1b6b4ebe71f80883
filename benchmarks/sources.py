"""Says whether the committed results belong to the sources as they are.

    python -m benchmarks.sources

prints the hash of `cuda/` and `jax_fa/`, and each file under `benchmarks/results/` with the hash
that it names; the exit code is 1 if one of them names another, or a GPU has none.
"""

import hashlib
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
_SUFFIXES = {".cc", ".cu", ".cuh", ".h", ".py"}
_HASH = re.compile(r"sources-[0-9a-f]{16}")


def digest(root=ROOT):
    """`sources-<16 hex digits>` of the names and contents of the sources."""
    total = hashlib.sha256()
    for folder in ("cuda", "jax_fa"):
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in _SUFFIXES and "__pycache__" not in path.parts:
                total.update(path.relative_to(root).as_posix().encode() + b"\0")
                total.update(path.read_bytes() + b"\0")
    return f"sources-{total.hexdigest()[:16]}"


def hashes(path):
    """The hashes that a result names."""
    return set(_HASH.findall(path.read_text(errors="replace")))


def main():
    now = digest()
    print(now)
    stale = False
    for folder in sorted(path for path in RESULTS.glob("*") if path.is_dir()):
        named = {path: hashes(path) for path in sorted(folder.iterdir()) if path.suffix != ".svg"}
        named = {path: found for path, found in named.items() if found}
        if not named:
            print(f"{folder.relative_to(ROOT)}: no file names a hash")
            stale = True
        for path, found in named.items():
            current = found == {now}
            stale |= not current
            state = "current" if current else f"stale: {', '.join(sorted(found))}"
            print(f"{path.relative_to(ROOT)}: {state}")
    if not any(RESULTS.glob("*/*")):
        print(f"{RESULTS.relative_to(ROOT)}: no results")
        stale = True
    return int(stale)


if __name__ == "__main__":
    sys.exit(main())
