"""context_parallel_attention: attention over a sequence whose rows are divided over ranks, with all gradients."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from .. import arguments, calls, problem, subclasses, tensors, transforms
from ..arguments import Causal
from ..autograd import is_differentiated
from ..problem import Inputs
from . import local_step
from .autograd import METHODS, ContextParallel
from .call import Call
from .layout import Layout
from .transfer import without_modes

Method = Literal["ring", "all_to_all"]
Documents = Sequence[int] | Tensor


@overload
def context_parallel_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    is_causal: Causal = False,
    scale: float | None = None,
    attn_mask: Tensor | None = None,
    window_size: int | tuple[int, int] = 0,
    *,
    softcap: float = 0,
    enable_gqa: bool = False,
    return_lse: Literal[False] = False,
    sinks: Tensor | None = None,
    documents: Documents | None = None,
    method: Method = "ring",
    check: bool = True,
) -> Tensor: ...


@overload
def context_parallel_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    is_causal: Causal = False,
    scale: float | None = None,
    attn_mask: Tensor | None = None,
    window_size: int | tuple[int, int] = 0,
    *,
    softcap: float = 0,
    enable_gqa: bool = False,
    return_lse: Literal[True],
    sinks: Tensor | None = None,
    documents: Documents | None = None,
    method: Method = "ring",
    check: bool = True,
) -> tuple[Tensor, Tensor]: ...


@overload
def context_parallel_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    is_causal: Causal = False,
    scale: float | None = None,
    attn_mask: Tensor | None = None,
    window_size: int | tuple[int, int] = 0,
    *,
    softcap: float = 0,
    enable_gqa: bool = False,
    return_lse: bool,
    sinks: Tensor | None = None,
    documents: Documents | None = None,
    method: Method = "ring",
    check: bool = True,
) -> Tensor | tuple[Tensor, Tensor]: ...


def context_parallel_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    is_causal: Causal = False,
    scale: float | None = None,
    attn_mask: Tensor | None = None,
    window_size: int | tuple[int, int] = 0,
    *,
    softcap: float = 0,
    enable_gqa: bool = False,
    return_lse: bool = False,
    sinks: Tensor | None = None,
    documents: Documents | None = None,
    method: Method = "ring",
    check: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """flash_attention over a sequence of which each rank of a group holds some rows. All ranks of the layout's group
    must call it, in forward and in backward, with the same arguments but for the tensors.

    query, key and value are this rank's rows, (B, H, layout.rows, E) and so on, on the CPU, mps or CUDA; the result is
    this rank's rows of the whole result, and gradients are those of this rank's rows. Where every rank adds its own
    part to the loss, that is the gradient of the sum of these parts. is_causal, scale, window_size, softcap, enable_gqa
    and return_lse mean what they mean in flash_attention of the whole sequence, "top_left" and "bottom_right" being the
    same, since there are as many queries as keys.

    attn_mask   bool or float, broadcastable to (B, H, layout.rows, layout.length): this rank's queries and all keys, in
                the order of the sequence. A float mask that requires a gradient gets it.
    sinks       (H,) or (B, H), as in flash_attention, the same on all ranks. Each rank gets the part of the gradient
                that its own rows have (with "all_to_all", its own heads); their sum is the gradient, as that of other
                parameters of which each rank has a copy (DistributedDataParallel adds them).
    documents   where packed documents begin, increasing places in the sequence, as a sequence of int or a tensor of
                int32 or int64; 0 and the length may be among them, so that it may be cu_seqlens. Queries see the keys
                of their own document only.
    method      "ring": keys and values travel to the ranks that see them. "all_to_all" (Ulysses): rows are exchanged
                for heads, so that each rank has all rows of some heads; with fewer heads than ranks some have none. It
                takes no attn_mask, of which each rank would need all rows: ValueError.
    check       False leaves out the messages by which the ranks agree on the call before data travels, for calls like
                earlier ones. Ranks that differ then hang, get wrong results or end. With NCCL the first call of a group
                needs them, since all of its ranks have to take part in the first message.

    In float16 and bfloat16 the parts of a result are added in float32. Results are reproducible, bit by bit, for the
    same layout and method.

    Wrong arguments on any rank, and arguments that differ between ranks, raise an error on all ranks: a ValueError, or
    on the rank of the fault TypeError or Unsupported where flash_attention raises these. A rank that does not answer,
    since it has ended or hangs, is a PeerError on the others, within the timeout of the group. CUDA has PyTorch's own
    kernels: float16 and bfloat16, without attn_mask, softcap and the gradient of lse. There is no second derivative,
    and no forward-mode differentiation: NotImplementedError."""
    if not isinstance(layout, Layout):
        raise TypeError(f"layout is a {type(layout).__name__}; it must be a Layout")
    given = query, key, value, layout, is_causal, scale, attn_mask, window_size
    options: dict[str, Any] = {
        "softcap": softcap,
        "enable_gqa": enable_gqa,
        "sinks": sinks,
        "documents": documents,
        "method": method,
        "return_lse": bool(return_lse),
    }
    if torch.compiler.is_compiling():
        from .uncompiled import attend as attend_uncompiled

        out, lse = attend_uncompiled(*given, **options, check=check)
    else:
        out, lse = attend(*given, **options, check=check)
    return (out, lse) if return_lse else out


def attend(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, *positional: Any, check: bool, **options: Any
) -> tuple[Tensor, Tensor]:
    """(out, lse)."""
    values: dict[str, Any] = {}
    failure = call = None
    inputs: Any = ()
    try:
        inputs, call = _resolve(query, key, value, layout, *positional, **options)
        values = _common(inputs, call)
    except Exception as error:  # the other ranks have to learn of it first
        failure = error
    with without_modes():
        if check:
            layout.peers.agree("context_parallel_attention", values, failure)
        elif failure is not None:
            raise failure
        return ContextParallel.apply(*inputs[: problem.DIFFERENTIABLE], call)


def _resolve(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    is_causal: Causal,
    scale: float | None,
    attn_mask: Tensor | None,
    window_size: Any,
    *,
    softcap: float,
    enable_gqa: bool,
    sinks: Tensor | None,
    documents: Documents | None,
    method: str,
    return_lse: bool,
) -> tuple[Inputs, Call]:
    """The Inputs and the Call of the arguments, all checked. The mask has four dimensions."""
    if not isinstance(method, str) or method not in METHODS:
        raise ValueError(f'method is {method!r}; it must be "ring" or "all_to_all"')
    mask, bias = subclasses.split(attn_mask)
    if bias is not None:
        raise TypeError("attn_mask is a CausalBias; with a divided sequence is_causal=True says the same")
    given: Any = calls.check_readable(query, key, value, mask, sinks)
    for name, one in zip(Inputs._fields, given):
        if one is not None and not tensors.is_plain(one):
            kind = "a tensor of torch.func" if transforms.are_active() else f"a {type(one).__name__}"
            raise TypeError(f"{name} is {kind}; it must be a plain tensor with this rank's rows")
    inputs = Inputs(*given)
    calls.check_heads(inputs, enable_gqa)
    for name, one in zip(("query", "key", "value"), (query, key, value)):
        if one.dim() == 4 and one.shape[2] != layout.rows:
            raise ValueError(
                f"{name} has {one.shape[2]} rows; rank {layout.peers.rank} of the layout has {layout.rows}"
            )
    batch, heads, rows, _ = inputs.query.shape
    if mask is not None:
        if method == "all_to_all":
            raise ValueError('attn_mask is given; method "all_to_all" takes none, but method "ring" does')
        arguments.check_mask_shape(mask.shape, (batch, heads, rows, layout.length))
        inputs = inputs._replace(attn_mask=mask.reshape((1,) * (4 - mask.dim()) + mask.shape))
    lower, upper, _ = calls.band(is_causal, window_size)
    is_cast = torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(query.device.type)
    no_dropout: Any = 0, None, None, None
    found, options = calls.resolve(inputs, (lower, upper, False), scale, softcap, *no_dropout, is_cast=is_cast)
    inputs = Inputs(*found)
    wanted = tuple(one is not None and is_differentiated(one) for one in inputs[: problem.DIFFERENTIABLE])
    part = inputs.attn_mask
    if part is not None and part.shape[3] != 1:
        part = part[..., :1].expand(-1, -1, -1, rows)
    kernels = local_step.choose(inputs._replace(attn_mask=part), options)
    cuts = _cuts(documents, layout.length)
    return inputs, Call(layout, options, cuts, kernels, wanted, method, return_lse)


def _cuts(documents: Documents | None, length: int) -> tuple[int, ...]:
    """The places within the sequence where a document begins."""
    if documents is None:
        return ()
    if isinstance(documents, Tensor) and documents.dtype is not torch.bool:
        documents = documents.tolist()
    try:
        places = list(map(operator.index, documents))
    except TypeError:
        places = [-1]
    if any(place < 0 or place > length for place in places) or places != sorted(places):
        raise ValueError(
            f"documents is {documents!r}; it must be places in the sequence, whole numbers from 0 to {length} that do "
            "not decrease"
        )
    return tuple(dict.fromkeys(place for place in places if 0 < place < length))


def _common(inputs: Inputs, call: Call) -> dict[str, Any]:
    """What must be the same on all ranks."""
    query, key, value, _, sinks, *_ = inputs
    options, wanted = call.options, call.wanted
    return {
        "method": call.method,
        "return_lse": call.with_lse,
        "layout": call.layout.spans,
        "device": query.device.type,
        "dtype": query.dtype,
        "batch": query.shape[0],
        "number of query heads": query.shape[1],
        "number of key heads": key.shape[1],
        "head_dim": query.shape[3],
        "head_dim of value": value.shape[3],
        "is_causal and window_size": (options.lower, options.upper),
        "scale": options.scale,
        "softcap": options.softcap,
        "documents": call.cuts,
        "sinks is given": sinks is not None,
        "query requires a gradient": wanted[0],
        "key requires a gradient": wanted[1],
        "value requires a gradient": wanted[2],
        "backward is recorded": any(wanted),
    }
