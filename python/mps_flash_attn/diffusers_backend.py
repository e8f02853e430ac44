"""libmfa as an attention backend of diffusers, which its models choose by name. diffusers is imported when the backend
is registered."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from . import tensors
from .attention import flash_attention
from .handles import Registration, check_name
from .library import Unsupported, library
from .operators import attention_backward
from .options import Options
from .problem import DIFFERENTIABLE, NO_MORE
from .stats import REPLACED, count

_active_before: dict[str, Any] = {}  # of each name that is ours: the backend that was active when it was registered
_last: dict[str, object] = {}  # of each name that is ours: an object that stands for its last registration


def register_diffusers(name: str = "mfa") -> Registration:
    """Registers libmfa with diffusers as an attention backend of this name, for

        pipe.transformer.set_attention_backend("mfa")
        with attention_backend("mfa"): ...

    It is flash_attention, forward and backward, with masks, dropout and grouped heads, and, from diffusers 0.42 on, in
    context parallelism (ring and Ulysses attention). Calls that libmfa does not run go to diffusers' "native", and are
    counted in sdpa_stats().

    The result's remove() takes the backend out, after which the one is active that was when it was registered, or
    "native" if there is no such one; where the name was registered anew since, it does nothing. Models that were
    switched to it have to be given another before, model.reset_attention_backend(), and a `with attention_backend` of
    the name, which would restore it, has to have ended. ValueError if the name
    has capital letters, which set_attention_backend() does not pass on, or is that of another backend. ImportError if
    there is no libmfa, or no diffusers of version 0.37 or later, whose backends it needs."""
    library()
    check_name(name)
    if name != name.lower():
        raise ValueError(f'name is "{name}"; it must have no capital letters: set_attention_backend() changes them')
    import diffusers

    try:
        from diffusers.models.attention_dispatch import AttentionBackendName as names
        from diffusers.models.attention_dispatch import _AttentionBackendRegistry as registry
    except ImportError:
        registry = None
    if not hasattr(registry, "set_active_backend"):
        raise ImportError(f"diffusers {diffusers.__version__} has no such attention backends; 0.37 or later is needed")
    backend = names._value2member_map_.get(name)
    if backend is None:
        _active_before[name] = registry._active_backend
        backend = _add_member(names, name)
        # Before 0.42 ring attention takes log-sum-exp in another layout, and its gradients are of one part of the keys.
        is_parallel = tuple(map(int, diffusers.__version__.split(".")[:2])) >= (0, 42)
        registry.register(backend, supports_context_parallel=is_parallel)(diffusers_attention)
    elif name not in _active_before or registry._backends.get(backend) is not diffusers_attention:
        raise ValueError(f'name is "{name}"; it must not be that of another backend')
    own = _last[name] = object()
    return Registration(lambda: _unregister(names, registry, name, own))


def _unregister(names: Any, registry: Any, name: str, own: object) -> None:
    if _last.get(name) is not own:
        return
    del _last[name]
    backend, active = names._value2member_map_.get(name), _active_before.pop(name)
    if registry._backends.get(backend) is not diffusers_attention:  # somebody else has registered the name since
        return
    if registry._active_backend is backend:
        registry.set_active_backend(active if active in registry._backends else names.NATIVE)
    for table in (registry._backends, registry._constraints, registry._supported_arg_names):
        del table[backend]
    registry._supports_context_parallel.discard(name)
    _remove_member(names, backend)


def _add_member(names: Any, value: str) -> Any:
    """A new member of an Enum of strings. diffusers has no other way to add a name."""
    member = str.__new__(names, value)
    member._name_, member._value_ = value.upper(), value
    names._member_map_[member._name_] = names._value2member_map_[value] = member
    names._member_names_.append(member._name_)
    type.__setattr__(names, member._name_, member)
    return member


def _remove_member(names: Any, member: Any) -> None:
    del names._member_map_[member._name_], names._value2member_map_[member._value_]
    names._member_names_.remove(member._name_)
    type.__delattr__(names, member._name_)


def diffusers_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    _parallel_config: Any = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The function that diffusers calls with (B, L, H, D) tensors. The result is (B, L, H, Dv); with return_lse
    (out, lse), where lse is (B, L, H) in float32 (float64 for float64).

        attn_mask         as in scaled_dot_product_attention, or (B, S), which keys of a sample take part
        _parallel_config  of context parallelism. In ring attention each process has a part of the keys: a mask raises
                          ValueError there, since diffusers passes the same one with each part, and so does dropout in
                          context parallelism, since its seed would be another in each

    Unsupported where libmfa does not run the call and diffusers' "native" cannot either: with return_lse, and in
    context parallelism."""
    if attn_mask is not None and attn_mask.shape == (query.shape[0], key.shape[1]):
        attn_mask = attn_mask[:, None, None]
    if _parallel_config is not None:
        from diffusers.models.attention_dispatch import _templated_context_parallel_attention

        _check_parallel(_parallel_config, attn_mask, dropout_p)
        options = attn_mask, dropout_p, is_causal, scale, enable_gqa, return_lse
        functions: Any = {"forward_op": parallel_forward, "backward_op": parallel_backward}
        out = _templated_context_parallel_attention(
            query, key, value, *options, **functions, _parallel_config=_parallel_config
        )
        count(REPLACED)
        return out
    query_t, key_t, value_t = _heads_first(query, key, value)
    try:
        found: Any = flash_attention(
            query_t,
            key_t,
            value_t,
            is_causal,
            scale,
            attn_mask,
            enable_gqa=enable_gqa,
            dropout_p=dropout_p,
            return_lse=return_lse,
        )
    except Unsupported as error:
        if return_lse:
            raise
        count(str(error))
    else:
        count(REPLACED)
        return tuple(one.transpose(1, 2) for one in found) if return_lse else found.transpose(1, 2)
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    native = _AttentionBackendRegistry._backends[AttentionBackendName.NATIVE]
    return native(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)


