"""libmfa as an implementation of PyTorch's flash attention: of aten::_flash_attention_forward, its backward pass and
their kin, which torch.nn.attention.varlen calls, and which have no kernel on the CPU and on mps.

PyTorch chooses among implementations by torch.nn.attention.activate_flash_attention_impl(name). Tensors are those of
flash-attn: (B, L, H, D), or (total, H, D) with cum_seq_q; heads are grouped where key and value have fewer; the causal
mask and windows are aligned to the last query and key of a sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import attention as torch_attention

from . import calls, dropout, varlen
from .handles import Registration, check_name
from .library import library
from .operators import attention_backward, attention_forward
from .options import Options
from .overrides import Overrides
from .problem import DIFFERENTIABLE, InputsTuple

_registered: dict[str, Callable[[], Overrides]] = {}  # by the names that are ours: what PyTorch calls to activate them


def register_flash_attention_impl(name: str = "mfa") -> Registration:
    """Registers libmfa with PyTorch as a flash attention of this name, for

        torch.nn.attention.activate_flash_attention_impl("mfa")

    From then on torch.nn.attention.varlen.varlen_attn and varlen_attn_out, aten::_flash_attention_forward and
    aten::_scaled_dot_product_flash_attention run on libmfa, with their backward passes, on the CPU and on mps, in
    float32, float16, bfloat16 and, on the CPU, float64. torch.nn.attention.restore_flash_attention_impl() ends that.
    Nothing is activated here, and scaled_dot_product_attention is not changed, for which there is replace_sdpa().

    PyTorch's operator has no gradient with seqused_k, alibi_slopes or block_table: NotImplementedError where one is
    required; in compiled code and under torch.func, in the backward pass. On mps, where that would take a read of the
    device, such gradients are NaN there.

    The result's remove() takes the name out of PyTorch's list, and restores PyTorch's own implementation if this one is
    active; where the name was registered anew since, it does nothing. ValueError if the name is one of another
    implementation; ImportError if there is no libmfa, or if PyTorch has no such list, as before 2.11."""
    library()
    check_name(name)
    if not hasattr(torch_attention, "restore_flash_attention_impl"):
        raise ImportError(
            f"PyTorch {torch.__version__} has no torch.nn.attention.restore_flash_attention_impl; PyTorch 2.11 or "
            "later is needed"
        )
    present = _implementations().get(name)
    if present is not None and present is not _registered.get(name):
        raise ValueError(f'name is "{name}"; it must not be that of another implementation in PyTorch\'s list')

    def activate() -> Overrides:  # a function of its own for each registration, which _unregister() recognises
        return _activate()

    torch_attention.register_flash_attention_impl(name, register_fn=activate)
    _registered[name] = activate
    return Registration(lambda: _unregister(name, activate))


def _unregister(name: str, activate: Callable[[], Overrides]) -> None:
    if _registered.get(name) is not activate:
        return
    del _registered[name]
    if _implementations().get(name) is activate:
        if torch_attention.current_flash_attention_impl() == name:
            torch_attention.restore_flash_attention_impl()
        del _implementations()[name]


def _implementations() -> dict[str, Any]:
    """PyTorch's list, which has no function to take a name out."""
    return torch_attention._registry._FLASH_ATTENTION_IMPLS


def _activate() -> Overrides:
    """What PyTorch calls to activate the implementation; it calls remove() of the result to restore its own."""
    present = {name: kernel for name, kernel in _KERNELS.items() if hasattr(torch.ops.aten, name)}
    return Overrides({(name, key): kernel for name, kernel in present.items() for key in ("CPU", "MPS")})


