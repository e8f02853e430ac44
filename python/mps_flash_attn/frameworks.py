"""The doors of frameworks that let attention be chosen: transformers and ComfyUI. Neither is imported before it is
asked for. diffusers calls scaled_dot_product_attention, so replace_sdpa() is its door."""

import torch

from .attention import flash_attention
from .library import Unsupported
from .stats import REPLACED, count
from .transformers_check import check_config, check_models

# --- transformers --------------------------------------------------------------------------------


def register_transformers(name="mfa"):
    """Makes attn_implementation=`name` known to transformers: flash_attention, with softcap, with the masks that its
    "sdpa" gets, and with K and V never repeated. What we do not run goes to that "sdpa", counted in sdpa_stats().

    A model whose code does not call the function of that name is refused with a ValueError that names its class: when
    it is made, when it is switched by set_attn_implementation(), or else when it asks for its first mask."""
    if "flash" in name:
        raise ValueError(
            f'name is "{name}"; it may not have "flash" in it: transformers takes that for a flash-attn, '
            "which it looks for and which has no masks"
        )
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    def mask(*arguments, config=None, **options):
        if config is not None:
            check_config(config, name)
        return sdpa_mask(*arguments, config=config, **options)

    check_models(name)
    AttentionInterface.register(name, transformers_attention)
    AttentionMaskInterface.register(name, mask)


def transformers_attention(
    module,
    query,
    key,
    value,
    attention_mask,
    dropout=0.0,
    scaling=None,
    is_causal=None,
    softcap=None,
    position_bias=None,
    s_aux=None,
    **options,
):
    """What transformers calls, with (B, H, L, E) tensors; returns (out as (B, L, H, Ev), None). The mask is None where
    is_causal says all; a sliding window is in it."""
    if s_aux is not None:
        raise ValueError(
            f"s_aux is given by {type(module).__name__}: attention sinks, which are not supported; choose "
            'attn_implementation="eager"'
        )
    if options.get("output_attentions"):
        raise ValueError(
            "output_attentions is True, but the weights are never held; it must be False, or attn_implementation "
            'must be "eager"'
        )
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    try:
        if dropout or options.get("cache") is not None:
            raise Unsupported("dropout" if dropout else "a paged cache")
        out = flash_attention(
            query,
            key,
            value,
            is_causal=bool(causal and attention_mask is None and query.shape[2] > 1),
            scale=scaling,
            attn_mask=_with_bias(attention_mask, position_bias),
            softcap=softcap or 0,
            enable_gqa=True,
        )
    except Unsupported as error:
        count(str(error))
    else:
        count(REPLACED)
        return out.transpose(1, 2).contiguous(), None
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    given = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal, "position_bias": position_bias}
    return sdpa_attention_forward(module, query, key, value, attention_mask, softcap=softcap, **given, **options)


def _with_bias(mask, bias):
    """One mask for both, hiding as theirs does: by the lowest number, so a row that sees nothing sees all alike."""
    if bias is None or mask is None:
        return mask if bias is None else bias
    return torch.where(mask, bias, torch.finfo(bias.dtype).min) if mask.dtype is torch.bool else mask + bias


# --- ComfyUI -------------------------------------------------------------------------------------


def comfyui_attention(
    original,
    q,
    k,
    v,
    heads,
    mask=None,
    attn_precision=None,
    skip_reshape=False,
    skip_output_reshape=False,
    **options,
):
    """For model_options["transformer_options"]["optimized_attention_override"] of a ComfyUI model. What we do not run
    goes to the attention that ComfyUI would have used."""
    try:
        operands = (q, k, v)
        if not skip_reshape:
            head_dim = q.shape[-1] // heads
            operands = (tensor.unflatten(-1, (-1, head_dim)).transpose(1, 2) for tensor in operands)
        out = flash_attention(
            *operands,
            scale=options.get("scale"),
            attn_mask=mask if mask is None or mask.dim() != 3 else mask.unsqueeze(1),
            enable_gqa=bool(options.get("enable_gqa")),
        )
    except Unsupported as error:
        count(str(error))
        precision = {"attn_precision": attn_precision, "skip_reshape": skip_reshape}
        return original(q, k, v, heads, mask, skip_output_reshape=skip_output_reshape, **precision, **options)
    count(REPLACED)
    return out if skip_output_reshape else out.transpose(1, 2).flatten(2)
