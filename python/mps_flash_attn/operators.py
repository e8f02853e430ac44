"""torch.ops.mfa.attention_forward and attention_backward: what the dispatcher, torch.compile and torch.export know.

Each operator has a kernel, a fake rule (shapes and strides without memory), and rules for autograd, vmap and autocast.
Eager calls go past the dispatcher, which costs more than a small problem takes: both ways meet in one autograd
function, `Attention`, and differ in the Route that it is given.

    attention_forward(query, key, value, mask, lower, upper, scale, softcap) -> (out, lse)
    attention_backward(d_out, d_lse, ..., out, lse, ..., wanted) -> (dQ, dK, dV, dbias), of size 0 where not wanted

Backward takes any `out` and `lse`, so that results merged from several devices work.
"""

import contextlib
import threading
from functools import partial
from typing import Callable, NamedTuple

import torch
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula, sdpa_backward_flop_count, sdpa_flop_count

from . import run, tensors, transforms
from .problem import check, check_saved
from .subclasses import as_plain
from .transforms import beneath_autograd, below

_OPERANDS = "Tensor query, Tensor key, Tensor value, Tensor? mask"
_OPTIONS = "SymInt? lower, SymInt? upper, float? scale, float softcap"
_SCHEMAS = (
    f"attention_forward({_OPERANDS}, {_OPTIONS}) -> (Tensor out, Tensor lse)",
    f"attention_backward(Tensor d_out, Tensor? d_lse, {_OPERANDS}, Tensor out, Tensor lse, {_OPTIONS}, bool[] wanted)"
    " -> (Tensor dQ, Tensor dK, Tensor dV, Tensor dbias)",
)
# Compiled code then gives our kernels the strides that the fake rule saw; a PyTorch without this tag keeps their order.
_TAGS = tuple(
    getattr(torch.Tag, name) for name in ("pt2_compliant_tag", "needs_exact_strides") if hasattr(torch.Tag, name)
)

count_of_modes = torch._C._len_torch_dispatch_stack

_registration = torch.library.Library("mfa", "FRAGMENT")
for _schema in _SCHEMAS:
    _registration.define(_schema, tags=_TAGS)
attention_forward = torch.ops.mfa.attention_forward.default
attention_backward = torch.ops.mfa.attention_backward.default


# --- Kernels and fake rules ----------------------------------------------------------------------


def _absent_as_empty(gradients, query):
    """An operator returns tensors only."""
    return tuple(query.new_empty(0) if gradient is None else gradient for gradient in gradients)


def _forward(query, key, value, mask, *options):
    return run.forward(*as_plain(query=query, key=key, value=value, attn_mask=mask), *options)


def _backward(d_out, d_lse, query, key, value, mask, out, lse, *options):
    gradients = as_plain(d_out=d_out, d_lse=d_lse)
    query, *others = as_plain(query=query, key=key, value=value, attn_mask=mask, out=out, lse=lse)
    return _absent_as_empty(run.backward(*gradients, query, *others, *options), query)


for _key in (name.upper() for name in tensors.DEVICES):
    _registration.impl("attention_forward", _forward, _key)
    _registration.impl("attention_backward", _backward, _key)


@torch.library.register_fake("mfa::attention_forward", lib=_registration)
def _(query, key, value, mask, lower, upper, scale, softcap):
    check(query, key, value, mask)
    return tensors.like(query, value.shape[3]), tensors.empty_rows(query)


@torch.library.register_fake("mfa::attention_backward", lib=_registration)
def _(d_out, d_lse, query, key, value, mask, out, lse, lower, upper, scale, softcap, wanted):
    check(query, key, value, mask)
    check_saved(query, value, out, lse, d_out, d_lse)
    return _absent_as_empty(map(tensors.gradient, (query, key, value, mask), wanted), query)


@register_flop_formula(torch.ops.mfa.attention_forward)
def _(query, key, value, *_, out_shape=None, **__):
    return sdpa_flop_count(query, _ungrouped(key, query), _ungrouped(value, query))


@register_flop_formula(torch.ops.mfa.attention_backward)
def _(d_out, d_lse, query, key, value, *_, out_shape=None, **__):
    return sdpa_backward_flop_count(d_out, query, _ungrouped(key, query), _ungrouped(value, query))


def _ungrouped(shape, query):
    return (shape[0], query[1], *shape[2:])


# --- Autograd ------------------------------------------------------------------------------------


class Route(NamedTuple):
    """How a Call reaches libmfa."""

    forward: Callable  # (query, key, value, mask, lower, upper, scale, softcap) -> (out, lse) or (out, lse, out_low)
    backward: Callable  # the arguments of attention_backward, then out_low if there is one -> gradients, or None each


class Call(NamedTuple):
    """What `Attention` is to do."""

    route: Route
    options: tuple  # lower, upper, scale, softcap
    with_lse: bool

    def forward(self, query, key, value, mask):
        return self.route.forward(query, key, value, mask, *self.options)

    def backward(self, d_out, d_lse, saved, wanted):
        return self.route.backward(d_out, d_lse, *saved[:6], *self.options, wanted, *saved[6:])


