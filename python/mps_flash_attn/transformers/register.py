"""register_transformers(): what is registered with transformers, and what of it is extended."""

from __future__ import annotations

from typing import Any

from ..handles import Registration, check_name
from .attention import transformers_attention
from .masks import mask_of_transformers
from .paged import allow_continuous_batching, forbid_continuous_batching


def register_transformers(name: str = "mfa") -> Registration:
    """Registers attn_implementation=`name` with transformers, until remove() of what it returns. It is flash_attention,
    with softcap and attention sinks, and without repeating K and V. Causality and windows go by numbers, padding and
    packed sequences by their lengths, and no mask of all queries and keys is made for them; other masks are those of
    transformers' "sdpa". generate_batch() runs on the pages of its cache. Calls that libmfa does not run go to "sdpa",
    and are counted in sdpa_stats(); where that would compute something else, they raise ValueError.

    A model whose code does not call the registered function raises a ValueError that names its class: when it is made,
    when it is switched by set_attn_implementation(), or else when it requests its first mask. ValueError if the name
    contains "flash", which transformers takes for a flash-attn, or is that of another implementation; ImportError if
    transformers is missing or too old."""
    check_name(name)
    if "flash" in name:
        raise ValueError(
            f'name is "{name}"; it may not have "flash" in it: transformers takes that for a flash-attn, '
            "which it looks for and which has no masks"
        )
    from transformers import AttentionInterface, AttentionMaskInterface

    from .check import check_config, check_models  # which imports the compiler of PyTorch: a second and a half

    ours = AttentionInterface._global_mapping.get(name) is transformers_attention
    if not ours and (name in AttentionInterface() or name in AttentionMaskInterface()):
        raise ValueError(f'name is "{name}"; it must not be that of another implementation of attention')

    def mask(*arguments: Any, config: Any = None, **options: Any) -> Any:
        if config is not None:
            check_config(config, name)
        return mask_of_transformers(*arguments, config=config, **options)

    check_models(name)
    allow_continuous_batching(name)
    AttentionInterface.register(name, transformers_attention)
    AttentionMaskInterface.register(name, mask)
    return Registration(lambda: _unregister(name, mask))


def _unregister(name: str, mask: Any) -> None:
    """Ends the registration of this name, unless it was registered anew since. What transformers has of ours is taken
    out with the last name. Models that have this name raise transformers' error from then on."""
    from transformers import AttentionInterface, AttentionMaskInterface

    from .check import forget_models

    if AttentionMaskInterface._global_mapping.get(name) is mask:
        del AttentionMaskInterface._global_mapping[name]
        if AttentionInterface._global_mapping.get(name) is transformers_attention:
            del AttentionInterface._global_mapping[name]
        forget_models(name)
        forbid_continuous_batching(name)
