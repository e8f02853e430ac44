"""Programs that begin with PyTorch and the package imported: each is a fork of one process that has done so, since
imports take longer than most of them."""

import multiprocessing
import os
import runpy
import sys
from pathlib import Path


def _main(path, output, arguments, settings):
    with open(output, "w") as to:
        os.dup2(to.fileno(), sys.stdout.fileno())
        os.dup2(to.fileno(), sys.stderr.fileno())
    os.environ.update(settings)
    sys.argv = [str(path), *arguments]
    sys.path.insert(0, str(path.parent))
    runpy.run_path(str(path), run_name="__main__")


def run(path, folder, seconds, arguments=(), **settings):
    """Runs a program, with arguments and settings of the environment; its exit code (None: it hangs) and its output."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["torch", "torch._dynamo", "mps_flash_attn"])
    output = Path(folder) / "output"
    process = processes.Process(target=_main, args=(path, output, arguments, settings))
    process.start()
    process.join(seconds)
    code = process.exitcode
    if code is None:
        process.kill()
        process.join()
    return code, output.read_text() if output.exists() else ""
