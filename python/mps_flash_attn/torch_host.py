"""PyTorch as the host of libmfa: its threads and streams, and whether libmfa runs on one of its devices. run.py takes
library() from here, so that the host is known before anything runs on tensors."""

from __future__ import annotations

import torch

from .library import DEVICES, Host, address_of, changed, symbol, use_host
from .library import library as library
from .stats import WAITED, count


def torch_parallel_for() -> int | None:
    """The address of PyTorch's own thread pool, whose type is mfa_parallel_for; None before PyTorch 2.10."""
    return address_of(symbol(torch._C.__file__, "torch_parallel_for"))


def _wait(reason: str) -> None:
    """Waits for all of PyTorch's streams, and counts that. torch.mps.synchronize() waits for the default one, and there
    is no other before PyTorch 2.14."""
    count(WAITED + reason)
    torch.mps.synchronize()  # comes first: it raises what goes wrong, which the other function cannot
    wait_for_all = symbol(None, "_ZN2at3mps24synchronizeAllMPSStreamsENS0_8SyncTypeE")
    if wait_for_all:
        wait_for_all(2)  # at::mps::SyncType::COMMIT_AND_WAIT


use_host(Host(torch.get_num_threads, torch_parallel_for, _wait))


def unavailable_reason(device: torch.device | str) -> str:
    """Why libmfa does not run on this device of this machine; "" if it does."""
    kind = torch.device(device).type
    if kind not in DEVICES:
        return f"devices we run on: {', '.join(DEVICES)}"
    if kind == "mps" and not torch.backends.mps.is_available():
        return "PyTorch finds no mps device on this machine"
    try:
        found = library()
        found.check_supported(changed(found.parse("forward f32 b1 h1 q1 kv1 d64"), device=DEVICES[kind]))
    except (ImportError, MemoryError, OSError, RuntimeError, ValueError) as error:
        return str(error)
    return ""


def is_available(device: torch.device | str = "cpu") -> bool:
    """Whether libmfa is found, and runs on this device of this machine: "cpu", or "mps", Apple's GPU. It is False for
    any other device. The function of this name in mps-flash-attn on PyPI, which has no argument, corresponds to
    is_available("mps")."""
    return not unavailable_reason(device)
