"""The replaced torch.nn.functional.scaled_dot_product_attention (SDPA).

replace.py        puts our kernels under PyTorch's operator, and restores PyTorch's
dispatch.py       those kernels: they decide whether libmfa or PyTorch runs a call
run.py            runs a call on libmfa, with results laid out as PyTorch's are
gradients.py      the backward pass, and its own derivatives, which PyTorch's operator computes
compiler_cache.py the tag in the keys of torch.compile's cache
original.py       PyTorch's own operators, for calls that libmfa does not run
torch_mps.py      PyTorch's own kernels on mps, and which calls stay with them
shapes.py         the shapes that SDPA accepts
checkpointing.py  whether SDPA is replaced for a call, also when a checkpoint recomputes it
jagged.py         nested tensors, whose class calls a function of its own
native_mha.py     the evaluation path of nn.MultiheadAttention, which does not call SDPA
"""

from .checkpointing import is_in_force
from .replace import Replacement, replace_sdpa, replaced_sdpa, restore_sdpa

__all__ = ["Replacement", "is_in_force", "replace_sdpa", "replaced_sdpa", "restore_sdpa"]
