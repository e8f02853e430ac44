"""torch.func: what its transforms (grad, vjp, jacrev, vmap, ...) need beside the rules of operators.py. The only file
that knows functorch, in which each transform is a level, with tensors of its own that wrap those of the level below.
"""

from functools import partial

import torch
from torch.autograd import forward_ad

try:  # PyTorch promises these to nobody
    from torch._C._functorch import _add_batch_dim, get_unwrapped, is_functorch_wrapped_tensor
    from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter
    from torch._functorch.utils import enable_single_level_autograd_function, unwrap_dead_wrappers
    from torch._functorch.vmap import unwrap_batched
except ImportError:
    enable_single_level_autograd_function, unwrap_dead_wrappers = None, tuple

VMAP_KEY = "FuncTorchVmapMode"  # the first that an operator meets in a vmap
_VMAP_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.FuncTorchVmapMode)
_VMAP_KEYS |= torch._C.DispatchKeySet(torch._C.DispatchKey.FuncTorchBatched)

are_active = torch._C._are_functorch_transforms_active
are_supported = enable_single_level_autograd_function is not None


def apply(function, *arguments):
    """function.apply, `function` being a torch.autograd.Function whose forward calls what below() gave. In a rule for
    autograd of an operator, and so at one level, where PyTorch's own apply would begin again at the topmost."""
    if not are_active():
        return function.apply(*arguments)
    if not are_supported:
        raise NotImplementedError(
            f"PyTorch {torch.__version__} cannot differentiate flash_attention under torch.func; use torch.autograd"
        )
    with enable_single_level_autograd_function():
        return super(torch.autograd.Function, function).apply(*arguments)


def below(operator):
    """The operator without its rule for autograd, as a function for the forward of a torch.autograd.Function. Gradients
    are off in there, but to the levels below they are as they are now."""
    if not are_active():
        return partial(beneath_autograd, operator)
    grad, tangents = torch.is_grad_enabled(), torch._C._is_fwd_grad_enabled()

    def run(*arguments):
        with torch.set_grad_enabled(grad), forward_ad._set_fwd_grad_enabled(tangents):
            return beneath_autograd(operator, *arguments)

    return run


def beneath_autograd(operator, *arguments):
    """What the operator gives without its rule for autograd."""
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*arguments)


def unwrapped(tensor):
    """The tensor that has the memory."""
    while is_functorch_wrapped_tensor(tensor):
        tensor = get_unwrapped(tensor)
    return tensor


class Vmap:
    """The vmap in which an operator's rule for it is called."""

    def __init__(self):
        interpreter = retrieve_current_functorch_interpreter()
        self._level, self.size = interpreter.level(), interpreter.batch_size()

    def split(self, operands):
        """(the tensors as the level below has them, the dimension of each that is mapped, None for none)."""
        return unwrap_batched(operands, self._level)

    def below(self):
        """A context in which operators run at the level below."""
        return torch._C._ExcludeDispatchKeyGuard(_VMAP_KEYS)

    def join(self, result):
        """A result of the level below, mapped along its first dimension, as one of this level."""
        return _add_batch_dim(result, 0, self._level)
