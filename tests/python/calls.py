"""Calls of attention and the operators that they run, shared by several test files."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mps_flash_attn import replaced_sdpa, sdpa_stats


def problem(*shape, kv_heads=None, kv_len=None, value_dim=None, dtype=torch.float32):
    *batch, q_len, head_dim = shape or (2, 4, 33, 24)
    kv_len, value_dim = kv_len or q_len + 5, value_dim or head_dim
    kv_batch = [*batch[:-1], kv_heads or batch[-1]]
    return [
        torch.randn(size).to(dtype)
        for size in ((*batch, q_len, head_dim), (*kv_batch, kv_len, head_dim), (*kv_batch, kv_len, value_dim))
    ]


def calls(function, *arguments, **options):
    """(result, outcomes of its calls of SDPA) after replace_sdpa."""
    sdpa_stats(reset=True)
    with replaced_sdpa():
        result = function(*arguments, **options)
    return result, sdpa_stats()


class Seen(TorchDispatchMode):
    """The names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.operators = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.operators.append(function.name())
        return function(*args, **(kwargs or {}))

    def attention(self):
        """Those of them that compute attention."""
        return [name for name in self.operators if "attention" in name]
