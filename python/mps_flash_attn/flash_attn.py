"""flash_attn's functions for dense batches, on every machine: the names, orders, defaults and results of flash-attn
2.8.

    from mps_flash_attn.flash_attn import flash_attn_func

or, for code that imports flash_attn itself, install_flash_attn() before it does. Tensors are (B, L, H, D), the causal
mask and windows are aligned to the last query and key, and gradients are those of flash_attention(), which runs the
calls: so float32 and float64 are taken too, any D up to 512, and softcap together with dropout.

What differs: the logarithm of the sum of a query that sees no key is -inf, where flash-attn 2 has +inf, and it is
differentiable. Packed sequences and KV caches have no kernels here: their functions raise NotImplementedError.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import types
from typing import Any, NoReturn

import torch
from torch import Tensor

from . import dropout
from .attention import flash_attention

__version__ = "2.8.3"  # whose interface this is

Attention = Tensor | tuple[Tensor, Tensor, Tensor]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Attention:
    """softmax(softmax_scale * q k^T) v: q (B, L, H, D), k (B, S, Hkv, D), v (B, S, Hkv, Dv) in one dtype, H a multiple
    of Hkv; the result is (B, L, H, Dv).

    softmax_scale      None is 1/sqrt(D)
    causal             query i sees keys j <= i + S - L
    window_size        (left, right): keys i + S - L - left to i + S - L + right, -1 being no limit
    softcap            scores are softcap * tanh(score / softcap), if it is above 0
    alibi_slopes       (H,) or (B, H) in float32: -slope * |i + S - L - j| is added to the scores
    dropout_p          the probability of dropout; its seed comes from PyTorch's default generator of the device
    deterministic      has no effect: gradients are always the same in every run
    return_attn_probs  returns (out, softmax_lse, S_dmask), for tests: softmax_lse (B, H, L) in float32; S_dmask is
                       empty without dropout, else (B, H, L, S) in q's dtype, the softmax's result, negative where it
                       was dropped, for which all scores are computed again

    ValueError and TypeError as by flash_attention()."""
    query, key, value = (tensor.transpose(1, 2) for tensor in (q, k, v))
    options: dict[str, Any] = {
        "is_causal": "bottom_right" if causal else False,
        "scale": softmax_scale,
        "enable_gqa": True,
        "window_size": tuple(window_size),
        "softcap": softcap,
        "alibi_slopes": alibi_slopes,
    }
    if not return_attn_probs:
        return flash_attention(query, key, value, dropout_p=dropout_p, **options).transpose(1, 2)
    seed = dropout.draw(q, 1) if dropout_p else None
    out, lse = flash_attention(query, key, value, dropout_p=dropout_p, dropout_seed=seed, return_lse=True, **options)
    S_dmask = q.new_empty(0) if seed is None else _signed_weights(query, key, dropout_p, seed, options)
    return out.transpose(1, 2), lse, S_dmask


@torch.no_grad()
def _signed_weights(query: Tensor, key: Tensor, dropout_p: float, seed: Tensor, options: dict[str, Any]) -> Tensor:
    """softmax(query key^T), negative where it is dropped: the results for values that are unit vectors, 512 of them in
    a call, as many as it takes."""
    units = torch.eye(key.shape[2], dtype=key.dtype, device=key.device).expand(*key.shape[:2], -1, -1)
    weights = torch.cat([flash_attention(query, key, some, **options) for some in units.split(512, -1)], -1)
    return torch.where(dropout.dropout_mask(weights.shape, dropout_p, seed), weights, -weights)


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Attention:
    """flash_attn_func of q (B, L, H, D) and kv (B, S, 2, Hkv, D), which is keys and values in one tensor; its gradient
    is one, too."""
    k, v = kv.unbind(2)
    options = dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    return flash_attn_func(q, k, v, *options)


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Attention:
    """flash_attn_func of qkv (B, L, 3, H, D), which is queries, keys and values in one tensor; its gradient is one,
    too."""
    q, k, v = qkv.unbind(2)
    options = dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    return flash_attn_func(q, k, v, *options)


def _refuse(name: str, what: str, instead: str) -> Any:
    def function(*arguments: Any, **keywords: Any) -> NoReturn:
        raise NotImplementedError(f"{name}: libmfa has no {what}; {instead}")

    function.__name__ = function.__qualname__ = name
    function.__doc__ = f"Raises NotImplementedError: libmfa has no {what}."
    return function


_PAD = "give flash_attn_func padded batches, or each sequence by itself"
_GROW = "give flash_attn_func the keys and values up to the last one, with causal=True"
flash_attn_varlen_func = _refuse("flash_attn_varlen_func", "packed sequences", _PAD)
flash_attn_varlen_kvpacked_func = _refuse("flash_attn_varlen_kvpacked_func", "packed sequences", _PAD)
flash_attn_varlen_qkvpacked_func = _refuse("flash_attn_varlen_qkvpacked_func", "packed sequences", _PAD)
flash_attn_with_kvcache = _refuse("flash_attn_with_kvcache", "KV caches that it fills", _GROW)

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "install_flash_attn",
    "uninstall_flash_attn",
]

# --- import flash_attn ---------------------------------------------------------------------------

_MODULES = "flash_attn", "flash_attn.flash_attn_interface"


def install_flash_attn() -> None:
    """From here on `import flash_attn` and `from flash_attn.flash_attn_interface import ...` find the functions of this
    module, in this process; uninstall_flash_attn() undoes it. ImportError if a flash_attn is installed.

    Only the import is answered: importlib.metadata knows no such package, so libraries that look for its version, as
    transformers' is_flash_attn_2_available(), go on saying that there is none."""
    if all(_is_ours(sys.modules.get(name)) for name in _MODULES):
        return
    if "flash_attn" in sys.modules or importlib.util.find_spec("flash_attn") is not None:
        raise ImportError("flash_attn is installed already; install_flash_attn() does not take its place")
    package, interface = (types.ModuleType(name, __doc__) for name in _MODULES)
    for module in (package, interface):
        is_package = module is package
        module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None, origin=__name__, is_package=is_package)
        vars(module).update({name: globals()[name] for name in __all__ if name.startswith("flash_attn")})
        vars(module)["__version__"] = __version__
        sys.modules[module.__name__] = module
    package.__path__ = []
    package.flash_attn_interface = interface  # type: ignore[attr-defined]


def uninstall_flash_attn() -> None:
    """Undoes install_flash_attn(). What has been imported from it stays as it is."""
    for name in _MODULES:
        if _is_ours(sys.modules.get(name)):
            del sys.modules[name]


def _is_ours(module: Any) -> bool:
    spec = getattr(module, "__spec__", None)
    return spec is not None and spec.origin == __name__
