"""The attention function that transformers calls."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..attention import flash_attention
from ..library import Unsupported
from ..stats import REPLACED, count
from ..varlen import flash_attention_kvcache, flash_attention_varlen
from .masks import Mask, Plan, is_traced, restarts
from .paged import paged_attention

_PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


def transformers_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    position_bias: Tensor | None = None,
    s_aux: Tensor | None = None,
    sliding_window: int | None = None,
    cache: Any = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls with (B, H, L, E) tensors; returns (out as (B, L, H, Ev), None).

    attention_mask  of our mask function, or (B or 1, H or 1, L, S): bool, or float, which is added to the scores. None
                    where is_causal is sufficient
    is_causal       None is the module's, or True; it applies where there is no mask and more than one query
    position_bias   (B or 1, H or 1, L, S), added to the scores
    s_aux           attention sinks, (H,)
    cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k
                    all or none: (sequences + 1,) integers and numbers, where packed sequences begin and end in the rows
                    of the batch, and the longest
    position_ids    (1, L): where they begin anew, in causal attention of a single row, a sequence does
    sliding_window  a window as a number, for a paged cache and for sequences packed so, without a mask; the mask has it
    cache           a paged cache of continuous batching

    ValueError where the weights are wanted (output_attentions); and for sinks, packed sequences and paged caches where
    libmfa does not run the call: transformers' "sdpa" would leave them out."""
    if options.get("output_attentions"):
        raise ValueError(
            "output_attentions is True, but the weights are never held; it must be False, or attn_implementation "
            'must be "eager"'
        )
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    common: dict[str, Any] = {"scale": scaling, "softcap": softcap or 0, "enable_gqa": True, "dropout_p": dropout}
    common["sinks"] = _sinks(s_aux, query)
    packed = {name: options[name] for name in _PACKED if options.get(name) is not None}
    positions = None if packed or position_bias is not None else options.get("position_ids")
    plan = _plan(attention_mask, query, key, causal, positions, sliding_window)
    try:
        if cache is not None:
            out = paged_attention(module, query, key, value, cache, sliding_window, options, **common)
        elif packed:
            common["position_bias"] = position_bias
            out = _packed(query, key, value, attention_mask, plan, causal, packed, sliding_window, common)
        else:
            out = _attend(query, key, value, attention_mask, plan, causal, position_bias, common)
    except Unsupported as error:
        begin_anew = plan is not None and plan.starts is not None and not plan.is_of_mask
        needed = {"cache": cache is not None, "cu_seq_lens_q": bool(packed), "position_ids": begin_anew}
        needed["s_aux"] = s_aux is not None
        for name, what, instead in _NEEDS:
            if needed[name]:
                raise ValueError(
                    f"{name} is given by {type(module).__name__}: {what}, which need libmfa, and it does not run this "
                    f"call: {error}; {instead}"
                ) from None
        count(str(error))
    else:
        count(REPLACED)
        return out, None
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    keywords: dict[str, Any] = {
        "dropout": dropout,
        "scaling": scaling,
        "is_causal": is_causal,
        "position_bias": position_bias,
    }
    attention_mask = _dense(attention_mask)
    return sdpa_attention_forward(module, query, key, value, attention_mask, softcap=softcap, **keywords, **options)


_NEEDS = (
    ("cache", "pages of keys", 'choose attn_implementation="eager"'),
    ("cu_seq_lens_q", "packed sequences", "give position_ids that begin anew with each sequence in place of it"),
    ("position_ids", "packed sequences", "choose use_cache=False, and no attention_mask"),
    ("s_aux", "attention sinks", 'choose attn_implementation="eager"'),
)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    plan: Plan | None,
    causal: bool,
    bias: Tensor | None,
    common: dict[str, Any],
) -> Tensor:
    """The attention of a batch, (B, L, H, Ev)."""
    length, kv_length = query.shape[2], key.shape[2]
    if plan is None or not _takes(plan, bias, kv_length):
        mask = _dense(mask)
        causal = causal and mask is None and length > 1
        if causal and kv_length > length:  # a static cache, of which only as many keys as queries are there
            key, value = key[:, :, :length], value[:, :, :length]
            bias = bias if bias is None else bias[..., :length]
        out = flash_attention(query, key, value, causal, attn_mask=_with_bias(mask, bias), **common)
        return out.transpose(1, 2).contiguous()
    if plan.starts is not None:
        return _varlen(query, key, value, plan.starts, plan.starts, plan.longest, plan.longest, plan.options | common)
    options = plan.options if bias is None else plan.options | {"attn_mask": bias[..., : plan.keys]}
    if plan.keys < kv_length:
        key, value = key[:, :, : plan.keys], value[:, :, : plan.keys]
    function: Any = flash_attention_kvcache if plan.has_lengths else flash_attention
    return function(query, key, value, **options, **common).transpose(1, 2).contiguous()


