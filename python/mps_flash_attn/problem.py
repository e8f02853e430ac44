"""Checks the arguments of a call, and packs them into the mfa_problem that libmfa reads.

Python checks what libmfa cannot, since libmfa receives numbers and strides only: that shapes, dtypes and devices agree.
libmfa itself refuses all other errors (head counts, dimensions, scale, softcap), with its own sentences.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import arguments, codes, lengths, tensors
from .lengths import Lengths, Scores, blocks_of
from .library import (
    BACKWARD,
    BAND_OPEN_LOWER,
    BAND_OPEN_UPPER,
    FAST,
    FORWARD,
    KV_TYPES,
    MASK_ADDITIVE,
    MASK_BOOL,
    MASK_NONE,
    OUT_TYPES,
    PROBLEM,
    changed,
    library,
)
from .options import Options, scale_of

_DIMENSIONS = "(batch, heads, length, head_dim)"
_NO_GRADIENTS = (0,) * 24  # layouts


class Inputs(NamedTuple):
    """The tensors that a forward pass reads, everywhere in this order; None where there is none. The first OF_SDPA are
    those of scaled_dot_product_attention, which autocast casts; the first DIFFERENTIABLE may require gradients. Layers
    pass them on as a whole, so that a new one is named where it is given (attention.py), described to PyTorch
    (operators.py), packed (here) and bound (run.py). The first dimension of all but the mask is the batch."""

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None = None
    sinks: Tensor | None = None  # (batch, heads), float32
    alibi_slopes: Tensor | None = None  # likewise
    dropout_seed: Tensor | None = None  # (batch,), int64
    block_mask: Tensor | None = None  # (batch, heads, blocks of queries, blocks of keys), bool
    # Those from here on have elements of 32 bits. The first are int32, and say which rows of key and so on are whose.
    cu_seqlens_q: Tensor | None = None  # (batch + 1,): query is (1, heads, total, head_dim)
    cu_seqlens_k: Tensor | None = None  # likewise key and value
    seqused_k: Tensor | None = None  # (batch,)
    leftpad_k: Tensor | None = None  # (batch,)
    cache_batch_idx: Tensor | None = None  # (batch,): key and value have a batch of their own
    block_table: Tensor | None = None  # (batch, pages): key and value are (pages, heads, page, columns)
    # float32, (batch, heads, rows, groups) as key and value, which are codes with them
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None


OF_SDPA = 4
DIFFERENTIABLE = 5
SEED = Inputs._fields.index("dropout_seed")
LENGTHS = Inputs._fields.index("cu_seqlens_q")  # the first of those that say which rows are whose
SCALES = Inputs._fields.index("k_scale")  # the first after them
NO_LENGTHS = (None,) * (len(Inputs._fields) - LENGTHS)  # and no scales
# (query, key, value, mask, *NO_MORE) is faster than Inputs().
NO_MORE: Any = (None,) * (len(Inputs._fields) - OF_SDPA)
# Plain tuples in the order of Inputs and Operands.
InputsTuple = tuple[Any, ...]
OperandsTuple = tuple[InputsTuple, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]


class Operands(NamedTuple):
    """What a backward pass reads; None where there is none. Functions that take Inputs or Operands accept plain tuples
    in their order, too, which are faster to make. The schema of the public operator attention_backward has another
    order (operators.py)."""

    inputs: Inputs
    out: Tensor
    lse: Tensor
    d_out: Tensor
    d_lse: Tensor | None
    out_low: Tensor | None = None


def check(inputs: InputsTuple, options: Options) -> None:
    """Raises for Inputs that do not belong together, and for devices and dtypes that are not supported."""
    query, key, value, mask, sinks, slopes, seed, blocks, *_, k_scale, v_scale = inputs
    of_rows = Lengths._make(inputs[LENGTHS:SCALES])
    if mask is not None and mask.device != query.device:
        raise ValueError(f"attn_mask is on {mask.device} and query on {query.device}; they must be on one device")
    if not query.device == key.device == value.device:
        raise ValueError(
            f"query is on {query.device}, key on {key.device} and value on {value.device}; they must be on one device"
        )
    for name, tensor in _named(query, key, value):
        if tensor.dim() != 4:
            raise ValueError(f"{name} has {tensor.dim()} dimensions; it must have 4: {_DIMENSIONS}")
    _check_dtypes(query, key, value, options)
    _check_out_type(query, options)
    codes.check("key", key, options.k_type, k_scale)
    codes.check("value", value, options.v_type, v_scale)
    codes.check_fast(options.fast, (options.k_type, options.v_type), k_scale, v_scale)
    lengths.check(of_rows, query, key, options)
    of_key, of_value = codes.shape(key, options.k_type), codes.shape(value, options.v_type)
    arguments.check_shapes((of_rows.entries(query, key)[2], *query.shape[1:]), of_key, of_value)
    scores = of_rows.scores(query, key, options.max_q, options.max_kv)
    if mask is not None:
        _check_mask(mask, scores)
    if sinks is not None:
        _check_of_heads("sinks", sinks, query, scores)
    if slopes is not None:
        _check_of_heads("alibi_slopes", slopes, query, scores)
    if seed is not None:
        check_seed(seed, query, scores[:1])
    if blocks is not None:
        _check_blocks(blocks, query, scores, options)


def check_saved(operands: OperandsTuple, options: Options) -> None:
    """Raises for results that the forward pass of these operands cannot have given, and for gradients that do not fit
    those."""
    (query, _, value, *_), out, lse, d_out, d_lse, out_low = operands
    rows, columns = query.shape[:3], codes.columns(value, options.v_type)
    for name, tensor, shape, dtype in (
        ("out", out, (*rows, columns), tensors.out_dtype(query, options.out_type)),
        ("d_out", d_out, (*rows, columns), query.dtype),
        ("lse", lse, rows, tensors.rows_dtype(query)),
        ("d_lse", d_lse, rows, tensors.rows_dtype(query)),
        ("out_low", out_low, (*rows, columns), query.dtype),
    ):
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ValueError(f"{name} has the shape {tuple(tensor.shape)}; it must be {tuple(shape)}")
        if tensor.dtype != dtype:
            raise TypeError(f"{name} is {tensors.dtype_name(tensor)}; it must be {str(dtype).removeprefix('torch.')}")
        if tensor.device != query.device:
            raise ValueError(f"{name} is on {tensor.device} and query on {query.device}; they must be on one device")


def scores_of(inputs: InputsTuple, options: Options) -> Scores:
    """The shape of the scores: (batch, heads, q_len, kv_len), the lengths being the largest of a sequence."""
    return Lengths._make(inputs[LENGTHS:SCALES]).scores(inputs[0], inputs[1], options.max_q, options.max_kv)


def refuse_gradients(inputs: InputsTuple, options: Options) -> None:
    """Raises libmfa's sentence for what has no backward pass, before the forward pass runs."""
    _, key, *_, index, table, _, _ = inputs
    k_type, v_type = (0 if kind is None else KV_TYPES[kind] for kind in (options.k_type, options.v_type))
    if index is None and table is None and not k_type and not v_type:
        return
    pages = 0 if table is None else int(key.shape[2])
    of_rows = {
        "cache_batch_idx": int(index is not None),
        "page_size": pages,
        "kv_batch": int(pages or index is not None),
    }
    small = library().parse("backward f32 b1 h1 q1 kv1 d32")
    library().check_supported(changed(small, k_type=k_type, v_type=v_type, **of_rows))


