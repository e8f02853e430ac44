"""install_flash_attn(): `import flash_attn` finds the functions of this package."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import types
from typing import Any

from . import bert_padding, fa3, interface, kvcache, rotary

# The modules, each with what it has of ours; a package comes before its modules.
_FUNCTIONS: dict[str, Any] = {
    **{name: one for name, one in vars(interface).items() if name.startswith("flash_attn_")},
    "flash_attn_with_kvcache": kvcache.flash_attn_with_kvcache,
    "__version__": interface.__version__,
}
_FUNCTIONS_OF_3: dict[str, Any] = {name: one for name, one in vars(fa3).items() if name.startswith("flash_attn_")}
_NAMES: dict[str, dict[str, Any]] = {
    "flash_attn": _FUNCTIONS,
    "flash_attn.flash_attn_interface": _FUNCTIONS,
    "flash_attn.bert_padding": {
        name: getattr(bert_padding, name) for name in ("index_first_axis", "pad_input", "unpad_input")
    },
    "flash_attn_interface": _FUNCTIONS_OF_3,
    "flash_attn.layers": {},
    "flash_attn.layers.rotary": {"apply_rotary_emb": rotary.apply_rotary_emb},
}
_PACKAGES = "flash_attn", "flash_attn.layers"
_ORIGIN = __name__


def install_flash_attn() -> None:
    """From here on `import flash_attn`, and `from` flash_attn.flash_attn_interface, flash_attn.bert_padding and
    flash_attn.layers.rotary, find the functions of mps_flash_attn.flash_attn, in this process, and `import
    flash_attn_interface`, the module of flash-attn 3, those of mps_flash_attn.flash_attn.fa3; uninstall_flash_attn()
    undoes it. ImportError if a flash_attn or a flash_attn_interface is installed.

    Only the import is answered: importlib.metadata knows no such package, so libraries that look for its version, as
    transformers' is_flash_attn_2_available(), go on saying that there is none."""
    if all(_is_ours(sys.modules.get(name)) for name in _NAMES):
        return
    for name in ("flash_attn", "flash_attn_interface"):
        if name in sys.modules or importlib.util.find_spec(name) is not None:
            raise ImportError(f"{name} is installed already; install_flash_attn() does not take its place")
    for name, functions in _NAMES.items():
        module: Any = types.ModuleType(name, sys.modules[__package__ or ""].__doc__)
        is_package = name in _PACKAGES
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, origin=_ORIGIN, is_package=is_package)
        if is_package:
            module.__path__ = []
        vars(module).update(functions)
        sys.modules[name] = module
        parent, _, own = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], own, module)


def uninstall_flash_attn() -> None:
    """Undoes install_flash_attn(). What has been imported from it stays as it is."""
    for name in _NAMES:
        if _is_ours(sys.modules.get(name)):
            del sys.modules[name]


def _is_ours(module: Any) -> bool:
    spec = getattr(module, "__spec__", None)
    return spec is not None and spec.origin == _ORIGIN