def _packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    plan: Plan | None,
    causal: bool,
    packed: dict[str, Any],
    sliding_window: int | None,
    common: dict[str, Any],
) -> Tensor:
    """The attention of sequences that numbers say, (B, L, H, Ev)."""
    missing = [name for name in _PACKED if name not in packed]
    if missing:
        raise ValueError(f"{', '.join(packed)} given and {', '.join(missing)} not; all of them must be, or none")
    if common.pop("position_bias") is not None:
        raise ValueError("position_bias is given with cu_seq_lens_q; it is of one sequence, and must not be")
    for name in _PACKED[:2]:
        given = getattr(packed[name], "dtype", type(packed[name]).__name__)
        if given not in (torch.int32, torch.int64):
            raise TypeError(f"{name} is {given}; it must be a tensor of int32 or int64")
    starts_q, starts_k = (packed[name].to(torch.int32) for name in _PACKED[:2])
    if plan is not None and plan.starts is not None and _are_equal(plan.starts, starts_q, starts_k):
        return _attend(query, key, value, mask, plan, causal, None, common)
    options: dict[str, Any] = {}
    if mask is None:
        options = {"is_causal": "bottom_right"} if causal else {}
        if sliding_window is not None:
            options["window_size"] = (sliding_window - 1, 0 if causal else sliding_window - 1)
    elif plan is not None and plan.is_band and plan.keys == key.shape[2]:
        options = plan.options
    else:
        if query.shape[0] != 1:
            raise ValueError(f"a mask is given with cu_seq_lens_q for a batch of {query.shape[0]}; it must be 1")
        mask = _of_sequences(_dense(mask), starts_q, starts_k, query.shape[2], key.shape[2])
        return flash_attention(query, key, value, attn_mask=mask, **common).transpose(1, 2).contiguous()
    longest_q, longest_k = _longest(packed["max_length_q"], query), _longest(packed["max_length_k"], key)
    return _varlen(query, key, value, starts_q, starts_k, longest_q, longest_k, options | common)


def _varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts_q: Tensor,
    starts_k: Tensor,
    longest_q: int,
    longest_k: int,
    options: dict[str, Any],
) -> Tensor:
    """flash_attention_varlen of the rows of all batch entries, one after another; as (B, L, H, Ev)."""
    q, k, v = (one.transpose(1, 2).flatten(0, 1) for one in (query, key, value))
    out: Tensor = flash_attention_varlen(q, k, v, starts_q, starts_k, longest_q, longest_k, **options)
    return out.unflatten(0, (query.shape[0], query.shape[2])).contiguous()


def _are_equal(starts: Tensor, *others: Tensor) -> bool:
    """Whether a mask has the sequences that are given by numbers. On a GPU this reads them in each layer, which takes
    less than a mask of all queries and keys would."""
    return not is_traced(*others) and all(torch.equal(starts, one) for one in others)


def _longest(length: Any, tensor: Tensor) -> int:
    """A largest length as a number. On a GPU it is not read: the number of rows, which is no less, stands for it."""
    if not isinstance(length, torch.Tensor):
        return int(length)
    return int(length) if length.device.type == "cpu" else tensor.shape[0] * tensor.shape[2]


def _of_sequences(mask: Tensor, starts_q: Tensor, starts_k: Tensor, length: int, kv_length: int) -> Tensor:
    """The mask (1, 1 or H, L, S) with what other sequences have hidden."""
    queries, keys = (
        (torch.arange(number, device=mask.device)[:, None] >= starts).sum(1)
        for number, starts in ((length, starts_q), (kv_length, starts_k))
    )
    same = (queries[:, None] == keys) & (queries[:, None] > 0) & (queries[:, None] < len(starts_q))
    return mask & same if mask.dtype is torch.bool else mask.masked_fill(~same, -torch.inf)


def _plan(
    mask: Tensor | None, query: Tensor, key: Tensor, causal: bool, positions: Any, sliding_window: int | None
) -> Plan | None:
    """The plan of the mask, with the sequences where positions begin anew, if they are packed in one row: transformers
    does not look for them where a cache is made, and users of flash-attn expect it. None if there is no plan."""
    if torch.compiler.is_compiling():
        return None
    plan = mask.plan(query, key) if isinstance(mask, Mask) else None
    is_causal = causal if mask is None else plan is not None and plan.is_band and "is_causal" in plan.options
    is_one_row = query.shape[0] == 1 and query.shape[2] == key.shape[2] > 1
    if not (is_causal and is_one_row) or positions is None or is_traced(positions):
        return plan
    found = restarts(positions) if positions.shape == (1, query.shape[2]) else None
    if found is None:
        return plan
    if plan is not None:
        return found._replace(options=plan.options)
    window = {} if sliding_window is None else {"window_size": (sliding_window - 1, 0)}
    return found._replace(options=found.options | window)


def _dense(mask: Any) -> Any:
    return mask.dense() if isinstance(mask, Mask) and not torch.compiler.is_compiling() else mask


def _takes(plan: Plan, bias: Tensor | None, kv_length: int) -> bool:
    """Whether this bias, if any, can be given beside the plan, whose lengths would otherwise shift it."""
    if bias is None:
        return True
    has_others = plan.starts is not None or "attn_mask" in plan.options or "leftpad_k" in plan.options
    return bias.shape[-1] == kv_length and not has_others


def _sinks(sinks: Tensor | None, query: Tensor) -> Tensor | None:
    """In a dtype that flash_attention takes: under autocast, and in models whose parts differ, it may be another."""
    return sinks if sinks is None or sinks.dtype in (torch.float32, query.dtype) else sinks.to(query.dtype)


def _with_bias(mask: Tensor | None, bias: Tensor | None) -> Tensor | None:
    """One mask for both. It hides keys by the lowest finite number, as transformers does, so that a row that may see no
    key attends to all keys equally."""
    if bias is None or mask is None:
        return mask if bias is None else bias
    return torch.where(mask, bias, torch.finfo(bias.dtype).min) if mask.dtype is torch.bool else mask + bias
