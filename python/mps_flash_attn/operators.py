"""torch.ops.mfa.attention_forward and attention_backward, the operators that the dispatcher, torch.compile and
torch.export know: their schemas, kernels, fake rules (shapes and strides without memory) and FLOP formulas.

    attention_forward(*Inputs, *Options) -> (out, lse)
    attention_backward(d_out, d_lse, *Inputs, out, lse, *Options, wanted)
        -> (dQ, dK, dV, dbias, dsinks), of size 0 where not wanted
    dropout_mask(seed, heads, q_len, kv_len, dropout) -> which weights dropout keeps
    quantize_kv(numbers, kv_type, group) -> (codes, scale)

With the out_type "f32", out, dQ, dK and dV are float32. The backward operator accepts any `out` and `lse`, so that
results merged from several devices work. With `fast` "int8" products may be of int8. Its rule for
autograd is in autograd.py; those for vmap and autocast are in transforms.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula, sdpa_backward_flop_count, sdpa_flop_count

from . import codes, quantize, run, tensors
from .lengths import Lengths
from .library import DEVICES, library
from .options import Options
from .problem import (
    DIFFERENTIABLE,
    LENGTHS,
    SCALES,
    Inputs,
    InputsTuple,
    Operands,
    OperandsTuple,
    check,
    check_saved,
    scores_of,
)
from .subclasses import as_plain

Shape = tuple[int, ...]

# Those of problem.Inputs.
_INPUTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor? sinks, Tensor? alibi_slopes, Tensor? dropout_seed, "
    "Tensor? block_mask, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? seqused_k, Tensor? leftpad_k, "
    "Tensor? cache_batch_idx, Tensor? block_table, Tensor? k_scale, Tensor? v_scale"
)
_OPTIONS = (
    "SymInt? lower, SymInt? upper, float? scale, float softcap, float dropout, int block_q, int block_kv, "
    "bool bottom_right, SymInt? max_q, SymInt? max_kv, str? k_type, str? v_type, str? out_type, str? fast"
)
_SCHEMAS = (
    f"attention_forward({_INPUTS}, {_OPTIONS}) -> (Tensor out, Tensor lse)",
    (
        f"attention_backward(Tensor d_out, Tensor? d_lse, {_INPUTS}, Tensor out, Tensor lse, {_OPTIONS}, bool[] wanted)"
        " -> (Tensor dQ, Tensor dK, Tensor dV, Tensor dbias, Tensor dsinks)"
    ),
    "quantize_kv(Tensor numbers, str kv_type, int group) -> (Tensor codes, Tensor scale)",
    "dropout_mask(Tensor seed, SymInt heads, SymInt q_len, SymInt kv_len, float dropout) -> Tensor",
)
# With this tag compiled code gives the kernels the strides that the fake rule saw. A PyTorch without it keeps the order
# of the strides.
_TAGS = tuple(
    getattr(torch.Tag, name) for name in ("pt2_compliant_tag", "needs_exact_strides") if hasattr(torch.Tag, name)
)

registration = torch.library.Library("mfa", "FRAGMENT")
for _schema in _SCHEMAS:
    registration.define(_schema, tags=_TAGS)
attention_forward = torch.ops.mfa.attention_forward.default
attention_backward = torch.ops.mfa.attention_backward.default
dropout_mask = torch.ops.mfa.dropout_mask.default
quantize_kv = torch.ops.mfa.quantize_kv.default


def run_backward_operator(
    operands: OperandsTuple, options: Options, wanted: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """attention_backward of problem.Operands, whose out_low it does not take: gradients, None where not wanted."""
    inputs, out, lse, d_out, d_lse, _ = operands
    gradients = attention_backward(d_out, d_lse, *inputs, out, lse, *options, list(wanted))
    return tuple(gradient if is_wanted else None for gradient, is_wanted in zip(gradients, wanted))


def _empty_for_none(gradients: Iterable[Tensor | None], query: Tensor) -> tuple[Tensor, ...]:
    """An operator returns tensors only."""
    return tuple(query.new_empty(0) if gradient is None else gradient for gradient in gradients)


_COUNT = len(Inputs._fields)


def split_backward(arguments: tuple[Any, ...]) -> tuple[Operands, Options, Sequence[bool]]:
    """(Operands, Options, wanted) of the arguments of attention_backward."""
    d_out, d_lse, *others = arguments
    inputs: Any = others[:_COUNT]
    out, lse, *options, wanted = others[_COUNT:]
    return Operands(inputs, out, lse, d_out, d_lse), Options(*options), wanted


def _forward(*arguments: Any) -> tuple[Any, ...]:
    return run.forward(as_plain(Inputs._fields, arguments[:_COUNT]), Options(*arguments[_COUNT:]))


def _backward(*arguments: Any) -> tuple[Tensor, ...]:
    (inputs, *others), options, wanted = split_backward(arguments)
    if len(wanted) != DIFFERENTIABLE:
        raise ValueError(f"wanted is {wanted}; it must be five bools, for query, key, value, mask and sinks")
    inputs = as_plain(Inputs._fields, inputs)
    operands = Operands(inputs, *as_plain(Operands._fields[1:], others))
    return _empty_for_none(run.backward(operands, options, wanted), inputs[0])


def _dropout_mask(seed: Tensor, heads: int, q_len: int, kv_len: int, dropout: float) -> Tensor:
    (seed,) = as_plain(("seed",), (seed,))
    seeds = seed.cpu().contiguous()
    kept = torch.empty((*seed.shape, heads, q_len, kv_len), dtype=torch.bool)
    problem = library().parse(f"forward f32 b{len(seeds)} h{heads} q{q_len} kv{kv_len} d1 dropout{dropout!r}")
    if kept.numel():
        library().dropout_mask(problem, tensors.address(seeds), tensors.address(kept))
    return kept.to(seed.device)


def _quantize_kv(numbers: Tensor, kv_type: str, group: int) -> tuple[Tensor, Tensor]:
    (numbers,) = as_plain(("numbers",), (numbers,))
    found = quantize.by_library if numbers.device.type == "cpu" else quantize.by_torch
    return found(numbers, kv_type, group)


for _device in (name.upper() for name in DEVICES):
    registration.impl("attention_forward", _forward, _device)
    registration.impl("attention_backward", _backward, _device)
    registration.impl("dropout_mask", _dropout_mask, _device)
    registration.impl("quantize_kv", _quantize_kv, _device)


@torch.library.register_fake("mfa::attention_forward", lib=registration)
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    query, _, value, *_ = inputs = arguments[:_COUNT]
    options = Options(*arguments[_COUNT:])
    check(inputs, options)
    out = tensors.of_out_type(tensors.like(query, codes.columns(value, options.v_type)), options.out_type)
    return out, tensors.empty_rows(query)


@torch.library.register_fake("mfa::attention_backward", lib=registration)
def _(*arguments: Any) -> tuple[Tensor, ...]:
    operands, options, wanted = split_backward(arguments)
    check(operands.inputs, options)
    check_saved(operands, options)
    gradients = tensors.gradients(operands.inputs, wanted, options.out_type)
    return _empty_for_none(gradients, operands.inputs[0])


@torch.library.register_fake("mfa::dropout_mask", lib=registration)
def _(seed: Tensor, heads: int, q_len: int, kv_len: int, dropout: float) -> Tensor:
    return seed.new_empty((*seed.shape, heads, q_len, kv_len), dtype=torch.bool)


@torch.library.register_fake("mfa::quantize_kv", lib=registration)
def _(numbers: Tensor, kv_type: str, group: int) -> tuple[Tensor, Tensor]:
    return quantize.empty(numbers, kv_type, quantize.check(numbers, kv_type, group))


@register_flop_formula(torch.ops.mfa.attention_forward, get_raw=True)
def _(*arguments: Any, out_val: Any = None) -> int:
    inputs, options = arguments[:_COUNT], Options(*arguments[_COUNT:])
    return sum(sdpa_flop_count(*shapes) for _, *shapes in _of_sequences(inputs, options))


@register_flop_formula(torch.ops.mfa.attention_backward, get_raw=True)
def _(*arguments: Any, out_val: Any = None) -> int:
    operands, options, _ = split_backward(arguments)
    return sum(sdpa_backward_flop_count(*shapes) for shapes in _of_sequences(operands.inputs, options))


def _of_sequences(inputs: InputsTuple, options: Options) -> Iterator[tuple[Shape, Shape, Shape, Shape]]:
    """The shapes of the result, query, key and value of each sequence, or of all where they are alike, key and value
    with as many heads as the query."""
    query, _, value, *_ = inputs
    lengths = Lengths._make(inputs[LENGTHS:SCALES])
    batch, heads, q_len, kv_len = scores = scores_of(inputs, options)
    alike = all(tensor is None for tensor in lengths)
    for q, kv in [(q_len, kv_len)] if alike else lengths.of_sequences(scores):
        first = (batch if alike else 1, heads)
        columns = codes.columns(value, options.v_type)
        yield (*first, q, columns), (*first, q, query.shape[3]), (*first, kv, query.shape[3]), (*first, kv, columns)
