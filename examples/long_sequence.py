"""Memory that grows with the sequence length, not with its square: forward and backward of long sequences.

The scores of the longest one would take 4 GiB in float32; the process's peak memory shows that they are never held.
"""

import resource
import sys

import torch

from mps_flash_attn import explain, flash_attention


def peak_mib():
    """The high-water mark of this process's memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def attend(length):
    q, k, v = (torch.randn(1, 1, length, 64, requires_grad=True) for _ in range(3))
    flash_attention(q, k, v, window_size=1024).sum().backward()
    assert q.grad.isfinite().all()
    return explain(q, k, v, window_size=1024, backward=True).workspace_bytes / 2**20


attend(1024)  # loads the library and starts its threads
start = peak_mib()
for length in (4096, 8192, 16384, 32768):
    workspace = attend(length)
    scores, tensors = length**2 * 4 / 2**20, 8 * length * 64 * 4 / 2**20  # Q, K, V, O and their gradients
    print(
        f"length {length:6}: scores would take {scores:5.0f} MiB, the tensors {tensors:3.0f}, "
        f"the workspace {workspace:4.1f}; the process has grown by {peak_mib() - start:4.0f}"
    )
assert peak_mib() - start < scores / 8
