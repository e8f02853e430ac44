"""attend() for code that torch.compile compiles, which breaks its graph there: messages to other ranks stay outside.
Only such code imports this file, since it imports the compiler."""

import torch

from . import attention

_REASON = "context_parallel_attention exchanges messages with other ranks"

try:
    attend = torch.compiler.disable(attention.attend, reason=_REASON)
except TypeError:  # PyTorch 2.6 takes no reason
    attend = torch.compiler.disable(attention.attend)
