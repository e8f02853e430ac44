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

_entries = {}  # what a call is found by: a CacheEntry, or None where it came once
_MAX_ENTRIES = 1024
_MAX_MISSES = 1  # of one that keeps its key_of_call


def lookup(query, key, value, mask, options_key):
    """The entry of an earlier call with arguments like these, or None. `options_key`: the arguments that are not
    tensors, after the name of the function unless that is flash_attention."""
    try:
        found = _entries.get(_key(query, key, value, mask, options_key))
    except (AttributeError, RuntimeError, TypeError):
        return None  # not tensors, or nested ones, at which guards crash; or an option is a list
    if found is None or forward_ad._current_level >= 0 or count_of_modes():  # not all modes show in the guards
        return None
    is_match = found.matches(query, key, value) if mask is None else found.matches(query, key, value, mask)
    found.misses = 0 if is_match else found.misses + 1
    return found if is_match else None


def insert(query, key, value, mask, options_key, kind, *state):
    """Makes an entry of class `kind`, with `state`, when arguments like these come for the second time. Nothing is kept
    where no guard can be made. An entry with the same key is replaced only after it was missed."""
    if not all(map(_is_constant, options_key)):
        return
    key_of_call = _key(query, key, value, mask, options_key)
    if key_of_call not in _entries:
        if len(_entries) >= _MAX_ENTRIES:
            _entries.clear()
        _entries[key_of_call] = None
        return
    found = _entries.get(key_of_call)
    if found is None or found.misses > _MAX_MISSES:
        matches = _guard(query, key, value) if mask is None else _guard(query, key, value, mask)
        if matches is not None:
            _entries[key_of_call] = kind(matches, query, key, value, mask, *state)


def _key(query, key, value, mask, options_key):
    of_mask = None if mask is None else mask.shape
    grad = torch.is_grad_enabled(), query.requires_grad
    return query.shape, key.shape, value.shape, of_mask, options_key, grad


def _is_constant(one):
    return type(one) in _CONSTANT or (type(one) is tuple and all(type(number) is int for number in one))


def _guard(*tensors):
    """The function that checks whether other tensors are like these; None if there is none, as where a tensor is passed
    twice."""
    if not _guards_work or len(set(map(id, tensors))) < len(tensors):
        return None
    return _guard_of(*tensors)


def _guard_of(*tensors):
    sizes, strides = [list(tensor.shape) for tensor in tensors], [list(tensor.stride()) for tensor in tensors]
    guards = torch._C._dynamo.guards.TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
    return guards.check


def _check_guards():
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
        matches = _guard_of(first)
        return matches(second) and not any(map(matches, others))
    except (AttributeError, TypeError):
        return False


_guards_work = _check_guards()  # if not, no call is like another


class CacheEntry:
    """A kind of call."""

    def __init__(self, matches):
        self.matches, self.misses = matches, 0  # whether tensors are like those it came with; how many were not

    def evict(self):
        """Lets the next insert() with this key replace the entry."""
        self.misses = _MAX_MISSES + 1


class CachedCall(CacheEntry):
    """Runs attention on arguments like those it was made for. To `Attention` it is the Call. `options`: lower, upper,
    scale, softcap."""

    def __init__(self, matches, query, key, value, mask, options, with_lse, route=EAGER, allocate=tensors.like):
        super().__init__(matches)
        self.options, self.with_lse, self.route = options, with_lse, route
        self.is_differentiated = is_differentiated(query, key, value, mask)
        self.prepared = run.prepare_forward(query, key, value, mask, *options, allocate)
        self.cached_backward = None  # (function that tells what is like it, how it is prepared)
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
            cached = self.cached_backward
            tensors_of_backward = query, key, value, out, lse, d_out, *low
            if cached is not None and cached[0](*tensors_of_backward) and cached[1].wanted == wanted:
                self.backward_misses = 0
                try:
                    return run.run_backward(cached[1], *saved[:6], d_out, None, *low)
                except Unsupported:  # a kernel that is looked for when it is first needed, and not there
                    return self.route.backward(d_out, d_lse, *saved[:6], *self.options, wanted, *low)
            self.backward_misses += 1
            if cached is None or self.backward_misses > _MAX_MISSES:
                self._cache_backward(d_out, saved, wanted)
        return self.route.backward(d_out, d_lse, *saved[:6], *self.options, wanted, *saved[6:])

    def _cache_backward(self, d_out, saved, wanted):
        query, key, value, _, out, lse, *low = saved
        args = query, key, value, out, lse, d_out, *low
        if low and low[0].stride() != out.stride():
            return
        matches = None if needs_operator(*args) else _guard(*args)
        if matches is not None:
            self.cached_backward = matches, run.prepare_backward(*saved[:6], d_out, None, *self.options, wanted)
