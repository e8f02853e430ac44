"""What to use in place of the names of mps-flash-attn 0.2 to 0.6.3 on PyPI, which has the import name of this package,
that do not exist here (docs/migration.md)."""

from __future__ import annotations

_QUANTIZED_HERE = "use quantize_kv, whose codes and scales flash_attention_kvcache and flash_attention_varlen take"
_HINTS = {
    "flash_attn_func": "use flash_attention, whose tensors are (batch, heads, length, head_dim), or "
    "mps_flash_attn.flash_attn.flash_attn_func",
    "flash_attention_with_bias": "use flash_attention with attn_mask=bias / sqrt(head_dim): scores are scaled before a "
    "mask is added",
    "flash_attention_chunked": "use flash_attention, which never holds all scores",
    "precompile": "run python -m mps_flash_attn precompile",
    "clear_cache": "delete the folder of compiled kernels: MFA_CACHE, else that of the user's caches",
    "register_custom_op": "nothing has to be registered: torch.compile takes flash_attention as it is",
    "torch_ops": "the operators are torch.ops.mfa.attention_forward and torch.ops.mfa.attention_backward",
    "benchmark": "there is no benchmark in this package",
}
_QUANTIZED = ("quantize_kv_", "QUANT_", "flash_attention_fp8", "flash_attention_int8", "flash_attention_nf4")


def replacement_hint(name: str) -> str | None:
    """What to use in place of a name of that package; None for any other name."""
    if name.startswith(_QUANTIZED) or name == "flash_attention_quantized":
        return _QUANTIZED_HERE
    return _HINTS.get(name)
