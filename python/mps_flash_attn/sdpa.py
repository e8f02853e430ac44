"""replace_sdpa: puts libmfa under every torch.nn.functional.scaled_dot_product_attention of this process.

The operator itself is overridden, aten::scaled_dot_product_attention, so that names imported early, scripted and
compiled models come here too. It has an autograd key and a plain one for each device: the first is met in training and
evaluation alike, the second under inference_mode. What we do not run, PyTorch's untouched original computes.
"""

import contextlib
import math
import warnings
from collections import deque
from functools import partial, reduce

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend

from . import checkpointing, dispatch_cache, native_mha, shapes, tensors, transforms
from .after_fork import new_lock
from .checkpointing import top_hooks
from .library import Unsupported, library
from .operators import (
    EAGER,
    Attention,
    Call,
    Route,
    attention_forward,
    by_operator,
    count_of_modes,
    differentiated_by,
    fold,
    fold_mask,
    is_differentiated,
)
from .dispatch_cache import CacheEntry, CachedCall
from .run import forward, forward_for_backward
from .stats import REPLACED, SMALL, count, disabled, flash_is_enabled, small

_TRACERS = (FakeTensor, FunctionalTensor)  # what torch.compile runs a model with to see its operators
_PLAIN, _SEEN, _TRACED = "plain", "seen by modes or transforms", "traced"  # kinds of calls
_CACHE_TAG = "mps_flash_attn"
_is_exporting = getattr(torch.compiler, "is_exporting", lambda: False)  # PyTorch 2.7 or later
_FUSED, _MATH = SDPBackend.FLASH_ATTENTION.value, SDPBackend.MATH.value
_OPERATOR = torch.ops.aten.scaled_dot_product_attention.default
_HAS_GROUPS = any(argument.name == "enable_gqa" for argument in _OPERATOR._schema.arguments)  # PyTorch 2.5 or later

_lock = new_lock(globals(), "_lock")
_handles = set()
_registration = None
_retired_kernels = deque(maxlen=1024)  # kernels that were taken back, which other threads may yet be on the way into


# --- On and off ----------------------------------------------------------------------------------


class Replacement:
    """What replace_sdpa() returns: in force until remove(), or until the end of its `with` block."""

    def remove(self):
        """Takes this replacement back; PyTorch's own operator returns when the last one is. More than once is good."""
        with _lock:
            _handles.discard(self)
            _unregister_unneeded()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.remove()


def replace_sdpa():
    """Lets scaled_dot_product_attention run on libmfa wherever that supports the call, in the whole process. A child
    that is forked has it, one that is spawned has to call this itself.

        replace_sdpa()                  for good, or until restore_sdpa()
        handle = replace_sdpa()         until handle.remove()
        with replaced_sdpa(): ...       in the block

    Replacements nest: PyTorch's own operator is back when all have been removed. ImportError if there is no libmfa."""
    library()
    handle = Replacement()
    with _lock:
        if _registration is None:
            _register()
        _handles.add(handle)
    return handle


@contextlib.contextmanager
def replaced_sdpa():
    """replace_sdpa() for a `with` block, or for each call of a function that this decorates."""
    with replace_sdpa() as handle:
        yield handle


def restore_sdpa():
    """Removes every replacement: PyTorch's own operator is back."""
    with _lock:
        _handles.clear()
        _unregister_unneeded()


def is_in_force():
    """Whether SDPA is replaced, in this process."""
    return bool(_handles)


def _register():
    global _registration
    registration = torch.library.Library("aten", "IMPL")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that vmap has a kernel already
            for key, kernel in _KERNELS.items():
                registration.impl("scaled_dot_product_attention", kernel, key)
        native_mha.register(registration, is_in_force)
    except BaseException:
        registration._destroy()
        raise
    _registration = registration
    _forget_kernels()
    _tag_compiler_cache()


def _unregister_unneeded():
    """PyTorch's own operator is back once nothing is in force; our kernels stay, and lead to it, as long as a
    checkpoint may compute again what they computed."""
    with _lock:
        if not _handles and not checkpointing.is_pending():
            _unregister()


