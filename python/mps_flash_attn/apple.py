"""What this Mac is: its GPU and its macOS, for reports, and as part of the name of what was measured on it."""

from __future__ import annotations

import platform
import subprocess

import torch

from .explanation import Explanation
from .library import library


def gpu_name() -> str:
    """The name of the GPU, such as "Apple M2 Max"; "" where PyTorch has no mps device."""
    if not torch.backends.mps.is_available():
        return ""
    get_name = getattr(torch.backends.mps, "get_name", None)  # not in every version
    return get_name() if get_name else _output("sysctl", "-n", "machdep.cpu.brand_string") or "unknown"


def gpu_family() -> str:
    """The GPU family for which libmfa has chosen its kernels, such as apple8; "" if it runs on no GPU."""
    return Explanation.of(library().parse("forward f32 b1 h1 q1 kv1 d64 metal")).machine


def macos_version() -> str:
    """The version of macOS, such as "26.2"; "" on another system."""
    return platform.mac_ver()[0]


def macos_build() -> str:
    """The build of macOS, such as "25C56"; "" on another system."""
    return _output("sw_vers", "-buildVersion") if macos_version() else ""


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""