class Attention(torch.autograd.Function):
    """out, or (out, lse), differentiable once. As few arguments and results as can be: each costs."""

    @staticmethod
    def forward(ctx, query, key, value, mask, call):
        out, lse, *low = call.forward(query, key, value, mask)
        ctx.save_for_backward(query, key, value, mask, out, lse, *low)
        ctx.set_materialize_grads(False)
        ctx.call = call
        return (out, lse) if call.with_lse else out

    @staticmethod
    def backward(ctx, d_out, d_lse=None):
        saved = ctx.saved_tensors
        if d_out is None:
            d_out = tensors.incoming(None, saved[4])
        dq, dk, dv, dbias = ctx.call.backward(d_out, d_lse, saved, ctx.needs_input_grad[:4])
        return dq, dk, dv, dbias, None

    @staticmethod
    def jvp(ctx, *_):
        _refuse_tangents()


def by_operator(d_out, d_lse, query, key, value, mask, out, lse, lower, upper, scale, softcap, wanted, _=None):
    """Route.backward through the dispatcher, whose operator takes no out_low: gradients, None where not wanted."""
    gradients = attention_backward(
        d_out, d_lse, query, key, value, mask, out, lse, lower, upper, scale, softcap, list(wanted)
    )
    return tuple(gradient if asked else None for gradient, asked in zip(gradients, wanted))


class _Gradients(torch.autograd.Function):
    """The gradients as a function of their own. Without it autograd would take them for constants, and a second
    derivative would be wrong without a word."""

    @staticmethod
    def forward(ctx, run, second, d_out, d_lse, query, key, value, mask, out, lse, *options):
        ctx.save_for_backward(d_out, query, key, value, mask)
        ctx.set_materialize_grads(False)
        ctx.second, ctx.options = second, options
        return run(d_out, d_lse, query, key, value, mask, out, lse, *options)

    @staticmethod
    def backward(ctx, *incoming):
        d_out, *operands = [None] * 5
        if any(one is not None for one in incoming):
            d_out, *operands = ctx.second(incoming, *ctx.saved_tensors, *ctx.options)
        return None, None, d_out, None, *operands, None, None, *(None for _ in ctx.options)

    @staticmethod
    def jvp(ctx, *_):
        _refuse_tangents()


def _refuse_second(*_):
    raise NotImplementedError(
        "flash_attention has no second derivative; for that use scaled_dot_product_attention with "
        "torch.nn.attention.sdpa_kernel(SDPBackend.MATH)"
    )


def _refuse_tangents():
    raise NotImplementedError(
        "flash_attention has no forward-mode differentiation (jvp, jacfwd, hessian); use reverse mode (grad, vjp, "
        "jacrev), or scaled_dot_product_attention with torch.nn.attention.sdpa_kernel(SDPBackend.MATH)"
    )


class _Rules(threading.local):
    """What the operators do for autograd, in calls made by this thread."""

    def __init__(self):
        self.backward = by_operator  # of attention_forward, see Route
        self.second = _refuse_second  # of attention_backward, see differentiated_by()


@contextlib.contextmanager
def differentiated_by(backward=by_operator, second=_refuse_second):
    """In the block attention_forward is differentiated by `backward`, a Route's, and the gradients that come from
    attention_backward by `second`: (incoming, d_out, query, key, value, mask, lower, upper, scale, softcap, wanted) ->
    gradients of d_out, query, key, value and mask. `incoming` are those of dQ, dK, dV and dbias, None where there is
    none."""
    before = _rules.backward, _rules.second
    _rules.backward, _rules.second = backward, second
    try:
        yield
    finally:
        _rules.backward, _rules.second = before


def is_differentiated(*operands):
    """Whether autograd has to know. In forward mode always: it then refuses a tangent, instead of losing it."""
    if forward_ad._current_level >= 0:
        return True
    if torch.is_grad_enabled():
        for tensor in operands:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def needs_operator(*given):
    """Whether a rule of the dispatcher is to see this call: one for vmap, for modes, or for the tensors' own class."""
    if transforms.are_active() or count_of_modes():
        return True
    for tensor in given:
        if not tensors.is_plain(tensor):
            return True
    return False


def _eager_backward(d_out, d_lse, *arguments):
    given = (d_out,) if d_lse is None else (d_out, d_lse)
    # One that is traced, one to be differentiated again, one with a tangent, or a batch of gradients.
    differentiated = torch.is_grad_enabled() or forward_ad._current_level >= 0
    if torch.compiler.is_compiling() or differentiated or needs_operator(*given):
        return by_operator(d_out, d_lse, *arguments)
    return run.backward(d_out, d_lse, *arguments)


