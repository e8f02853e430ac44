"""Checks that a model of transformers calls the attention function that its configuration names.

A model that does not call it computes attention with its own code, and gets masks that were made for our function:
boolean, or None where the function applies causality. Its results would be wrong, without an error. So each model is
checked when it is made or switched to our function, and each class of configuration when it first requests a mask.

Models that run correctly with "sdpa" do so with our function, because it gets the same masks and arguments, unless the
code of the model depends on the name itself: in a table of its own classes, or in a comparison with "sdpa". Models that
do not declare "sdpa" may have code for eager's masks alone, which are numbers that are added to scores.
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
from typing import Any

import torch

_INTERFACE = "ALL_ATTENTION_FUNCTIONS"
_ATTENTION_CLASS = re.compile(r"^class \w*Attention\w*\(", re.MULTILINE)
_ATTENTION_CODE = re.compile(
    r"\bsoftmax\(|Softmax\(|logsumexp|scaled_dot_product_attention|MultiheadAttention|create_(?!recurrent)\w*mask\("
)
_OWN_TABLE = re.compile(r"\b(?!ALL_)(\w+)\[[^\[\]]*_attn_implementation\b[^\[\]]*\]")
_COMPARISON = re.compile(r"""attn_impl\w*\s*(?:==|!=|(?:not\s+)?in\b)[^\n)\]}]*["']sdpa["']""")
_EXTENDS_MASK = re.compile(r"(?:\bcat\(\s*\[|\bpad\()\s*attention_mask\b")
_COMPUTES_ITSELF = "computes attention itself and would never call it"

_names: set[str] = set()  # the names under which our function is registered
_checked_configs: set[type] = set()  # the classes of configurations whose models are known to call our function


def check_models(name: str) -> None:
    """Checks from now on each model that is made with, or switched to, attn_implementation=`name`.

    transformers' registration has no hook for that. A registered attention function gets the layer, and a registered
    mask function the configuration, but both are called in the forward pass only. A model with a table of its own
    raises a KeyError before, when it is made. So this extends transformers' own check of the name, a method of the
    model."""
    import transformers

    original = getattr(transformers.PreTrainedModel, "get_correct_attn_implementation", None)
    if original is None:
        raise ImportError(
            f"transformers is {transformers.__version__}, which has no "
            "PreTrainedModel.get_correct_attn_implementation; it must be newer, or use replace_sdpa()"
        )
    _names.add(name)
    if hasattr(original, "of_transformers"):
        return

    @functools.wraps(original)
    def get_correct_attn_implementation(self: Any, requested_attention: Any, *arguments: Any, **options: Any) -> Any:
        if requested_attention in _names:
            reason = _incompatibility(type(self))
            if reason:
                raise ValueError(_error_message(type(self), reason, requested_attention))
            if _declares_dispatch(type(self)):
                _checked_configs.add(type(self.config))
        return original(self, requested_attention, *arguments, **options)

    get_correct_attn_implementation.of_transformers = original  # type: ignore[attr-defined] # an attribute of our own
    transformers.PreTrainedModel.get_correct_attn_implementation = get_correct_attn_implementation


def forget_models(name: str) -> None:
    """Undoes check_models()."""
    import transformers

    _names.discard(name)
    original = getattr(transformers.PreTrainedModel.get_correct_attn_implementation, "of_transformers", None)
    if original is not None and not _names:
        transformers.PreTrainedModel.get_correct_attn_implementation = original


def check_config(config: Any, name: str) -> None:
    """Checks the model that requests a mask, unless it was checked before: its configuration may have been changed by
    assignment. Only the class of the configuration is known here."""
    kind = type(config)
    if kind not in _checked_configs:
        message = _error_of_config(kind, name)
        if message:
            raise ValueError(message)
        _checked_configs.add(kind)


@torch.compiler.assume_constant_result  # dynamo cannot trace it
def _error_of_config(kind: type, name: str) -> str:
    """The error message if no model of this class of configurations calls our function; "" if one does, or if no model
    is known."""
    known = _model_classes()
    for base in kind.__mro__:
        models = [model for model in known if getattr(model, "config_class", None) is base]
        if any(_declares_dispatch(model) and not _incompatibility(model) for model in models):
            return ""
        if models:
            model = min(models, key=lambda model: (len(model.__mro__), model.__name__))
            return _error_message(model, _incompatibility(model) or _COMPUTES_ITSELF, name)
    return ""


def _error_message(model: Any, reason: str, name: str) -> str:
    alternative = '"sdpa", which runs on libmfa after replace_sdpa(),' if model._supports_sdpa else '"eager"'
    return (
        f'attn_implementation is "{name}", but {model.__name__} {reason}; use attn_implementation={alternative} '
        "for this model"
    )


def _declares_dispatch(model: Any) -> bool:
    return model._supports_sdpa or getattr(model, "_supports_attention_backend", False)


def _incompatibility(model: Any) -> str:
    """Why a class does not call the function that its configuration names; "" if it does, or if it has no attention."""
    from transformers import PreTrainedModel

    bases = (base for base in model.__mro__ if issubclass(base, PreTrainedModel))
    modules = sorted({base.__module__ for base in bases} - {PreTrainedModel.__module__})
    if _declares_dispatch(model):
        found = next(filter(None, map(_incompatibility_of_module, modules)), "")
        if not found and not model._supports_sdpa and any(_EXTENDS_MASK.search(_source(one) or "") for one in modules):
            return "extends masks by numbers that are added to scores, where ours are boolean"
        return found
    return _COMPUTES_ITSELF if any(map(_has_attention, modules)) else ""


@functools.cache
def _incompatibility_of_module(module: str) -> str:
    """The same for the source of a Python module. Without a source, as in a notebook, the declaration of the class is
    trusted."""
    source = _source(module) or ""
    table = _OWN_TABLE.search(source)
    if table:
        return f"chooses its attention by that name from a table of its own, {table[1]}"
    if _COMPARISON.search(source):
        return 'has code that runs for the name "sdpa" only'
    return _COMPUTES_ITSELF if _ATTENTION_CLASS.search(source) and _INTERFACE not in source else ""


@functools.cache
def _has_attention(module: str) -> bool:
    """False for a convolutional network, for example, which may be a part of a model that calls our function. If there
    is attention in another module after all, check_config() finds it, since networks without attention request no
    mask."""
    source = _source(module)
    return source is None or bool(_ATTENTION_CLASS.search(source) or _ATTENTION_CODE.search(source))


def _source(module: str) -> str | None:
    try:
        return inspect.getsource(sys.modules[module])
    except (KeyError, OSError, TypeError):
        return None


def _model_classes() -> set[type]:
    from transformers import PreTrainedModel

    found: set[type] = set()
    waiting: list[type] = [PreTrainedModel]
    while waiting:
        new: set[type] = set(waiting.pop().__subclasses__()) - found
        found |= new
        waiting += new
    return found
