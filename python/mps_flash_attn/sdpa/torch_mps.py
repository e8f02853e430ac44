"""Which calls of scaled_dot_product_attention stay with PyTorch on mps, because it has a kernel of its own for them.

PyTorch computes attention on mps in one of three ways: by a kernel that does not hold the scores, for the calls in
KERNELS; by a graph of MPSGraph that holds them, for other calls without gradients; and by its composite operator, which
holds them for the backward pass as well. libmfa runs what the first does not. Which is faster where both have a kernel
depends on the Mac: that stays with PyTorch until `python -m mps_flash_attn check --tune` has measured it there.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
from torch import Tensor

from .. import apple, dispatch_cache, thresholds
from ..autograd import is_differentiated
from ..stats import SMALL, TORCH_KERNEL
from ..thresholds import FEW, Thresholds

DEVICE = "mps"

_HALVES = (torch.float16, torch.bfloat16)
_FLOATS = (torch.float32, *_HALVES)


class Kernel(NamedTuple):
    """A kernel of PyTorch's, and which calls without gradients it runs."""

    name: str
    since: str  # the version of PyTorch
    few: bool  # for up to FEW queries, and no more than keys; else for more
    head_dims: tuple[int, ...]  # of query and value alike
    dtypes: tuple[torch.dtype, ...]
    macos: tuple[int, ...] = ()  # the least version of macOS
    is_general: bool = True  # causal calls, masks and grouped heads, too


# The first that matches runs a call. The numbers are those of pull requests of pytorch/pytorch; versions are by the
# release branch that has them.
KERNELS = (
    # #182256, whose results #191794 corrected on macOS 26.
    Kernel("prefill by tensor operations", "2.14", False, (64, 96, 128, 256), _HALVES, (26, 2)),
    # #181575, absent from release/2.12.
    Kernel("prefill", "2.13", False, (32, 64, 72, 80, 96, 128, 256), _FLOATS),
    # #181852 for 256 columns, #181855 for causal calls, #183458 for additive masks, which SDPA makes of bool ones, and
    # #183280 for grouped heads, whose keys and values were copied once for each query head before.
    Kernel("sdpa_vector", "2.13", True, (64, 96, 128, 256), _FLOATS),
    # It came with 2.8 (#152781), but its results were wrong for some calls until 2.11: #163598 (2.9), #169222 (2.10),
    # and those of issue #174861 (2.11). Before, libmfa runs those calls.
    Kernel("sdpa_vector", "2.11", True, (64, 96, 128), _FLOATS, is_general=False),
)

_STRIDED_MACOS = (15,)  # before it, calls with tensors that are not contiguous go to the composite operator
_PREFILL_VARIABLE = "PYTORCH_MPS_DISABLE_PREFILL_ATTENTION"  # PyTorch's own


def macos() -> tuple[int, ...]:
    """The version of macOS as numbers; () on another system."""
    return tuple(int(number) for number in apple.macos_version().split(".") if number.isdigit())


def installed_kernels(version: str = torch.__version__, system: tuple[int, ...] | None = None) -> list[Kernel]:
    """Those of KERNELS that this version of PyTorch has on this version of macOS."""
    system = macos() if system is None else system
    version = torch.torch_version.TorchVersion(version)
    found = [kernel for kernel in KERNELS if version >= kernel.since and system >= kernel.macos]
    is_disabled = os.environ.get(_PREFILL_VARIABLE, "0") != "0"
    return [kernel for kernel in found if kernel.few or not is_disabled]


_kernels = installed_kernels()
_reads_strides = macos() >= _STRIDED_MACOS
_tuned: Thresholds = {}


def load_thresholds() -> None:
    """Reads what `check --tune` measured on this machine, if anything."""
    global _tuned
    found = thresholds.load()
    if found != _tuned:
        dispatch_cache.clear()  # it has calls by the thresholds of before
    _tuned = found


def kernel_of(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, enable_gqa: bool
) -> Kernel | None:
    """PyTorch's own kernel for a call; None if it would hold the scores. The arguments are supported ones."""
    if not query.dim() == key.dim() == value.dim() >= 3 or is_differentiated(query, key, value, mask):
        return None
    if not query.shape[:-3] == key.shape[:-3] == value.shape[:-3] or key.shape[-3] != value.shape[-3]:
        return None
    is_grouped = query.shape[-3] != key.shape[-3]
    if is_grouped and not enable_gqa:
        return None
    if not _reads_strides and not all(tensor.is_contiguous() for tensor in (query, key, value)):
        return None
    if mask is not None and mask.dtype not in (torch.bool, query.dtype):
        return None
    few = _has_few(query)
    q_len, kv_len = query.shape[-2], key.shape[-2]
    if few and isinstance(kv_len, int) and q_len > kv_len:
        return None
    is_plain = mask is None and not is_causal and not is_grouped
    head_dim = _static(query.shape[-1])
    for kernel in _kernels if head_dim == _static(value.shape[-1]) else ():
        if kernel.few is few and head_dim in kernel.head_dims and query.dtype in kernel.dtypes:
            if is_plain or kernel.is_general:
                return kernel
    return None


def fallback_reason(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, enable_gqa: bool, work: int
) -> str | None:
    """Why PyTorch runs a call of this work, in multiply-adds of the forward pass; None if libmfa does. A measured
    threshold decides, for kinds of calls that have one; for others, whether PyTorch has a kernel."""
    if is_differentiated(query, key, value, mask):
        return None
    reason = TORCH_KERNEL if kernel_of(query, key, value, mask, is_causal, enable_gqa) else None
    if not _tuned or mask is not None or query.shape[-1] != value.shape[-1]:
        return reason
    least = _tuned.get(thresholds.Key(query.dtype, _static(query.shape[-1]), _has_few(query), is_causal))
    if least is None:
        return reason
    return (reason or SMALL) if isinstance(work, int) and work < least else None


def _has_few(query: Tensor) -> bool:
    """Whether a call has up to FEW queries. A symbolic length has more, since tracers make 1 a number."""
    length = query.shape[-2]
    return isinstance(length, int) and length <= FEW


def _static(size: int) -> int:
    """A head dimension; 0 if it is symbolic, which no kernel of PyTorch's is compiled for."""
    return size if isinstance(size, int) else 0