def check_numbers(scale: float | None, softcap: float) -> None:
    """Raises libmfa's sentence for numbers that are wrong whatever the tensors are."""
    small = library().parse("forward f32 b1 h1 q1 kv1 d32")
    library().check_supported(changed(small, softcap=softcap, **({} if scale is None else {"scale": scale})))


def _expand_mask(mask: Tensor | None, scores: Scores) -> Tensor | None:
    """The mask as (batch, head, row, column), with stride 0 where it is broadcast."""
    return mask if mask is None else mask.expand(scores)


def pack_forward(inputs: InputsTuple, options: Options, out: Tensor) -> bytes:
    """The mfa_problem of a forward pass, as bytes."""
    query, key, value, mask, *_ = inputs
    layout, scores = tensors.layout, scores_of(inputs, options)
    return PROBLEM.pack(
        PROBLEM.size,
        FORWARD,
        *_numbers(inputs, options, scores),
        *layout(query),
        *layout(key),
        *layout(value),
        *layout(out),
        *_dense_rows(query),
        *layout(_expand_mask(mask, scores)),
        *_NO_GRADIENTS,
        *_after_layouts(inputs, options, None),
    )


def pack_backward(operands: OperandsTuple, options: Options, gradients: Iterable[Tensor | None]) -> bytes:
    """The mfa_problem of a backward pass. `gradients`: memory for dQ, dK, dV, dbias and dsinks, None where not
    wanted."""
    inputs, out, lse, d_out, d_lse, _ = operands
    query, key, value, mask, *_ = inputs
    dq, dk, dv, dbias, dsinks = gradients
    layout, rows, scores = tensors.layout, tensors.rows_layout, scores_of(inputs, options)
    return PROBLEM.pack(
        PROBLEM.size,
        BACKWARD,
        *_numbers(inputs, options, scores),
        *layout(query),
        *layout(key),
        *layout(value),
        *layout(out),
        *rows(lse),
        *layout(_expand_mask(mask, scores)),
        *layout(d_out),
        *rows(d_lse),
        *layout(dq),
        *layout(dk),
        *layout(dv),
        *layout(_expand_mask(dbias, scores)),
        *_after_layouts(inputs, options, dsinks),
    )