# --- The kernels, below autograd: PyTorch has the rules for it -----------------------------------


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    seqused_k: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(out, lse, rng_state, unused, debug_mask). lse is (B, H, L), or (H, total). rng_state holds for the backward pass
    the seed of dropout, which PyTorch's generator draws, and whether options were given that have no gradient."""
    _refuse(return_debug_mask, num_splits)
    without_gradient = {"seqused_k": seqused_k, "alibi_slopes": alibi_slopes, "block_table": block_table}
    given = [name for name, tensor in without_gradient.items() if tensor is not None]
    if given and torch.is_grad_enabled() and any(one.requires_grad for one in (query, key, value)):
        raise _without_gradient(given[0])
    seed = dropout.draw(query, 1) if dropout_p else None
    inputs, options = _resolve(
        query,
        key,
        value,
        (cum_seq_q, cum_seq_k, seqused_k, None, None, block_table),
        (max_q, max_k),
        (dropout_p, seed),
        is_causal,
        scale,
        (window_size_left, window_size_right),
        alibi_slopes,
    )
    with torch.autocast(query.device.type, enabled=False):  # flash-attn's functions are not cast
        out, lse = attention_forward(*inputs, *options)
    state = query.new_zeros(2, dtype=torch.int64)
    if seed is not None:
        state[:1] = seed
    if given:  # in compiled code and under torch.func it is not seen here that a gradient will be required
        state[1:] = 1
    unused = query.new_empty((), dtype=torch.int64).view(torch.uint64)
    if cum_seq_q is not None:
        lse = lse.squeeze(0)
    return _as_given(out, cum_seq_q), lse, state.view(torch.uint64), unused, query.new_empty(0)


def _forward_inplace(
    out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    **options: Any,
) -> Tensor:
    """lse; the result is copied to `out`."""
    if dropout_p:
        raise ValueError(f"dropout_p is {dropout_p}; it must be 0 where the result goes to `out`")
    lengths = cum_seq_q, cum_seq_k, max_q, max_k
    found, lse, *_ = _forward(query, key, value, *lengths, 0.0, is_causal, return_debug_mask, **options)
    if out.shape != found.shape or out.dtype != found.dtype:
        given, needed = (f"{tuple(one.shape)} in {one.dtype}" for one in (out, found))
        raise ValueError(f"out is {given}; it must be {needed}")
    out.copy_(found)
    return lse


def _backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    rng_state: Tensor,
    unused: Tensor,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value."""
    is_refused = rng_state.view(torch.int64).flatten()[1:].any()
    if rng_state.device.type != "cpu":
        grad_out = torch.where(is_refused, torch.nan, grad_out)  # to read it would stop the GPU
    elif is_refused:
        raise _without_gradient("seqused_k, alibi_slopes or block_table")
    seed = rng_state.view(torch.int64)[:1] if dropout_p else None
    inputs, options = _resolve(
        query,
        key,
        value,
        (cum_seq_q, cum_seq_k, None, None, None, None),
        (max_q, max_k),
        (dropout_p, seed),
        is_causal,
        scale,
        (window_size_left, window_size_right),
    )
    d_out, out = (_with_heads_first(one, cum_seq_q) for one in (grad_out, out))
    lse = logsumexp if cum_seq_q is None else logsumexp.unsqueeze(0)
    wanted = [place < 3 for place in range(DIFFERENTIABLE)]
    with torch.autocast(query.device.type, enabled=False):
        d_query, d_key, d_value, *_ = attention_backward(d_out, None, *inputs, out, lse, *options, wanted)
    return _as_given(d_query, cum_seq_q), _as_given(d_key, cum_seq_q), _as_given(d_value, cum_seq_q)


def _sdpa_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Any, ...]:
    """The same of (B, H, L, D) tensors: (out, lse, cum_seq_q, cum_seq_k, max_q, max_k, rng_state, unused,
    debug_mask)."""
    query, key, value = (one.transpose(1, 2) for one in (query, key, value))
    lengths = None, None, query.shape[1], key.shape[1]
    if is_causal and query.shape[1] != key.shape[1]:
        raise ValueError(
            f"is_causal is True, with {query.shape[1]} queries and {key.shape[1]} keys; there must be as many, since "
            "PyTorch does not say how its flash attention aligns them"
        )
    out, *others = _forward(query, key, value, *lengths, dropout_p, is_causal, return_debug_mask, scale=scale)
    return out.transpose(1, 2), others[0], *lengths, *others[1:]


def _sdpa_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    philox_seed: Tensor,
    philox_offset: Tensor,
    *,
    scale: float | None = None,
) -> tuple[Tensor, ...]:
    grad_out, query, key, value, out = (one.transpose(1, 2) for one in (grad_out, query, key, value, out))
    more: Any = dropout_p, is_causal, philox_seed, philox_offset
    gradients = _backward(grad_out, query, key, value, out, logsumexp, None, None, max_q, max_k, *more, scale=scale)
    return tuple(one.transpose(1, 2) for one in gradients)


_KERNELS: dict[str, Any] = {
    "_flash_attention_forward": _forward,
    "_flash_attention_forward_no_dropout_inplace": _forward_inplace,
    "_flash_attention_backward": _backward,
    "_scaled_dot_product_flash_attention": _sdpa_forward,
    "_scaled_dot_product_flash_attention_backward": _sdpa_backward,
}


# --- Their arguments -----------------------------------------------------------------------------


def _refuse(return_debug_mask: bool, num_splits: int | None) -> None:
    if return_debug_mask:
        raise NotImplementedError("return_debug_mask is True; it must be False: the weights are never held")
    if num_splits == 1:
        raise NotImplementedError(
            "num_splits is 1, which requires results of a sequence that are the same bits whatever else is in the "
            "batch; it must be None: libmfa divides the keys of a sequence by the work of the whole batch"
        )


def _without_gradient(options: str) -> NotImplementedError:
    """The error for options that PyTorch's rule for autograd does not pass on to the backward pass."""
    return NotImplementedError(
        f"{options} is given where a gradient is required; PyTorch's operator has none with it: call it under "
        "torch.no_grad(), or mps_flash_attn's own functions"
    )