def _unregister():
    """A thread that PyTorch has led to one of our kernels may still wait for the interpreter, and nothing would keep
    that kernel for it: so we do, where PyTorch has a way to, until many others have come and gone."""
    global _registration
    if _registration is not None:
        if hasattr(torch.library, "get_kernel"):
            _retired_kernels.append([*map(partial(torch.library.get_kernel, _OPERATOR), _KERNELS), native_mha.kernel()])
        registration, _registration = _registration, None
        registration._destroy()
        _forget_kernels()
        _tag_compiler_cache(wanted=False)


def _forget_kernels():
    """PyTorch's operator remembers which kernel it has for tensors that are traced; without this, code compiled after
    other code was would have the kernels of that time."""
    getattr(_OPERATOR, "_dispatch_cache", {}).clear()


def _tag_compiler_cache(wanted=True):
    """Compiled code is kept on disk under the code that was compiled, in which there is nothing of us: without a tag,
    processes that know nothing of this package would get code that calls it. The tag is each thread's own, and so is
    set again where a call is traced, which is before the disk is looked at."""
    config = getattr(torch.compiler, "config", None)
    if hasattr(config, "cache_key_tag"):
        bare = config.cache_key_tag.removesuffix(_CACHE_TAG)
        config.cache_key_tag = bare + _CACHE_TAG if wanted else bare


# --- The operator --------------------------------------------------------------------------------