def _numbers(inputs: InputsTuple, options: Options, scores: Scores) -> tuple[float, ...]:
    """The members of mfa_problem between `pass` and the layouts."""
    query, key, value, mask, _, slopes, *_ = inputs
    (batch, q_heads, q_len, kv_len), head_dim = scores, query.shape[3]
    lower, upper, _, softcap, *_ = options
    mask_kind, mask_dtype = MASK_NONE, 0
    if mask is not None:
        is_bool = mask.dtype is torch.bool
        mask_kind, mask_dtype = (MASK_BOOL, 0) if is_bool else (MASK_ADDITIVE, tensors.DTYPES[mask.dtype])
    return (
        tensors.device(query),
        tensors.DTYPES[query.dtype],
        mask_kind,
        mask_dtype,
        int(slopes is not None),
        batch,
        q_heads,
        key.shape[1],
        q_len,
        kv_len,
        head_dim,
        codes.columns(value, options.v_type),
        BAND_OPEN_LOWER if lower is None else lower,
        BAND_OPEN_UPPER if upper is None else upper,
        scale_of(options, head_dim),
        softcap,
    )


def _after_layouts(inputs: InputsTuple, options: Options, dsinks: Tensor | None) -> tuple[float, ...]:
    """The members of mfa_problem after dbias_layout."""
    query, key, value, _, sinks, slopes, seed, blocks, *_, k_scale, v_scale = inputs
    has_sinks, reserved = int(sinks is not None), 0
    out_type = 0 if options.out_type is None else OUT_TYPES[options.out_type]
    fast = 0 if options.fast is None else FAST[options.fast]
    of_seed = 0 if seed is None else seed.stride(0)
    of_blocks = (0, 0, 0, 0) if blocks is None else blocks.stride()
    return (
        *_heads_layout(slopes),
        *(has_sinks, reserved),
        *_heads_layout(sinks),
        *_heads_layout(dsinks),
        *(options.dropout, of_seed, 0, 0, 0),
        *(options.block_q, options.block_kv, *of_blocks),
        *lengths.numbers(Lengths._make(inputs[LENGTHS:SCALES]), query, key, options),
        *codes.numbers(key, value, (options.k_type, options.v_type), k_scale, v_scale),
        *(out_type, fast),
    )


def _dense_rows(query: Tensor) -> tuple[int, int, int, int]:
    """The layout of what tensors.empty_rows() returns."""
    _, q_heads, q_len, _ = query.shape
    return q_heads * q_len, q_len, 1, 0


def _heads_layout(tensor: Tensor | None) -> tuple[int, ...]:
    """The layout of a (batch, heads) tensor."""
    return (0, 0, 0, 0) if tensor is None else (*tensor.stride(), 0, 0)


