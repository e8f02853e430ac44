"""flash_attention for sequences of their own lengths: packed one after another, or in a cache of keys and values.

They are functions of their own, and not arguments of flash_attention, because their operands have other shapes (packed
rows have no batch, a cache has another batch than the query, pages have none), and because that stays what it is, a
scaled_dot_product_attention whose repeated calls are served by their shapes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypedDict, overload

import torch
from torch import Tensor
from torch.overrides import handle_torch_function

from . import calls, codes, context_parallel_state, lengths, subclasses, tensors
from .arguments import BlockSize, Causal
from .block_mask import BlockMask
from .codes import Fast, KvType
from .lengths import Lengths
from .problem import LENGTHS, SCALES, InputsTuple
from .transforms import needs_operator


@overload
def flash_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    is_causal: Causal = False,
    scale: float | None = None,
    attn_mask: Tensor | None = None,
    window_size: int | tuple[int, int] = 0,
    *,
    softcap: float = 0,
    enable_gqa: bool = False,
    return_lse: Literal[False] = False,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0,
    dropout_seed: Tensor | int | None = None,
    block_mask: BlockMask | Tensor | None = None,
    block_size: BlockSize | None = None,
    seqused_k: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    block_table: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    k_type: KvType | None = None,
    v_type: KvType | None = None,
    fast: Fast | None = None,
) -> Tensor: ...


@overload
def flash_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    is_causal: Causal = False,
    scale: float | None = None,
    attn_mask: Tensor | None = None,
    window_size: int | tuple[int, int] = 0,
    *,
    softcap: float = 0,
    enable_gqa: bool = False,
    return_lse: Literal[True],
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0,
    dropout_seed: Tensor | int | None = None,
    block_mask: BlockMask | Tensor | None = None,
    block_size: BlockSize | None = None,
    seqused_k: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    block_table: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    k_type: KvType | None = None,
    v_type: KvType | None = None,
    fast: Fast | None = None,
) -> tuple[Tensor, Tensor]: ...


@overload
def flash_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    is_causal: Causal = False,
    scale: float | None = None,
    attn_mask: Tensor | None = None,
    window_size: int | tuple[int, int] = 0,
    *,
    softcap: float = 0,
    enable_gqa: bool = False,
    return_lse: bool,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0,
    dropout_seed: Tensor | int | None = None,
    block_mask: BlockMask | Tensor | None = None,
    block_size: BlockSize | None = None,
    seqused_k: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    block_table: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    k_type: KvType | None = None,
    v_type: KvType | None = None,
    fast: Fast | None = None,
) -> Tensor | tuple[Tensor, Tensor]: ...


def flash_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    is_causal: Causal = False,
    scale: float | None = None,
    attn_mask: Tensor | None = None,
    window_size: int | tuple[int, int] = 0,
    *,
    softcap: float = 0,
    enable_gqa: bool = False,
    return_lse: bool = False,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0,
    dropout_seed: Tensor | int | None = None,
    block_mask: BlockMask | Tensor | None = None,
    block_size: BlockSize | None = None,
    seqused_k: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    block_table: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    k_type: KvType | None = None,
    v_type: KvType | None = None,
    fast: Fast | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """flash_attention of packed sequences, without padding: query (total_q, H, E), key (total_k, Hkv, E) and value
    (total_k, Hkv, Ev) hold the rows of all sequences one after another. The result is (total_q, H, Ev). Memory grows
    with the number of rows. It is differentiable as flash_attention is.

    cu_seqlens_q   where sequences begin and end: sequence b is the rows cu_seqlens_q[b] up to cu_seqlens_q[b + 1].
                   (B + 1,) in int32 on the query's device. Sequences may be empty. Rows before the first and after the
                   last give 0 and have a gradient of 0; they are not read.
    cu_seqlens_k   the same of key and value
    max_seqlen_q   the most queries of a sequence, or more
    max_seqlen_k   the most keys, or more
    is_causal      True or "top_left": query i of a sequence sees keys j <= i of its own sequence. "bottom_right":
                   j <= i + S - L, with the lengths L and S of that sequence, as flash-attn's causal. They differ where
                   L and S do.
    return_lse     returns (out, lse), where lse is (H, total_q)
    seqused_k      (B,) in int32: only the first seqused_k[b] keys of a sequence count
    leftpad_k      (B,) in int32: the first leftpad_k[b] of these do not count, and the sequence begins after them
    block_table    (B, pages) in int32: key and value are pages (pages, page, Hkv, E), and key j of sequence b is row
                   j % page of page block_table[b, j // page]. Lengths are seqused_k, or what cu_seqlens_k, which may
                   be None, says. It has no backward pass, and is_causal must be False, "top_left" or "bottom_right".
    k_scale and so on  key and value may be codes, as in flash_attention_kvcache(); a k_scale is (total_k, Hkv, groups),
                   or with a block_table (pages, page, Hkv, groups). `fast` is as there.

    All other arguments are those of flash_attention, where L and S are the lengths of a sequence, B the number of
    sequences, and attn_mask and block_mask are of max_seqlen_q queries and max_seqlen_k keys.

    Wrong numbers in tensors raise ValueError before anything is written, on the CPU. On MPS they are not read by the
    CPU, so that it need not wait for the GPU, and the kernels keep them within the tensors. Errors are those of
    flash_attention."""
    options = {
        "is_causal": is_causal,
        "scale": scale,
        "attn_mask": attn_mask,
        "window_size": window_size,
        "softcap": softcap,
        "enable_gqa": enable_gqa,
        "return_lse": return_lse,
        "alibi_slopes": alibi_slopes,
        "sinks": sinks,
        "dropout_p": dropout_p,
        "dropout_seed": dropout_seed,
        "block_mask": block_mask,
        "block_size": block_size,
        "k_scale": k_scale,
        "v_scale": v_scale,
        "k_type": k_type,
        "v_type": v_type,
        "fast": fast,
    }
    positional = query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    given = Lengths(cu_seqlens_q, cu_seqlens_k, seqused_k, leftpad_k, None, block_table)
    return attend(flash_attention_varlen, positional, options, given, max_seqlen_q, max_seqlen_k)


@overload
def flash_attention_kvcache(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_causal: Literal[False, "top_left", "bottom_right"] = False,
    scale: float | None = None,
    attn_mask: Tensor | None = None,
    window_size: int | tuple[int, int] = 0,
    *,
    softcap: float = 0,
    enable_gqa: bool = False,
    return_lse: Literal[False] = False,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0,
    dropout_seed: Tensor | int | None = None,
    block_mask: BlockMask | Tensor | None = None,
    block_size: BlockSize | None = None,
    seqused_k: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    block_table: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    k_type: KvType | None = None,
    v_type: KvType | None = None,
    fast: Fast | None = None,
) -> Tensor: ...


@overload
def flash_attention_kvcache(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_causal: Literal[False, "top_left", "bottom_right"] = False,
    scale: float | None = None,
    attn_mask: Tensor | None = None,
    window_size: int | tuple[int, int] = 0,
    *,
    softcap: float = 0,
    enable_gqa: bool = False,
    return_lse: Literal[True],
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0,
    dropout_seed: Tensor | int | None = None,
    block_mask: BlockMask | Tensor | None = None,
    block_size: BlockSize | None = None,
    seqused_k: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    block_table: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    k_type: KvType | None = None,
    v_type: KvType | None = None,
    fast: Fast | None = None,
) -> tuple[Tensor, Tensor]: ...


@overload
def flash_attention_kvcache(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_causal: Literal[False, "top_left", "bottom_right"] = False,
    scale: float | None = None,
    attn_mask: Tensor | None = None,
    window_size: int | tuple[int, int] = 0,
    *,
    softcap: float = 0,
    enable_gqa: bool = False,
    return_lse: bool,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0,
    dropout_seed: Tensor | int | None = None,
    block_mask: BlockMask | Tensor | None = None,
    block_size: BlockSize | None = None,
    seqused_k: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    block_table: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    k_type: KvType | None = None,
    v_type: KvType | None = None,
    fast: Fast | None = None,
) -> Tensor | tuple[Tensor, Tensor]: ...


def flash_attention_kvcache(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_causal: Literal[False, "top_left", "bottom_right"] = False,
    scale: float | None = None,
    attn_mask: Tensor | None = None,
    window_size: int | tuple[int, int] = 0,
    *,
    softcap: float = 0,
    enable_gqa: bool = False,
    return_lse: bool = False,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0,
    dropout_seed: Tensor | int | None = None,
    block_mask: BlockMask | Tensor | None = None,
    block_size: BlockSize | None = None,
    seqused_k: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    block_table: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    k_type: KvType | None = None,
    v_type: KvType | None = None,
    fast: Fast | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """flash_attention of queries (B, H, L, E) with a cache of keys and values, of which each sequence has used its own
    length; or with keys that are padded on either side. The result is (B, H, L, Ev).

    key, value       (B, Hkv, S, E) and (B, Hkv, S, Ev)
    is_causal        "bottom_right": the last query sees the last key of its sequence, as when new tokens come last.
                     "top_left": query i sees keys j <= i, from the first key that counts. True is refused.
    seqused_k        (B,) in int32 on the query's device: the first seqused_k[b] keys count. None: all do.
    leftpad_k        (B,) in int32: the first leftpad_k[b] of these do not count, and the sequence begins after them
    cache_batch_idx  (B,) in int32: sequence b reads entry cache_batch_idx[b] of key and value, which may have more
                     entries. Sequences may share one.
    block_table      (B, pages) in int32: key and value are pages (pages, Hkv, page, E) of any size and strides; key j
                     of sequence b, padding included, is row j % page of page block_table[b, j // page]. Sequences may
                     share pages. S is pages * page.
    k_scale          float32, where key is codes of 8 or 4 bits: a key is code * scale. (B, Hkv, S, groups), or
                     (pages, Hkv, page, groups), of which each size may be 1, or without dimensions: one scale for
                     E / groups columns, for a row, a head, or all. None: 1. Of 4-bit codes a group is 32 columns or a
                     multiple.
    v_scale          the same of value
    k_type           "int8", "e4m3", "e5m2", "int4" or "nf4": what the codes are. None: what key's dtype says: int8,
                     float8_e4m3fn or float8_e5m2. Bytes of uint8 may be any but int8. For int4 and nf4 key is
                     (..., E / 2), of blocks of 32 columns, of which c and c + 16 are the low and the high half of byte
                     c. int4 is the half - 8; nf4 a number of QLoRA's table. quantize_kv() makes codes and scales.
    v_type           the same of value. Either may be codes without the other, which then has the query's dtype.
    fast             "int8": where key and value are int8 with one scale for a row, products may be of int8: each query
                     is rounded to 255 levels, and the weights of a block of keys to 256. Prefill then takes less
                     than half of the time on x86-64 with AVX512_BF16; arm64 with FEAT_I8MM has such kernels, too.
                     Everywhere else, and for few queries, results are those without it. docs/pytorch.md has the bound
                     of the error. ValueError for other keys and values.

    All other arguments are those of flash_attention, where S, in alibi_slopes and the alignment to the bottom right, is
    the number of keys of a sequence that count, from the first of which j is counted. attn_mask and block_mask are of
    L queries and the S keys that key has.

    Keys and values that do not count are not read. Gradients exist with seqused_k and leftpad_k, and are 0 for these.
    With cache_batch_idx, block_table or codes there is no backward pass: Unsupported where a gradient is required, and
    TypeError for a scale that requires one. Wrong numbers in tensors raise ValueError on the CPU before anything is
    written; on MPS the kernels keep them within the tensors. Errors are those of flash_attention."""
    options = {
        "is_causal": is_causal,
        "scale": scale,
        "attn_mask": attn_mask,
        "window_size": window_size,
        "softcap": softcap,
        "enable_gqa": enable_gqa,
        "return_lse": return_lse,
        "alibi_slopes": alibi_slopes,
        "sinks": sinks,
        "dropout_p": dropout_p,
        "dropout_seed": dropout_seed,
        "block_mask": block_mask,
        "block_size": block_size,
        "k_scale": k_scale,
        "v_scale": v_scale,
        "k_type": k_type,
        "v_type": v_type,
        "fast": fast,
    }
    given = Lengths(None, None, seqused_k, leftpad_k, cache_batch_idx, block_table)
    return attend(flash_attention_kvcache, (query, key, value), options, given)


def attend(
    function: Any,
    positional: tuple[Any, ...],
    options: dict[str, Any],
    given: Lengths,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    write: Callable[[], None] | None = None,
) -> Any:
    """The result of `function`, one of the two above, for its arguments: `positional`, the options of flash_attention
    and those of codes, and lengths, of which those beyond the packed ones are keywords. `write` is called before
    anything is computed, when the arguments have been checked."""
    query, key, value, *_ = positional
    mask, bias = subclasses.split(options["attn_mask"])
    dropout_seed, block_mask = options["dropout_seed"], options["block_mask"]
    seed = dropout_seed if isinstance(dropout_seed, torch.Tensor) else None
    blocks = block_mask if isinstance(block_mask, torch.Tensor) else None
    scales = options["k_scale"], options["v_scale"]
    inputs: Any = query, key, value, mask, options["sinks"], options["alibi_slopes"], seed, blocks, *given, *scales
    by_operator = torch.compiler.is_compiling()
    if not by_operator:
        present = [query, key, value, *(tensor for tensor in inputs[3:] if tensor is not None)]
        if needs_operator(*present):
            by_operator = True
            if subclasses.have_torch_function(*present):
                keywords = {name: one for name, one in given._asdict().items() if one is not None and name[:2] != "cu"}
                if write is not None:
                    calls.check_numbers(options)  # tensors are the subclass's to check
                    write()
                return handle_torch_function(function, present, *positional, **options, **keywords)
            inputs = calls.check_readable(*inputs)
    if not subclasses.are_distributed(*inputs):
        context_parallel_state.refuse_local(function.__name__)
    band = calls.band(options["is_causal"], options["window_size"])
    check_band(options["is_causal"], bias, given)
    inputs, kinds = codes.resolve(inputs, options["k_type"], options["v_type"])
    inputs, most = four_dimensional(inputs, max_seqlen_q, max_seqlen_k)
    calls.check_heads(inputs, options["enable_gqa"])
    inputs, found = calls.resolve(
        inputs,
        band,
        options["scale"],
        options["softcap"],
        options["dropout_p"],
        dropout_seed,
        block_mask,
        options["block_size"],
        is_cast=not by_operator and tensors.is_autocast(inputs[0]),  # the operators have a rule for it
        kinds=kinds,
        fast=options["fast"],
        **most,
    )
    if write is not None:
        calls.check(inputs, found, by_operator)
        write()
    results = calls.run(inputs, found, options["return_lse"], by_operator)
    if given.cu_seqlens_q is None:
        return results
    if not options["return_lse"]:
        return results.squeeze(0).transpose(0, 1)
    out, lse = results
    return out.squeeze(0).transpose(0, 1), lse.squeeze(0)


class Most(TypedDict, total=False):
    """The Options that are the largest lengths."""

    max_q: int | None
    max_kv: int | None


def four_dimensional(
    inputs: InputsTuple, max_seqlen_q: int | None, max_seqlen_k: int | None
) -> tuple[InputsTuple, Most]:
    """(Inputs with query, key and value of four dimensions and the lengths that libmfa takes, the largest lengths).
    `inputs`: the tensors among the arguments of the functions above."""
    query, key, value, *others, k_scale, v_scale = inputs
    given = Lengths(*inputs[LENGTHS:SCALES])  # PyTorch 2.6 compiles neither _make() nor properties of it
    is_cache = given.cache_batch_idx is not None or given.block_table is not None
    if is_cache or (given.cu_seqlens_q is not None and given.cu_seqlens_q.dim() != 1):
        lengths.check_each(given, query)  # else they are checked once, when a pass is prepared
    table = given.block_table
    if given.cu_seqlens_q is None:
        if given.cu_seqlens_k is not None:
            raise ValueError("cu_seqlens_k is given and cu_seqlens_q None; keys are packed where queries are")
        if table is None or key.dim() != 4:
            return inputs, {}
        return inputs, {"max_kv": table.shape[1] * key.shape[2]}
    of_kv = (3, "(total, heads, head_dim)") if table is None else (4, "(pages, page, heads, head_dim)")
    for name, tensor, (count, dimensions) in (
        ("query", query, (3, "(total, heads, head_dim)")),
        ("key", key, of_kv),
        ("value", value, of_kv),
    ):
        if tensor.dim() != count:
            raise ValueError(f"{name} has {tensor.dim()} dimensions; it must have {count}: {dimensions}")
    most: Most = {"max_q": lengths.most("max_seqlen_q", max_seqlen_q)}
    if table is None:
        if given.cu_seqlens_k is None:
            raise ValueError("cu_seqlens_k is None; without a block_table it must say where keys begin and end")
        key, value = key.unsqueeze(0), value.unsqueeze(0)
        k_scale, v_scale = (None if scale is None else scale.unsqueeze(0) for scale in (k_scale, v_scale))
    elif given.cu_seqlens_k is not None:
        used = given.cu_seqlens_k.diff() if given.seqused_k is None else given.seqused_k
        given = given._replace(cu_seqlens_k=None, seqused_k=used)
    most["max_kv"] = lengths.most("max_seqlen_k", max_seqlen_k)
    query, key, value = query.transpose(0, 1).unsqueeze(0), key.transpose(1, 2), value.transpose(1, 2)
    k_scale, v_scale = (None if scale is None else scale.transpose(1, 2) for scale in (k_scale, v_scale))
    return (query, key, value, *others[: LENGTHS - 3], *given, k_scale, v_scale), most


def check_band(is_causal: Any, bias: Any, given: Lengths) -> None:
    """Raises for what does not say how a causal mask is aligned. `bias`: a CausalBias, or None."""
    if bias is not None:
        raise ValueError(
            f"attn_mask is a {type(bias).__name__}, which is of one length for all sequences; is_causal may be "
            '"top_left" or "bottom_right"'
        )
    if is_causal and not isinstance(is_causal, str) and (given.cu_seqlens_q is None or given.block_table is not None):
        raise ValueError(
            'is_causal is True; with a cache of keys it must say to which keys it is aligned: "bottom_right", where '
            'the queries are the last of their sequence, or "top_left"'
        )
