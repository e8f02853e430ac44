"""python -m mps_flash_attn precompile: compiles Metal kernels ahead of time, into the cache or a folder to be shipped.

A kernel's GPU code serves this GPU and this build of macOS; libmfa makes it. A metallib serves any, and spares each
process the translation of the text; it is made by Apple's compiler, where the developer tools are installed.
"""

import itertools
import os
import subprocess

from . import display
from .library import COMPILER, library

_WORDS = {"band": "causal", "softcap": "softcap1"}  # features of kernel keys that the problem grammar says otherwise


def problems(dtypes, head_dims, features, backward):
    """A line for each kernel. `head_dims` are "64" or "192v128"; each of `features` is such as "band+mask_bool"."""
    kernels = [("forward", "q64"), ("forward", "q1")]  # the second is a decode step, which has a kernel of its own
    if backward:
        kernels.append(("backward", "q64"))
    for (pass_, q), dtype, head_dim, feature in itertools.product(kernels, dtypes, head_dims, features):
        words = [_WORDS.get(word, word) for word in feature.split("+") if word != "none"]
        yield " ".join([pass_, dtype, f"b1 h1 {q} kv64", f"d{head_dim}", *words, "metal"])


def metal_compiler(errors):
    """A COMPILER that calls Apple's, whose complaints go into the list; None if it is not installed."""
    # Asked for first: without developer tools xcrun may open a window that offers to install them.
    for command in (["xcode-select", "-p"], ["xcrun", "--find", "metal"]):
        if _call(command).returncode:
            return None

    def compile_texts(texts, count, path, _):
        named = [os.fsdecode(texts[n]) for n in range(count)]
        done = _call(["xcrun", "metal", "-std=metal3.1", "-fno-fast-math", "-o", os.fsdecode(path), *named])
        if done.returncode:
            errors.append(done.stderr.strip())
        return done.returncode

    return COMPILER(compile_texts)


def _call(command):
    try:
        return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    except OSError as error:
        return subprocess.CompletedProcess(command, 127, "", str(error))


def run(dtypes, head_dims, features, backward, folder):
    """Compiles; returns the exit status."""
    found, errors = library(), []
    lines = list(problems(dtypes, head_dims, features, backward))
    packed = list(map(found.parse, lines))
    found.check_supported(packed[0])  # refuses a machine without Metal at once
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
    print(", with metallibs" if compiler else "; without metallibs: Apple's developer tools were not found")
    return 1 if rows else 0