def _attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None, enable_gqa=False):
    hooks = top_hooks(True)
    if (hooks is not None or not _handles) and not _is_replaced(hooks, query, key, value, attn_mask):
        return _original(query, key, value, attn_mask, dropout_p, is_causal, **_named(scale, enable_gqa))
    if not dropout_p:
        cached = dispatch_cache.lookup(query, key, value, attn_mask, _options_key(is_causal, scale, enable_gqa))
        if cached is not None:
            out = _run_cached(cached, query, key, value, attn_mask, is_causal, scale, enable_gqa)
            if out is not None:
                return out
    args = (query, key, value) if attn_mask is None else (query, key, value, attn_mask)
    within, kind = _kind(args)
    if kind is _TRACED and any(map(tensors.is_zero, args)):  # whose memory PyTorch's fused kernel would read
        args = [one.clone() if tensors.is_zero(one) else one for one in (query, key, value, attn_mask)]
        return _attention(*args, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    reason, support = check_support(args, within, kind, dropout_p, is_causal, scale, enable_gqa)
    if reason is None:
        if kind is _TRACED:
            _tag_compiler_cache()
        try:
            run = _run if kind is _PLAIN else _run_by_operator
            out = run(query, key, value, attn_mask, is_causal, scale, enable_gqa, support)
        except Unsupported as error:
            reason = str(error)
        except ValueError:
            if kind is _TRACED or all(map(tensors.is_aligned, within)):
                raise
            reason = "memory that is not aligned to its elements"
        else:
            count("traced into a compiled graph" if kind is _TRACED else REPLACED)
            return out
    count(reason)
    if reason == SMALL and kind is _PLAIN:
        options_key = _options_key(is_causal, scale, enable_gqa)
        dispatch_cache.insert(query, key, value, attn_mask, options_key, _SmallCall, support.work)
    return _original_for(reason)(query, key, value, attn_mask, dropout_p, is_causal, **_named(scale, enable_gqa))


def _is_replaced(hooks, *operands):
    """Whether SDPA is replaced for a call that comes beneath hooks for saved tensors, or after the last replacement."""
    in_force = is_in_force()
    if checkpointing.is_replaced(hooks, in_force, partial(is_differentiated, *operands), _unregister_unneeded):
        return True
    if in_force:
        count("computed again, as PyTorch's operator computed it in forward")
    return False


def _vmapped(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None, enable_gqa=False):
    """The rule for vmap: to the operator at the level below the mapped dimension is a part of the batch, or one more
    before it. What we do not run is mapped as PyTorch does it."""
    hooks = top_hooks(True)
    if (hooks is not None or not is_in_force()) and not _is_replaced(hooks, query, key, value, attn_mask):
        return _original(query, key, value, attn_mask, dropout_p, is_causal, **_named(scale, enable_gqa))
    args = (query, key, value) if attn_mask is None else (query, key, value, attn_mask)
    reason, support = check_support(args, *_kind(args), dropout_p, is_causal, scale, enable_gqa)
    options = _named(scale, enable_gqa)
    if reason is not None:
        count(reason)
        return _original_for(reason)(query, key, value, attn_mask, dropout_p, is_causal, **options)
    vmap = transforms.Vmap()
    operands, dimensions = vmap.split((query, key, value, attn_mask))
    with vmap.below():
        if all(dimension is None for dimension in dimensions):
            return _OPERATOR(*operands, 0.0, is_causal, **options)
        if not support.fits:
            operands = shapes.mapped(*operands, dimensions, vmap.size)
            return vmap.join(_OPERATOR(*operands, 0.0, is_causal, **options))
        batch = query.shape[0]
        *operands, mask = operands
        operands = [fold(tensor, place, vmap.size) for tensor, place in zip(operands, dimensions)]
        mask = fold_mask(mask, dimensions[3], vmap.size, batch)
        out = _OPERATOR(*operands, mask, 0.0, is_causal, **options)
        return vmap.join(out.unflatten(0, (vmap.size, batch)))


def _kind(args):
    """(the tensors that have the memory, what kind of tensors and call this is)."""
    within = args
    if transforms.are_active() and transforms.are_supported:
        within = tuple(map(transforms.unwrapped, args))
    if not all(map(tensors.is_plain, within)):
        return within, _TRACED
    return within, _PLAIN if within is args and not count_of_modes() else _SEEN


def check_support(args, within, kind, dropout_p, is_causal, scale, enable_gqa):
    """(why a call is left to PyTorch, None if we take it; the Support on its shapes, if it got so far)."""
    reason = fallback_reason(within, kind, dropout_p, scale)
    if reason is not None:
        return reason, None
    check = shapes.check_support if kind is _TRACED else shapes.check_support_cached
    mask_shape = args[3].shape if len(args) == 4 else None
    support = check(*(tensor.shape for tensor in args[:3]), mask_shape, is_causal, enable_gqa)
    if support.reason is not None:
        return support.reason, support
    work = support.work
    if within is not args:  # these are of one sample, if there is a vmap
        work *= reduce(torch.sym_max, (one.numel() // each.numel() for one, each in zip(within, args)))
    return small(work, within[0]), support


def fallback_reason(args, kind, dropout_p, scale):
    """Why a call is left to PyTorch, whatever its shapes; None if we take it. What is wrong is left to it too: then the
    error is PyTorch's."""
    if transforms.are_active() and not transforms.are_supported:
        return "a functorch transform"
    if kind is _TRACED:
        for tensor in args:
            if type(tensor) not in _TRACERS and not tensors.is_plain(tensor):
                return tensors.describe_unsupported(tensor)
    if kind is not _PLAIN and _is_exporting():
        return "torch.export"  # a program for other places keeps PyTorch's operator
    reason = disabled()
    if reason is not None:
        return reason
    if dropout_p:
        return "dropout"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation"
    query, key, value = args[:3]
    if query.device.type not in tensors.DEVICES:
        return f"no backend for {query.device.type}"
    if not query.device == key.device == value.device == args[-1].device:
        return "devices"
    if query.dtype not in tensors.DTYPES or not query.dtype == key.dtype == value.dtype:
        return "dtypes"
    mask_dtype = args[-1].dtype  # if there is one
    if mask_dtype is not torch.bool and mask_dtype is not query.dtype:
        if mask_dtype is not torch.float32 or query.dtype is torch.float64:
            return "attn_mask dtype"
    if scale is not None and not 0 < scale < math.inf:
        return "scale is not a positive number"  # with is_causal PyTorch's kernels disagree on what such a one does
    return None


def _named(scale, enable_gqa):
    """The arguments that PyTorch's operators have by name."""
    return {"scale": scale, "enable_gqa": enable_gqa} if _HAS_GROUPS else {"scale": scale}


def _original(*arguments, **options):
    """PyTorch's own operator."""
    return _OPERATOR.decompose(*arguments, **options)


def _math(query, key, value, mask, *arguments, **options):
    """PyTorch's unfused path, which adds its mask, whatever the dtype."""
    if mask is not None and mask.dtype is torch.bool:
        mask = torch.where(mask, 0.0, -math.inf).to(query.dtype)
    return torch.ops.aten._scaled_dot_product_attention_math(query, key, value, mask, *arguments, **options)[0]


def _original_for(reason):
    """What of PyTorch runs a call that is left to it."""
    return _math if reason is shapes.LENGTHS else _original


# --- Calls like one before -----------------------------------------------------------------------


class _SmallCall(CacheEntry):
    """One that was too small."""

    is_replaced = False

    def __init__(self, is_like, query, key, value, mask, work):
        super().__init__(is_like)
        self.work = work


class _ReplacedCall(CachedCall):
    """One that ran on libmfa."""

    is_replaced = True

    def __init__(self, is_like, query, key, value, mask, options, place, work):
        super().__init__(is_like, query, key, value, mask, options, False, _ROUTES[place], _LAYOUTS[place])
        self.place, self.work = place, work


def _options_key(is_causal, scale, enable_gqa):
    """The part of the cache key that is not a tensor."""
    return "scaled_dot_product_attention", is_causal, scale, enable_gqa


def _run_cached(cached, query, key, value, mask, is_causal, scale, enable_gqa):
    """What a call like one before gives; None if what may have changed since has: settings, or where memory lies."""
    if not flash_is_enabled() and disabled():
        return None
    if (small(cached.work, query) is None) is not cached.is_replaced:
        cached.evict()
        return None
    if not cached.is_replaced:
        count(SMALL)
        if mask is None and not is_causal and scale is None and not enable_gqa:
            return _original(query, key, value)  # arguments take time
        return _original(query, key, value, mask, 0.0, is_causal, **_named(scale, enable_gqa))
    if cached.place != _place(query, key, value, mask, is_causal, scale, enable_gqa):
        return None
    try:
        out = cached.attend(query, key, value, mask)
    except (Unsupported, ValueError):
        return None
    count(REPLACED)
    return out


# --- Running -------------------------------------------------------------------------------------


def _place(query, key, value, mask, is_causal, scale, enable_gqa):
    """Which of its kernels PyTorch would run."""
    if query.device.type == "mps":  # it has no other there, and no _fused_sdp_choice
        return _MATH
    return torch._fused_sdp_choice(query, key, value, mask, 0.0, is_causal, **_named(scale, enable_gqa))


def _run(query, key, value, mask, is_causal, scale, enable_gqa, support):
    place = _place(query, key, value, mask, is_causal, scale, enable_gqa)
    if place not in _ROUTES:
        raise Unsupported("PyTorch has no backend for it")
    if not support.fits:
        query, key, value, mask, shape = shapes.four_dimensions(query, key, value, mask, enable_gqa)
    options = (None, 0 if is_causal else None, scale, 0.0)
    if is_differentiated(query, key, value, mask):
        out = Attention.apply(query, key, value, mask, Call(_ROUTES[place], options, False))
    else:
        out, _ = forward(query, key, value, mask, *options, False, _LAYOUTS[place])
    if not support.fits:
        return out.view(shape)
    options_key = _options_key(is_causal, scale, enable_gqa)
    dispatch_cache.insert(query, key, value, mask, options_key, _ReplacedCall, options, place, support.work)
    return out


def _run_by_operator(query, key, value, mask, is_causal, scale, enable_gqa, support):
    """The same by way of torch.ops.mfa, which compilers, dispatch modes and tensors without memory are to see."""
    place = _place_by_operator(query, key, value, mask, is_causal, scale, enable_gqa)
    if place not in _ROUTES:
        raise Unsupported("PyTorch has no backend for it")
    if not support.fits:
        query, key, value, mask, shape = shapes.four_dimensions(query, key, value, mask, enable_gqa)
    with differentiated_by(_BACKWARDS_BY_OPERATOR[place]):
        out, _ = attention_forward(query, key, value, mask, None, 0 if is_causal else None, scale, 0.0)
    if place == _MATH:
        out = out.contiguous()
    elif not _HAS_GROUPS:
        out = out.transpose(1, 2).contiguous().transpose(1, 2)
    return out if support.fits else out.view(shape)


def _place_by_operator(query, key, value, *others):
    """_place(), without an operator that modes would see."""
    if all(map(tensors.is_plain, (query, key, value))):
        with torch._C._DisableTorchDispatch():
            return _place(query, key, value, *others)
    if flash_is_enabled() and shapes.is_fused(query, key, value, others[0]):
        return _FUSED
    return _MATH if torch._C._get_math_sdp_enabled() or query.device.type == "mps" else None


def _backward(original, backward, d_out, d_lse, query, key, value, mask, out, lse, *options):
    """The gradients, which PyTorch's own operator differentiates again. They come from it, too, if they have tangents,
    or if the kernel turns out not to be there, which is looked for when it is first needed."""
    reason = "forward-mode differentiation"
    if forward_ad._current_level < 0:
        try:
            if not torch.is_grad_enabled():
                return backward(d_out, d_lse, query, key, value, mask, out, lse, *options)
            with differentiated_by(second=partial(_second, original)):
                return backward(d_out, d_lse, query, key, value, mask, out, lse, *options)
        except Unsupported as error:
            reason = str(error)
    count(reason)
    return _gradients(original, d_out, query, key, value, mask, *options[:5])


def _second(original, incoming, *arguments):
    """The gradients of d_out, query, key, value and mask, from those of their gradients."""
    count("a second derivative")
    args, options = arguments[:5], arguments[5:]
    places = [place for place, tensor in enumerate(args) if tensor is not None and tensor.requires_grad]
    present = [place for place, gradient in enumerate(incoming) if gradient is not None]

    def first(*args):
        gradients = _gradients(original, *args, *options)
        return tuple(gradients[place] for place in present)

    return _pulled_back(first, args, places, tuple(incoming[place] for place in present))


def _gradients(original, d_out, query, key, value, mask, lower, upper, scale, softcap, wanted):
    """Those of PyTorch's own operator; None where not wanted."""
    options = _named(scale, query.shape[1] != key.shape[1])
    places = [place for place, is_wanted in enumerate(wanted) if is_wanted]

    def attend(*operands):
        return original(*operands, 0.0, upper is not None, **options)

    return _pulled_back(attend, (query, key, value, mask), places, d_out)


def _pulled_back(function, operands, places, incoming):
    """The gradients of the operands in these places, None for the others, from those of what the function gives. Within
    transforms of torch.func by one of them, which knows their levels, but no saved_tensors_hooks."""
    operands = transforms.unwrap_dead_wrappers(operands)
    asked = [operands[place] for place in places]

    def function_of_asked(*asked):
        return function(*_replaced(operands, places, asked))

    if transforms.are_active():
        _, pull = torch.func.vjp(function_of_asked, *asked)
        found = pull(incoming)
    else:
        again = torch.is_grad_enabled()
        with torch.enable_grad():  # as tensors of their own, so that one that was passed twice gets two gradients
            asked = [one.view_as(one) if one.requires_grad else one.detach().requires_grad_() for one in asked]
            results = function_of_asked(*asked)
            found = torch.autograd.grad(results, asked, incoming, create_graph=again, allow_unused=True)
    return _replaced((None,) * len(operands), places, found)


def _replaced(args, places, others):
    """`args`, with others in these places."""
    result = list(args)
    for place, other in zip(places, others):
        result[place] = other
    return result


# Where PyTorch would have run the call: it decides the layout of the result, and whether there is a second derivative.
_ORIGINALS = {_FUSED: _original, _MATH: _math}
_LAYOUTS = {_FUSED: tensors.like if _HAS_GROUPS else tensors.heads_within_rows, _MATH: tensors.dense}
_ROUTES = {
    place: Route(partial(forward_for_backward, allocate=_LAYOUTS[place]), partial(_backward, original, EAGER.backward))
    for place, original in _ORIGINALS.items()
}
_BACKWARDS_BY_OPERATOR = {place: partial(_backward, original, by_operator) for place, original in _ORIGINALS.items()}
_KERNELS = dict.fromkeys(("CPU", "AutogradCPU", "MPS", "AutogradMPS"), _attention)
if transforms.are_supported:
    _KERNELS[transforms.VMAP_KEY] = _vmapped