def _seen_forward(operator, *arguments):
    """Route.forward through the dispatcher, by an operator that below() gave while gradients were still on. Seen by
    modes, it gives zeros for out_low: so it saves as many tensors as EAGER does, by which a checkpoint may compute
    again what came this way."""
    out, lse = operator(*arguments)
    if tensors.has_low(out) and tensors.is_plain(out) and not torch.compiler.is_compiling():
        return out, lse, torch.zeros_like(out)
    return out, lse


EAGER = Route(run.forward_for_backward, _eager_backward)
_rules = _Rules()
_AS_IT_IS = contextlib.nullcontext()


def _last_level():
    """A context without the rules in force, where this is the last level that they are for: what hooks and modes call
    from there are calls of their own."""
    if transforms.are_active() or (_rules.backward is by_operator and _rules.second is _refuse_second):
        return _AS_IT_IS
    return differentiated_by()


def _forward_with_autograd(query, key, value, mask, *options):
    backward = _rules.backward
    with _last_level():
        if is_differentiated(query, key, value, mask):
            call = Call(Route(partial(_seen_forward, below(attention_forward)), backward), options, True)
            return transforms.apply(Attention, query, key, value, mask, call)
        return beneath_autograd(attention_forward, query, key, value, mask, *options)


def _backward_with_autograd(d_out, d_lse, query, key, value, mask, out, lse, *options):
    arguments, second = (d_out, d_lse, query, key, value, mask, out, lse, *options), _rules.second
    with _last_level():
        if is_differentiated(d_out, d_lse, query, key, value, mask, out, lse):
            return transforms.apply(_Gradients, below(attention_backward), second, *arguments)
        return beneath_autograd(attention_backward, *arguments)


_registration.impl("attention_forward", _forward_with_autograd, "Autograd")
_registration.impl("attention_backward", _backward_with_autograd, "Autograd")


# --- Autocast ------------------------------------------------------------------------------------


def _register_autocast(key):
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def cast_and_run(query, key, value, mask, *options):
        operands = tensors.autocast(query, key, value, mask)
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return attention_forward(*operands, *options)

    _registration.impl("attention_forward", cast_and_run, key)


for _key in ("AutocastCPU", "AutocastCUDA", "AutocastMPS"):
    if hasattr(torch._C.DispatchKey, _key):
        _register_autocast(_key)


# --- vmap: the mapped dimension becomes a part of the batch --------------------------------------


def fold(tensor, dimension, size):
    """(size * batch, ...)."""
    if tensor is None:
        return None
    tensor = tensor.expand(size, *tensor.shape) if dimension is None else tensor.movedim(dimension, 0)
    return tensor.flatten(0, 1)


def fold_mask(mask, dimension, size, batch):
    """The same for a mask, which has its dimensions, and its batch, only as far as it needs them."""
    if mask is None:
        return None
    mask = mask.expand(size, *mask.shape) if dimension is None else mask.movedim(dimension, 0)
    mask = mask.reshape(size, *(1,) * (5 - mask.dim()), *mask.shape[1:])
    return mask.expand(size, batch, *mask.shape[2:]).flatten(0, 1)


def _vmap_forward(info, dimensions, query, key, value, mask, *options):
    size = info.batch_size
    query, key, value = (fold(t, d, size) for t, d in zip((query, key, value), dimensions))
    batch = query.shape[0] // size
    mask = fold_mask(mask, dimensions[3], size, batch)
    results = attention_forward(query, key, value, mask, *options)
    return tuple(result.unflatten(0, (size, batch)) for result in results), (0, 0)


def _vmap_backward(info, dimensions, d_out, d_lse, query, key, value, mask, out, lse, *options):
    size, wanted = info.batch_size, options[-1]
    mask_shape = _without(mask, dimensions[5])
    operands = [fold(t, d, size) for t, d in zip((d_out, d_lse, query, key, value), dimensions)]
    batch = operands[0].shape[0] // size
    operands.append(fold_mask(mask, dimensions[5], size, batch))
    operands += [fold(t, d, size) for t, d in zip((out, lse), dimensions[6:])]
    *gradients, dbias = (
        gradient.unflatten(0, (size, batch)) if asked else gradient
        for gradient, asked in zip(attention_backward(*operands, *options), wanted)
    )
    if wanted[3]:
        while dbias.dim() > 1 + len(mask_shape):
            dbias = dbias.sum(1)
        dbias = dbias.sum_to_size(size, *mask_shape)
    return (*gradients, dbias), tuple(0 if asked else None for asked in wanted)


def _without(tensor, dimension):
    """The shape that one sample of a vmap sees."""
    if tensor is None or dimension is None:
        return None if tensor is None else tuple(tensor.shape)
    return tuple(size for place, size in enumerate(tensor.shape) if place != dimension)


if hasattr(torch.library, "register_vmap"):  # PyTorch 2.5 or later; an earlier one runs the operator in a loop
    torch.library.register_vmap("mfa::attention_forward", _vmap_forward, lib=_registration)
    torch.library.register_vmap("mfa::attention_backward", _vmap_backward, lib=_registration)
