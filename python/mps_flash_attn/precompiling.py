"""python -m mps_flash_attn precompile: compiles Metal kernels ahead of time, into the cache or a folder to be shipped.

libmfa makes the GPU code of a kernel, which is valid for this GPU and this build of macOS. Apple's compiler, where the
developer tools are installed, makes a metallib, which is valid for any, and from which no process has to compile the
source again.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from . import display
from .library import COMPILER, library

# A feature in kernel keys: its name in the problem grammar.
_WORDS = {
    "band": "causal",
    "softcap": "softcap1",
    "dropout": "dropout0.5",
    "block_map": "block_map_q64 block_map_kv64",
    "varlen": "seqused_k",
    "paged": "kv_batch1 page_size16",
}


def problems(dtypes: Iterable[str], head_dims: Iterable[str], features: Iterable[str], backward: bool) -> Iterator[str]:
    """A line for each kernel. `head_dims` are "64" or "192v128"; each of `features` is such as "band+mask_bool"."""
    # A tile for many rows and one for few, and decode steps of up to 8 rows and of up to 2.
    kernels = [("forward", "q64"), ("forward", "q16"), ("forward", "q8"), ("forward", "q1")]
    if backward:
        kernels.append(("backward", "q64"))
    for (pass_, q), dtype, head_dim, feature in itertools.product(kernels, dtypes, head_dims, features):
        if pass_ == "backward" and "paged" in feature.split("+"):
            continue  # pages have no backward pass
        words = [_WORDS.get(word, word) for word in feature.split("+") if word != "none"]
        yield " ".join([pass_, dtype, f"b1 h1 {q} kv64", f"d{head_dim}", *words, "metal"])


def metal_compiler(errors: list[str]) -> Any:
    """A COMPILER that calls Apple's, and appends its errors to the list; None if it is not installed. Warns on stderr
    if xcrun finds it and cannot run it."""
    # xcode-select comes first: without developer tools xcrun may open a window that offers to install them.
    for command in (["xcode-select", "-p"], ["xcrun", "--find", "metal"]):
        if _call(command).returncode:
            return None
    # From Xcode 26 on, the compiler is a part of the Metal Toolchain, which is installed apart.
    done = _call(["xcrun", "metal", "--version"])
    if done.returncode:
        said = " ".join(done.stderr.split()) or f"its status is {done.returncode}"
        print(
            f"warning: xcrun finds Apple's Metal compiler, which does not run, so no metallibs are made: {said}",
            file=sys.stderr,
        )
        return None

    def compile_texts(texts: Any, count: int, path: bytes, _: Any) -> int:
        named = [os.fsdecode(texts[n]) for n in range(count)]
        done = _call(["xcrun", "metal", "-std=metal3.1", "-fno-fast-math", "-o", os.fsdecode(path), *named])
        if done.returncode:
            errors.append(done.stderr.strip())
        return done.returncode

    return COMPILER(compile_texts)


def _call(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    except OSError as error:
        return subprocess.CompletedProcess(command, 127, "", str(error))


def run(
    dtypes: Iterable[str], head_dims: Iterable[str], features: Iterable[str], backward: bool, folder: Path | None
) -> int:
    """Compiles; returns the exit status."""
    found = library()
    errors: list[str] = []
    lines = list(problems(dtypes, head_dims, features, backward))
    packed = list(map(found.parse, lines))
    found.check_supported(packed[0])  # raises at once on a machine without Metal
    compiler = metal_compiler(errors)
    rows = []
    with display.progress(len(lines)) as begin:
        for line, problem in zip(lines, packed):
            begin(line)
            try:
                found.precompile(problem, folder, compiler)
            except (NotImplementedError, ValueError, MemoryError, RuntimeError) as error:
                rows.append((line, " ".join([str(error), *errors])))
                errors.clear()
    if rows:
        display.table("not compiled", rows)
    print(f"{len(lines) - len(rows)} of {len(lines)} kernels are in {folder or 'the cache'}", end="")
    print(", with metallibs" if compiler else "; without metallibs: Apple's Metal compiler was not found")
    return 1 if rows else 0
