"""A call that is like one before: as models call attention, layer after layer and step after step.

PyTorch's guards, with which compiled code asks whether it may run again, tell in one call whether tensors have the
types, dtypes, devices, shapes and strides of earlier ones, require gradients as those did, and whether autocast and
transforms are as they were. If so, what was found out for the earlier call is not asked again.
"""

import torch
from torch.autograd import forward_ad

from . import run, tensors
from .library import Unsupported
from .operators import EAGER, Attention, count_of_modes, is_differentiated, needs_operator

_apply = super(torch.autograd.Function, Attention).apply  # without its care for transforms, which the guards see
_CONSTANT = (type(None), bool, int, float, str, type)

_known = {}  # what a call is found by: a Known, or None where it came once
_KNOWN_MOST = 1024
_MISSES_MOST = 1  # of one that keeps its place


def find(query, key, value, mask, given):
    """What was kept for arguments like these, or None. `given`: those that are no tensors, and, unless it is
    flash_attention that they were given to, what was."""
    try:
        found = _known.get(_place(query, key, value, mask, given))
    except (AttributeError, RuntimeError, TypeError):
        return None  # these are no tensors, or nested ones, which guards do not survive; or a list is given
    if found is None or forward_ad._current_level >= 0 or count_of_modes():  # not all modes show in the guards
        return None
    alike = found.is_like(query, key, value) if mask is None else found.is_like(query, key, value, mask)
    found.misses = 0 if alike else found.misses + 1
    return found if alike else None


def keep(query, key, value, mask, given, kind, *more):
    """Has find() find a `kind` of Known, made with `more`, when arguments like these come for the second time, if they
    can be told from others; where they take the place of others, only if those stay away."""
    if not all(map(_is_constant, given)):
        return
    place = _place(query, key, value, mask, given)
    if place not in _known:
        if len(_known) >= _KNOWN_MOST:
            _known.clear()
        _known[place] = None
        return
    found = _known.get(place)
    if found is None or found.misses > _MISSES_MOST:
        is_like = _guard(query, key, value) if mask is None else _guard(query, key, value, mask)
        if is_like is not None:
            _known[place] = kind(is_like, query, key, value, mask, *more)


def _place(query, key, value, mask, given):
    of_mask = None if mask is None else mask.shape
    grad = torch.is_grad_enabled(), query.requires_grad
    return query.shape, key.shape, value.shape, of_mask, given, grad


def _is_constant(one):
    return type(one) in _CONSTANT or (type(one) is tuple and all(type(number) is int for number in one))


def _guard(*tensors):
    """The function that tells whether others are like these; None if there is none, as for one that is given twice."""
    if not _can_tell or len(set(map(id, tensors))) < len(tensors):
        return None
    return _guard_of(*tensors)


def _guard_of(*tensors):
    sizes, strides = [list(tensor.shape) for tensor in tensors], [list(tensor.stride()) for tensor in tensors]
    guards = torch._C._dynamo.guards.TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
    return guards.check


def _guards_tell():
    """Whether PyTorch has these guards, which it promises nobody, and they tell what we rely on."""
    like = {"dtype": torch.float32, "device": "cpu"}
    first, second = torch.empty(2, 3, **like), torch.empty(2, 3, **like)
    others = (
        torch.empty(3, 3, **like),
        torch.empty(3, 2, **like).t(),
        torch.empty(2, 3, **like).half(),
        torch.empty(2, 3, **like, requires_grad=True),
        torch.empty(2, 3, dtype=torch.float32, device="meta"),
        torch._neg_view(torch.empty(2, 3, **like)),
        torch._efficientzerotensor((2, 3), **like),
        torch.nn.Parameter(second, requires_grad=False),
    )
    try:
        is_like = _guard_of(first)
        return is_like(second) and not any(map(is_like, others))
    except (AttributeError, TypeError):
        return False


_can_tell = _guards_tell()  # if not, no call is like another


class Known:
    """A kind of call."""

    def __init__(self, is_like):
        self.is_like, self.misses = is_like, 0  # whether tensors are like those it came with; how many were not

    def give_way(self):
        """To what keep() is given next in its place."""
        self.misses = _MISSES_MOST + 1


class Repeat(Known):
    """Runs attention on arguments like those it was made for. To `Attention` it is the Call. `options`: lower, upper,
    scale, softcap."""

    def __init__(self, is_like, query, key, value, mask, options, with_lse, route=EAGER, allocate=tensors.like):
        super().__init__(is_like)
        self.options, self.with_lse, self.route = options, with_lse, route
        self.is_differentiated = is_differentiated(query, key, value, mask)
        self.prepared = run.prepare_forward(query, key, value, mask, *options, allocate)
        self.known_backward = None  # (function that tells what is like it, how it is prepared)
        self.backward_misses = 0

    def attend(self, query, key, value, mask):
        if self.is_differentiated:
            return _apply(query, key, value, mask, self)
        out, lse = run.run_forward(self.prepared, query, key, value, mask, self.with_lse)
        return (out, lse) if self.with_lse else out

    def forward(self, query, key, value, mask):
        return run.run_forward(self.prepared, query, key, value, mask, True, True)

    def backward(self, d_out, d_lse, saved, wanted):
        plain = d_lse is None and saved[3] is None and forward_ad._current_level < 0  # [3]: the mask
        if plain and not (torch.is_grad_enabled() or torch.compiler.is_compiling() or count_of_modes()):
            query, key, value, _, out, lse, *low = saved
            known = self.known_backward
            if known is not None and known[0](query, key, value, out, lse, d_out, *low) and known[1].wanted == wanted:
                self.backward_misses = 0
                try:
                    return run.run_backward(known[1], *saved[:6], d_out, None, *low)
                except Unsupported:  # a kernel that is looked for when it is first needed, and not there
                    return self.route.backward(d_out, d_lse, *saved[:6], *self.options, wanted, *low)
            self.backward_misses += 1
            if known is None or self.backward_misses > _MISSES_MOST:
                self._keep_backward(d_out, saved, wanted)
        return self.route.backward(d_out, d_lse, *saved[:6], *self.options, wanted, *saved[6:])

    def _keep_backward(self, d_out, saved, wanted):
        query, key, value, _, out, lse, *low = saved
        given = query, key, value, out, lse, d_out, *low
        if low and low[0].stride() != out.stride():
            return
        is_like = None if needs_operator(*given) else _guard(*given)
        if is_like is not None:
            self.known_backward = is_like, run.prepare_backward(*saved[:6], d_out, None, *self.options, wanted)
