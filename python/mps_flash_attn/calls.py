"""What flash_attention, the functions beside it for sequences of their own lengths, and explain() have in common: their
arguments become Inputs and Options, and these run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from . import arguments, codes, dropout, lengths, problem, subclasses, tensors
from . import block_mask as block_masks
from .arguments import Causal
from .autograd import EAGER, Attention, Call, is_differentiated
from .library import library
from .operators import attention_forward
from .options import Options
from .problem import LENGTHS, SCALES, InputsTuple
from .run import forward, prepare_forward

Band = tuple[int | None, int | None, bool]

_OPTIONAL = problem.Inputs._field_defaults


def check_readable(*inputs: Tensor | None) -> list[Any]:
    """The Inputs, as plain tensors where possible. Raises for one that neither has memory to be read nor a class that
    handles our operators."""
    named = zip(problem.Inputs._fields, inputs)
    return [None if one is None and name in _OPTIONAL else tensors.check(name, one) for name, one in named]


def check_heads(inputs: InputsTuple, enable_gqa: bool) -> None:
    """Raises for operands without four dimensions, and if the number of heads differs without enable_gqa."""
    query, key, value, mask, *_ = inputs
    if not query.dim() == key.dim() == 4:
        problem.check(problem.Inputs(query, key, value, mask), Options())  # raises
    arguments.check_gqa(query.shape[1], key.shape[1], enable_gqa)


def band(is_causal: Causal, window_size: Any) -> Band:
    """(lower, upper, bottom_right): the bounds of j - i, None where there is none, and whether both are counted from
    the last query and key; else they are from the first."""
    lower, upper = arguments.band(is_causal, window_size, 0, 0)
    is_pair = isinstance(window_size, (tuple, list))
    return lower, upper, is_causal == "bottom_right" or (is_pair and is_causal != "top_left")


def resolve(
    inputs: InputsTuple,
    found_band: Band,
    scale: float | None,
    softcap: float,
    dropout_p: float,
    dropout_seed: Tensor | int | None,
    block_mask: Any,
    block_size: Any,
    bias: Any = None,
    *,
    is_cast: bool,
    max_q: int | None = None,
    max_kv: int | None = None,
    kinds: codes.Kinds = codes.NO_KINDS,
    fast: str | None = None,
    draws: bool = True,
) -> tuple[InputsTuple, Options]:
    """The Inputs and Options of a call, of which the Inputs are the tensors among its arguments, query, key and value
    with four dimensions. `bias`: a CausalBias, or None. `is_cast`: by autocast. `kinds`: the types of key and value,
    with scales as codes.resolve() returns both. `fast`: see Options. Without `draws` no seed of dropout is
    drawn, but stands for one."""
    query, key, value, mask, sinks, slopes, seed, blocks, *others = inputs
    of_rows = lengths.Lengths(*inputs[LENGTHS:SCALES])  # PyTorch 2.6 does not compile _make()
    scores = of_rows.scores(query, key, max_q, max_kv)
    sinks = _sinks(sinks, query)
    given = block_mask if blocks is None else blocks
    is_dense = all(one is None for one in of_rows)
    blocks, size, mask, band_of_blocks = block_masks.resolve(given, block_size, scores, mask, is_dense)
    if is_cast:
        query, key, value, mask = tensors.autocast(query, key, value, mask)
    lower, upper, bottom_right = found_band
    if bottom_right and is_dense:
        diagonal = scores[3] - scores[2]
        lower, upper = (None if bound is None else bound + diagonal for bound in (lower, upper))
        bottom_right = False
    lower = _tightest(max, lower, band_of_blocks[0])
    upper = _tightest(min, upper, band_of_blocks[1])
    if bias is not None:
        upper = _tightest(min, upper, subclasses.upper_bound(bias, *scores[2:]))
    scale = None if scale is None else arguments.number("scale", scale)
    numbers = scale, arguments.number("softcap", softcap), arguments.probability(dropout_p)
    options = Options(lower, upper, *numbers, *size, bottom_right, max_q, max_kv, *kinds, fast=fast)
    if options.dropout and seed is None and dropout_seed is None and not draws:
        seed = query.new_empty(1, dtype=torch.int64)
    seed = dropout.seed_of(dropout_seed if seed is None else seed, options.dropout, query, scores[0])
    slopes = problem.of_heads("alibi_slopes", slopes, scores)
    if slopes is not None and slopes.requires_grad:
        raise TypeError("alibi_slopes requires a gradient; it gets none, so it must be a tensor that does not")
    sinks = problem.of_heads("sinks", sinks, scores)
    return (query, key, value, mask, sinks, slopes, seed, blocks, *others), options


def check(inputs: InputsTuple, options: Options, by_operator: bool) -> None:
    """Raises for what run() would refuse. Compilers have the operators' fake rules for that."""
    if not by_operator:
        library().check_supported(prepare_forward(inputs, options).problem)
    elif not torch.compiler.is_compiling():
        problem.check(inputs, options)


def check_numbers(options: Mapping[str, Any]) -> None:
    """Raises for those of flash_attention's options that are wrong whatever the tensors are."""
    band(options["is_causal"], options["window_size"])
    arguments.probability(options["dropout_p"])
    scale = options["scale"]
    scale = None if scale is None else arguments.number("scale", scale)
    problem.check_numbers(scale, arguments.number("softcap", options["softcap"]))


def _tightest(choose: Callable[[int, int], int], bound: int | None, other: int | None) -> int | None:
    """The bound that implies both, by max or min; None where there is none."""
    if bound is None or other is None:
        return bound if other is None else other
    return choose(bound, other)


def run(inputs: InputsTuple, options: Options, return_lse: bool, by_operator: bool) -> Any:
    """out, or (out, lse)."""
    if by_operator:
        out, lse = attention_forward(*inputs, *options)
        return (out, lse) if return_lse else out
    if is_differentiated(*inputs[: problem.DIFFERENTIABLE]):
        problem.refuse_gradients(inputs, options)
        return Attention.apply(*inputs, Call(EAGER, options, bool(return_lse)))
    out, lse = forward(inputs, options, return_lse)
    return (out, lse) if return_lse else out


def _sinks(sinks: Tensor | None, query: Tensor) -> Tensor | None:
    """The sinks in float32. `query`: before autocast."""
    if not isinstance(sinks, torch.Tensor) or sinks.dtype is torch.float32:
        return sinks
    if sinks.dtype is not query.dtype:
        accepted = "float32" if query.dtype is torch.float32 else f"float32, or {tensors.dtype_name(query)} as query"
        raise TypeError(f"sinks is {tensors.dtype_name(sinks)}; it must be {accepted}")
    return sinks.float()