# --- Context parallelism, which calls the two passes by themselves --------------------------------


def parallel_forward(
    ctx: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    _save_ctx: bool = True,
    _parallel_config: Any = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The forward pass of a part of the keys, without autograd: diffusers has the function for that, whose ctx it
    gives."""
    query_t, key_t, value_t = _heads_first(query, key, value)
    found = flash_attention(query_t, key_t, value_t, is_causal, scale, attn_mask, return_lse=True)
    out, lse = (one.transpose(1, 2) for one in found)
    if _save_ctx:
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.attn_mask, ctx.is_causal, ctx.scale = attn_mask, is_causal, scale
    return (out, lse) if return_lse else out


def parallel_backward(
    ctx: Any,
    grad_out: Tensor,
    *_: Any,
    query: Tensor | None = None,
    key: Tensor | None = None,
    value: Tensor | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    **__: Any,
) -> tuple[Tensor, ...]:
    """The gradients of query, key and value. In ring attention key and value are a part of the keys, out and lse the
    result for all of them; what is None is as parallel_forward() saved it."""
    given = query, key, value, out, lse
    query, key, value, out, lse = (saved if one is None else one for one, saved in zip(given, ctx.saved_tensors))
    lse = lse.to(tensors.rows_dtype(query)).transpose(1, 2)
    d_out, query, key, value, out = _heads_first(grad_out, query, key, value, out)
    options = Options(upper=0 if ctx.is_causal else None, scale=ctx.scale)
    wanted = [place < 3 for place in range(DIFFERENTIABLE)]
    gradients = attention_backward(d_out, None, query, key, value, ctx.attn_mask, *NO_MORE, out, lse, *options, wanted)
    return _heads_first(*gradients[:3])


def _check_parallel(config: Any, attn_mask: Tensor | None, dropout_p: float) -> None:
    if dropout_p:
        raise ValueError(f"dropout_p is {dropout_p}; in context parallelism it must be 0")
    if attn_mask is not None and (config.context_parallel_config.ring_degree or 1) > 1:
        raise ValueError(
            "attn_mask is given in ring attention, where diffusers passes the same one with each part of the keys; it "
            "must be None, or ulysses_degree be used in place of ring_degree"
        )


def _heads_first(*operands: Tensor) -> tuple[Any, ...]:
    """(B, H, L, D) of (B, L, H, D), and the reverse."""
    return tuple(one.transpose(1, 2) for one in operands)