def of_heads(name: str, tensor: Tensor | None, scores: Scores) -> Tensor | None:
    """A tensor with a number for each query head, (heads,) or (batch, heads), as (batch, heads); None for None. A
    tensor of another shape stays as it is, for check() to refuse."""
    if tensor is None:
        return None
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}; it must be a torch.Tensor")
    return tensor.expand(scores[0], -1) if tensor.shape == scores[1:2] else tensor


def _check_of_heads(name: str, tensor: Tensor, query: Tensor, scores: Scores) -> None:
    if tensor.dtype is not torch.float32:
        raise TypeError(f"{name} is {tensors.dtype_name(tensor)}; it must be float32")
    if tensor.shape != scores[:2]:
        arguments.refuse_heads(name, tensor.shape, scores)
    if tensor.device != query.device:
        raise ValueError(f"{name} is on {tensor.device} and query on {query.device}; they must be on one device")


def _check_blocks(blocks: Tensor, query: Tensor, scores: Scores, options: Options) -> None:
    if blocks.dtype is not torch.bool:
        raise TypeError(f"block_mask is {tensors.dtype_name(blocks)}; it must be bool (True is visible)")
    size = max(options.block_q, 1), max(options.block_kv, 1)
    shape = blocks_of(scores, size)
    if blocks.shape != shape:
        raise ValueError(f"block_mask has the shape {tuple(blocks.shape)}; with blocks of {size} it must be {shape}")
    if blocks.device != query.device:
        raise ValueError(f"block_mask is on {blocks.device} and query on {query.device}; they must be on one device")


def check_seed(seed: Tensor, query: Tensor, *shapes: tuple[int, ...]) -> None:
    """Raises for a seed of dropout that is wrong, or has none of these shapes."""
    if seed.dtype is not torch.int64:
        raise TypeError(f"dropout_seed is {tensors.dtype_name(seed)}; it must be int64")
    if seed.shape not in shapes:
        accepted = " or ".join(str(tuple(shape)) for shape in shapes)
        raise ValueError(f"dropout_seed has the shape {tuple(seed.shape)}; it must be {accepted}")
    if seed.device != query.device:
        raise ValueError(f"dropout_seed is on {seed.device} and query on {query.device}; they must be on one device")


def _check_mask(mask: Tensor, shape: tuple[int, ...]) -> None:
    if mask.dtype is not torch.bool and mask.dtype not in tensors.DTYPES:
        raise TypeError(
            f"attn_mask is {tensors.dtype_name(mask)}; it must be bool (True takes part), "
            "float32, float16, bfloat16 or float64 (added to the scores)"
        )
    arguments.check_mask_shape(mask.shape, shape)


def _named(query: Tensor, key: Tensor, value: Tensor) -> tuple[tuple[str, Tensor], ...]:
    return (("query", query), ("key", key), ("value", value))


def _check_dtypes(query: Tensor, key: Tensor, value: Tensor, options: Options) -> None:
    """Raises unless all that are no codes have one dtype, of those that kernels exist for."""
    kinds = None, options.k_type, options.v_type
    given = [named for named, kind in zip(_named(query, key, value), kinds) if kind is None]
    for name, tensor in given:
        if tensor.dtype not in tensors.DTYPES:
            is_code = name != "query" and tensor.dtype in (torch.uint8, *codes.DTYPES.values())
            hint = ", or codes in flash_attention_kvcache and flash_attention_varlen" if is_code else ""
            accepted = f"float32, float16, bfloat16 or float64{hint}"
            raise TypeError(f"{name} is {tensors.dtype_name(tensor)}; it must be {accepted}")
    if any(tensor.dtype != query.dtype for _, tensor in given):
        (name, tensor), *others = given
        found = [f"{name} is {tensors.dtype_name(tensor)}"]
        found += [f"{name} {tensors.dtype_name(tensor)}" for name, tensor in others]
        raise TypeError(f"{', '.join(found[:-1])} and {found[-1]}; they must have one dtype")


def _check_out_type(query: Tensor, options: Options) -> None:
    """Raises for an out_type that is none, or that is narrower than what is computed."""
    if options.out_type is None:
        return
    if options.out_type not in OUT_TYPES:
        raise ValueError(f"out_type is {options.out_type!r}; it must be None (query's dtype) or 'f32'")
    if query.dtype is torch.float64:
        raise ValueError(f"out_type is {options.out_type!r} and query float64; with float64 it must be None")
