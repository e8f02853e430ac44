"""replace_sdpa: puts flash_attention under every torch.nn.functional.scaled_dot_product_attention of this process.

The operator itself is overridden, aten::scaled_dot_product_attention, so that names imported early,
nn.MultiheadAttention and scripted models come here too. It has an autograd key and a plain one for each device: the
first is met in training and evaluation alike, the second under inference_mode. What we do not support, PyTorch's
untouched original computes.
"""

import threading
from collections import Counter

import torch
from torch.autograd import forward_ad

from . import tensors
from .attention import flash_attention
from .library import Unsupported, library

# The least work, in multiply-adds of the forward pass (B * H * L * S * (E + Ev)), that is worth taking over from
# PyTorch: below it the call costs more than the kernel saves. Measured with one thread, forward; may be set.
# float("inf") leaves a dtype to PyTorch altogether.
sdpa_thresholds = {"float32": 1 << 19, "float16": 1 << 16, "bfloat16": 1 << 18, "float64": 1 << 17}

_KEYS = ("CPU", "AutogradCPU")
_HEAD_DIM_MOST = 512
_REPLACED = "replaced"

_lock = threading.Lock()
_handles = set()
_registration = None
_stats = Counter()


class Replacement:
    """What replace_sdpa() returns: in force until remove(), or until the end of its `with` block."""

    def remove(self):
        """Takes this replacement back; PyTorch's own operator returns when the last one is. More than once is good."""
        with _lock:
            _handles.discard(self)
            if not _handles:
                _unregister()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.remove()


def replace_sdpa():
    """Lets scaled_dot_product_attention run on libmfa wherever that supports the call, in the whole process.

        replace_sdpa()                  for good, or until restore_sdpa()
        handle = replace_sdpa()         until handle.remove()
        with replace_sdpa(): ...        in the block

    Replacements nest: PyTorch's own operator is back when all have been removed. ImportError if there is no libmfa."""
    global _registration
    library()
    handle = Replacement()
    with _lock:
        if _registration is None:
            registration = torch.library.Library("aten", "IMPL")
            for key in _KEYS:
                registration.impl("scaled_dot_product_attention", _attention, key)
            _registration = registration
        _handles.add(handle)
    return handle


def restore_sdpa():
    """Removes every replacement: PyTorch's own operator is back."""
    with _lock:
        _handles.clear()
        _unregister()


def sdpa_stats(reset=False):
    """How many calls came by since the start (or since the last reset): under "replaced" those that ran on libmfa, and
    under each reason those that PyTorch's own operator was given."""
    with _lock:
        stats = dict(_stats)
        if reset:
            _stats.clear()
    return stats


def _unregister():
    global _registration
    if _registration is not None:
        _registration._destroy()
        _registration = None


def _count(outcome):
    with _lock:
        _stats[outcome] += 1


def _attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None, enable_gqa=False):
    reason = _objection(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    if reason is None:
        try:
            out = _run(query, key, value, attn_mask, is_causal, scale, enable_gqa)
            _count(_REPLACED)
            return out
        except Unsupported as error:
            reason = str(error)
    _count(reason)
    original = torch.ops.aten.scaled_dot_product_attention.default.decompose
    return original(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)


def _run(query, key, value, mask, is_causal, scale, enable_gqa):
    if query.dim() == 4:
        return flash_attention(query, key, value, is_causal, scale, mask, enable_gqa=enable_gqa)
    if mask is not None and mask.dim() == 3:
        mask = mask.unsqueeze(1)
    return flash_attention(query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1), is_causal, scale, mask).squeeze(1)


def _objection(query, key, value, mask, dropout_p, is_causal, scale, enable_gqa):
    """Why this call is left to PyTorch; None if we take it. What is wrong is left to it too: the error is PyTorch's."""
    for tensor in (query, key, value) if mask is None else (query, key, value, mask):
        if not tensors.is_plain(tensor):
            return "a tensor subclass"
        if not tensor.is_cpu or tensor.layout is not torch.strided or tensor.is_nested:
            return "not dense CPU tensors"
    if not torch._C._get_flash_sdp_enabled():
        return "flash attention is disabled"
    if dropout_p:
        return "dropout"
    if torch._C._are_functorch_transforms_active():
        return "a functorch transform"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation"
    if torch._C._len_torch_dispatch_stack():
        return "a dispatch mode, which is to see the operators inside"
    if query.dtype not in tensors.DTYPES or not query.dtype == key.dtype == value.dtype:
        return "dtypes"
    if scale is not None and scale != scale:
        return "scale is NaN"
    return (
        _objection_to_shapes(query.shape, key.shape, value.shape, enable_gqa)
        or _objection_to_mask(query, key, mask, is_causal)
        or _objection_to_size(query, key, value)
    )


def _objection_to_shapes(query, key, value, enable_gqa):
    if not len(query) == len(key) == len(value) or len(query) not in (3, 4):
        return "not 3 or 4 dimensions"
    if key[:-1] != value[:-1] or query[0] != key[0] or query[-1] != key[-1]:
        return "shapes"
    if len(query) == 4 and query[1] != key[1] and not (enable_gqa and key[1] and query[1] % key[1] == 0):
        return "head counts"
    if len(query) == 3 and enable_gqa:
        return "grouped heads in 3 dimensions"
    if 0 in query or 0 in key or 0 in value:
        return "empty tensors"
    if query[-1] > _HEAD_DIM_MOST or value[-1] > _HEAD_DIM_MOST:
        return f"head_dim above {_HEAD_DIM_MOST}"
    return None


def _objection_to_mask(query, key, mask, is_causal):
    if mask is None:
        return None
    if is_causal:
        return "attn_mask together with is_causal"
    if mask.dtype is not torch.bool and mask.dtype is not query.dtype:
        if mask.dtype is not torch.float32 or query.dtype is torch.float64:
            return "attn_mask dtype"
    scores = (*query.shape[:-1], key.shape[-2])
    if not 2 <= mask.dim() <= len(scores):
        return "attn_mask dimensions"
    if any(given not in (1, full) for given, full in zip(reversed(mask.shape), reversed(scores))):
        return "attn_mask shape"
    return None


def _objection_to_size(query, key, value):
    work = query.numel() // query.shape[-1] * key.shape[-2] * (query.shape[-1] + value.shape[-1])
    return "small" if work < sdpa_thresholds[tensors.dtype_name(query)] else None
