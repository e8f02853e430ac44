"""The tag in the keys of torch.compile's cache on disk while scaled_dot_product_attention is replaced.

That cache finds compiled code by the source that was compiled, which does not mention this package. Without a tag,
processes that do not use this package would load code that calls it."""

from __future__ import annotations

from typing import Any

import torch

_TAG = "mps_flash_attn"


def tag_compiler_cache() -> None:
    """Sets the tag in this thread, since the setting is thread-local. A call does so when it is traced, which is before
    the disk is searched."""
    _set(_TAG)


def untag_compiler_cache() -> None:
    """Removes the tag in this thread."""
    _set("")


def _set(tag: str) -> None:
    config: Any = getattr(torch.compiler, "config", None)
    if hasattr(config, "cache_key_tag"):
        config.cache_key_tag = config.cache_key_tag.removesuffix(_TAG) + tag
