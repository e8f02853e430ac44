"""Builds the wheels of mps_flash_attn, all of them on one Linux machine: one per platform, for any Python and PyTorch.

    tools/wheels.py [--to FOLDER] [PLATFORM ...]

Platforms: macos-arm64, linux-x86_64, linux-aarch64. A wheel for Linux is named manylinux_2_N after the newest symbol of
glibc that its library really needs, as auditwheel finds it. Run it through `make wheels`, which sees to the compilers.
"""

import argparse
import concurrent.futures
import itertools
import os
import pathlib
import platform
import re
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent


def linux(machine):
    """(platform of the build, CMake's options) for Linux on that machine."""
    if machine == platform.machine():
        return f"linux-{machine}", []
    compiler = f"{machine}-linux-gnu-gcc"
    names = {"SYSTEM_NAME": "Linux", "SYSTEM_PROCESSOR": machine, "C_COMPILER": compiler}
    return f"linux-{machine}", [f"-DCMAKE_{name}={value}" for name, value in names.items()]


PLATFORMS = {
    "macos-arm64": ("macosx-14.0-arm64", [f"-DCMAKE_TOOLCHAIN_FILE={ROOT}/tools/macos/toolchain.cmake"]),
    "linux-x86_64": linux("x86_64"),
    "linux-aarch64": linux("aarch64"),
}


def run(*command, **environment):
    """Runs a command; its output, which is shown if it fails."""
    words = [str(word) for word in command]
    done = subprocess.run(words, env={**os.environ, **environment}, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(words)}\n{done.stdout}{done.stderr}")
    return done.stdout


def build(host, cmake, folder):
    """Builds a wheel for that platform into an empty folder; its path."""
    options = [f"--config-settings=cmake.args={';'.join(cmake)}"] if cmake else []
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--no-deps", "--no-build-isolation")
    run(*pip, *options, "-w", folder, ROOT, _PYTHON_HOST_PLATFORM=host)
    (wheel,) = folder.glob("*.whl")
    return wheel


def name_for_glibc(wheel):
    """Names a wheel for Linux after the glibc that it needs; its new path."""
    found = re.search(r'platform tag:\s*"(manylinux_\w+)"', run(sys.executable, "-m", "auditwheel", "show", wheel))
    if not found:
        sys.exit(f"{wheel.name} needs more than glibc, says auditwheel: it is no manylinux wheel")
    run(sys.executable, "-m", "wheel", "tags", "--remove", "--platform-tag", found[1], wheel)
    (renamed,) = wheel.parent.glob("*.whl")
    return renamed


def make(name, to):
    """Builds the wheel for that platform into the folder; its path."""
    with tempfile.TemporaryDirectory() as folder:
        wheel = build(*PLATFORMS[name], pathlib.Path(folder))
        if name.startswith("linux"):
            wheel = name_for_glibc(wheel)
        made = to / wheel.name
        made.write_bytes(wheel.read_bytes())
    return made


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--to", type=pathlib.Path, default=ROOT / "dist", help="folder for the wheels (default: dist)")
    parser.add_argument("platforms", nargs="*", metavar="PLATFORM", help="only these")
    options = parser.parse_args()
    for name in options.platforms:
        if name not in PLATFORMS:
            parser.error(f"no platform {name}; there are: {' '.join(PLATFORMS)}")
    options.to.mkdir(parents=True, exist_ok=True)
    with concurrent.futures.ThreadPoolExecutor() as pool:  # at once: each ends with a wait for one long file
        for made in pool.map(make, options.platforms or PLATFORMS, itertools.repeat(options.to)):
            print(f"{made}  {made.stat().st_size / 1024:.0f} KiB", flush=True)


if __name__ == "__main__":
    main()