def _resolve(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: tuple[Tensor | None, ...],
    most: tuple[int, int],
    dropped: tuple[float, Tensor | None],
    is_causal: bool,
    scale: float | None,
    window: tuple[int | None, int | None],
    alibi_slopes: Tensor | None = None,
) -> tuple[InputsTuple, Options]:
    """The Inputs and Options of a call. `lengths`: those of problem.Inputs, before the scales of codes; `most`: the
    largest; `dropped`: the probability of dropout, and its seed."""
    dropout_p, seed = dropped
    cum_seq_q, *others = lengths
    largest: varlen.Most = {}
    if cum_seq_q is None:
        if any(one is not None for one in others):
            raise ValueError(
                "cum_seq_q is None, but cum_seq_k, seqused_k or block_table is given; they belong to packed queries, "
                "of which cum_seq_q says where sequences begin"
            )
        for name, one in (("query", query), ("key", key), ("value", value)):
            if one.dim() != 4:
                dimensions = "(batch, length, heads, head_dim) where cum_seq_q is None"
                raise ValueError(f"{name} has {one.dim()} dimensions; it must have 4: {dimensions}")
        query, key, value = (one.transpose(1, 2) for one in (query, key, value))
    inputs: InputsTuple = query, key, value, None, None, alibi_slopes, seed, None, *lengths, None, None
    if cum_seq_q is not None:
        inputs, largest = varlen.four_dimensional(inputs, *most)
    left, right = (-1 if bound is None else bound for bound in window)
    band = calls.band("bottom_right" if is_causal else False, (left, right))
    return calls.resolve(inputs, band, scale, 0.0, dropout_p, None, None, None, is_cast=False, **largest)


def _with_heads_first(tensor: Tensor, cum_seq_q: Tensor | None) -> Tensor:
    """(B, H, L, D), or (1, H, total, D)."""
    return tensor.transpose(1, 2) if cum_seq_q is None else tensor.transpose(0, 1).unsqueeze(0)


def _as_given(tensor: Tensor, cum_seq_q: Tensor | None) -> Tensor:
    """Undoes _with_heads_first()."""
    return tensor.transpose(1, 2) if cum_seq_q is None else tensor.squeeze(0).transpose(0, 1)
