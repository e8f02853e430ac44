"""Activation checkpointing: a call that is computed again for the backward pass goes the way it went in forward.

torch.utils.checkpoint(..., use_reentrant=False) keeps nothing of forward, computes it again in backward, and expects
the same tensors to be saved. Ours saves others than PyTorch's attention. So for such a call it counts whether SDPA was
replaced in forward, not whether it is now: replace_sdpa() may have come, or gone, in between.

What is known of PyTorch's checkpoint: while one runs, its hooks for saved tensors are on top, and hold its frame, which
counts those tensors. So a call has a place in it, the same when it is computed again. A PyTorch before 2.8 does not
show its hooks: there replace_sdpa() has to stay in force until backward is done.
"""

import inspect
import weakref

import torch

# (ignores tracing) -> the innermost (pack, unpack), or None
top_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda _: None)

_replaced = {}  # weak reference to a checkpoint's frame: the places of its calls that came while SDPA was replaced


def is_replaced(hooks, in_force, is_differentiated, done):
    """Whether a call is to go as if SDPA were replaced. `hooks`: what top_hooks() found; `in_force`: whether SDPA is
    replaced now; `is_differentiated()`: whether tensors will be saved; `done()`: called when a checkpoint with such
    calls is gone."""
    found = None if hooks is None else _place(hooks[0])
    if found is None:
        return in_force
    frame, place, is_again = found
    reference = weakref.ref(frame)
    if is_again:
        return place in _replaced.get(reference, ())
    if in_force and is_differentiated():
        if reference not in _replaced:
            reference = weakref.ref(frame, lambda gone: (_replaced.pop(gone, None), done()))
            _replaced[reference] = set()
        _replaced[reference].add(place)
    return in_force


def is_pending():
    """Whether calls may yet be computed again that came while SDPA was replaced."""
    return bool(_replaced)


def _place(pack):
    """(frame, how many tensors it has saved so far, whether it computes again), if this is the hook of a checkpoint."""
    if getattr(pack, "__module__", None) != torch.utils.checkpoint.__name__:
        return None
    pack = inspect.unwrap(pack)
    cells = {name: cell.cell_contents for name, cell in zip(pack.__code__.co_freevars, pack.__closure__ or ())}
    if "frame" in cells:
        return cells["frame"], len(cells["frame"].weak_holders), False
    if "target_frame_ref" in cells and "gid" in cells:
        frame = cells["target_frame_ref"]()
        return frame, frame.recomp_counter[cells["gid"]], True
    return None
