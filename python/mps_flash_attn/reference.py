"""Attention written as its definition, in any dtype: the exact result in float64, the baseline in the tested dtype.

The tolerance is a rule: an error may be twice that of the naive computation in the same dtype. The naive one may be
exact by chance, so a few ulp are always allowed: of the sum of the magnitudes of the terms of the value, since
cancellation in the sum does not cancel the rounding errors, plus the effect of rounded scores on exp(scores).

It is slow and holds all scores. It is meant for tests, benchmarks and `python -m mps_flash_attn check`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import codes
from .block_mask import elements
from .lengths import Lengths
from .library import KV_NAMES, MASK_ADDITIVE, MASK_BOOL, Scalars
from .operators import dropout_mask, quantize_kv
from .options import Options
from .problem import DIFFERENTIABLE, LENGTHS, SCALES, Inputs, scores_of
from .tensors import DTYPES

# The exact result, in float64, is rounded as well: hence the number of float64.
ULPS = {torch.float32: 4, torch.float16: 2, torch.bfloat16: 2, torch.float64: 64}


def _weights(inputs: Inputs, options: Options) -> tuple[Tensor, Tensor, Tensor, Tensor | float]:
    """(P, log-sum-exp, scores, derivative of the softcap), for K with as many heads as Q."""
    query, key, _, mask, sinks, slopes, _, blocks, *_ = inputs
    lower, upper, scale, softcap, _, block_q, block_kv, *_ = options
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    dtanh: Tensor | float = 1.0
    if softcap:
        tanh = torch.tanh(scores / softcap)
        scores, dtanh = softcap * tanh, 1 - tanh * tanh
    offset = torch.arange(key.shape[2]) - torch.arange(query.shape[2])[:, None]
    visible = torch.ones_like(offset, dtype=torch.bool)
    if lower is not None:
        visible = visible & (offset >= lower)
    if upper is not None:
        visible = visible & (offset <= upper)
    if blocks is not None:
        visible = visible & elements(blocks, (block_q, block_kv), (query.shape[2], key.shape[2]))
    if mask is not None and mask.dtype == torch.bool:
        visible = visible & mask
    elif mask is not None:
        scores = scores + mask.to(scores.dtype)
        visible = visible & (scores > -torch.inf)
    if slopes is not None:
        distance = (offset - (key.shape[2] - query.shape[2])).abs().to(scores.dtype)
        scores = scores - slopes.to(scores.dtype)[..., None, None] * distance
    logits = scores = scores.masked_fill(~visible, -torch.inf)
    if sinks is not None:  # one more column, without a value
        logits = torch.cat([scores, _column(sinks, scores)], -1)
        visible = torch.cat([visible.expand(scores.shape), visible.new_ones(*scores.shape[:3], 1)], -1)
    if logits.shape[3] == 0:
        return scores, scores.sum(-1) - torch.inf, scores, dtanh
    largest = logits.detach().amax(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).min)
    weights = torch.exp(logits - largest) * visible
    total = weights.sum(-1, keepdim=True)
    visible_rows = total > 0
    total = total.masked_fill(~visible_rows, 1)
    lse = (largest + total.log()).masked_fill(~visible_rows, -torch.inf)
    return weights[..., : key.shape[2]] / total, lse.squeeze(-1), scores, dtanh


def _column(sinks: Tensor, scores: Tensor) -> Tensor:
    """The sinks of each query, beside its scores."""
    return sinks.to(scores.dtype)[..., None, None].expand(*scores.shape[:3], 1)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    sinks: Tensor | None = None,
    slopes: Tensor | None = None,
    seed: Tensor | None = None,
    blocks: Tensor | None = None,
    *others: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """(out, lse) of (B, H, N, D) tensors, or of what Inputs accepts with `others`, its last fields. `options`: the
    fields of Options. The band is lower <= j - i <= upper. Codes become numbers of the query's dtype, which out has
    whatever the out_type."""
    inputs, given = Inputs(query, key, value, mask, sinks, slopes, seed, blocks, *others), Options(**options)
    inputs, given = _numbers(inputs, given, query.dtype)
    if all(one is None for one in inputs[LENGTHS:]):
        return _attention(inputs, given)
    out, lse = query.new_zeros(*query.shape[:3], inputs.value.shape[3]), query.new_full(query.shape[:3], -torch.inf)
    if sinks is not None and len(sinks):  # of queries that belong to no sequence, which give no gradient
        lse = sinks[0, :, None].detach().to(lse.dtype).expand_as(lse).clone()
    for seq in _sequences(inputs, given):
        found = _attention(seq.inputs, seq.options, seq.number)
        out[seq.q_entry, :, seq.q_rows], lse[seq.q_entry, :, seq.q_rows] = (one[0] for one in found)
    return out, lse


def _numbers(inputs: Inputs, options: Options, dtype: torch.dtype) -> tuple[Inputs, Options]:
    """The same with numbers in this dtype in place of the codes of key and value."""
    key, value = inputs.key, inputs.value
    if options.k_type is not None:
        key = codes.dequantize(key, inputs.k_scale, options.k_type, dtype)
    if options.v_type is not None:
        value = codes.dequantize(value, inputs.v_scale, options.v_type, dtype)
    inputs = inputs._replace(key=key, value=value, k_scale=None, v_scale=None)
    return inputs, options._replace(k_type=None, v_type=None, fast=None)


def _attention(inputs: Inputs, options: Options, number: int | None = None) -> tuple[Tensor, Tensor]:
    """(out, lse) without lengths; `number`: that of the only batch entry, where dropout has several."""
    query, key, value, _, _, _, seed, *_ = inputs
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    weights, lse, _, _ = _weights(inputs._replace(key=key, value=value), options)
    return _dropped(weights, seed, options, number) @ value, lse


class _Sequence(NamedTuple):
    """A batch entry by itself."""

    number: int
    inputs: Inputs  # without lengths, of a batch of 1
    options: Options
    q_entry: int  # where its rows are
    q_rows: slice
    kv_entry: Tensor  # of each key
    kv_row: Tensor


def _sequences(inputs: Inputs, options: Options) -> Iterator[_Sequence]:
    """Those of Inputs with lengths."""
    query, key, value, mask, sinks, slopes, seed, blocks, *_ = inputs
    lengths = Lengths._make(inputs[LENGTHS:SCALES])
    packed_q, packed_kv, _, padding, index, table = lengths
    scores = scores_of(inputs, options)
    for b, (q_len, kv_len) in enumerate(lengths.of_sequences(scores)):
        q_row = 0 if packed_q is None else int(packed_q[b])
        rows = slice(q_row, q_row + q_len)
        places = torch.arange(kv_len) + (0 if padding is None else int(padding[b]))
        entry = torch.full_like(places, 0 if packed_kv is not None else b if index is None else int(index[b]))
        if packed_kv is not None:
            places = places + int(packed_kv[b])
        if table is not None:
            entry, places = table[b].long()[places // key.shape[2]], places % key.shape[2]
        q_entry = b if packed_q is None else 0
        hidden = blocks
        if blocks is not None:  # by elements, since a shorter sequence has fewer blocks
            by_element = elements(blocks[b], (options.block_q, options.block_kv), scores[2:])
            hidden = by_element[None, :, :q_len, :kv_len]
        own = Inputs(
            query[q_entry, :, rows][None],
            key[entry, :, places].transpose(0, 1)[None],
            value[entry, :, places].transpose(0, 1)[None],
            None if mask is None else mask.expand(scores)[b, :, :q_len, :kv_len][None],
            None if sinks is None else sinks[b][None],
            None if slopes is None else slopes[b][None],
            seed,
            hidden,
        )
        diagonal = kv_len - q_len if options.bottom_right else 0
        lower, upper = (None if bound is None else bound + diagonal for bound in options[:2])
        own_options = options._replace(lower=lower, upper=upper, block_q=1, block_kv=1)
        yield _Sequence(b, own, own_options, q_entry, rows, entry, places)


def _dropped(weights: Tensor, seed: Tensor | None, options: Options, number: int | None = None) -> Tensor:
    """The weights after dropout, of all batch entries, or of one of those that have seeds."""
    if seed is None:
        return weights
    kept = dropout_mask(seed, *weights.shape[1:], options.dropout)
    kept = kept if number is None else kept[number][None]
    return weights / (1 - options.dropout if options.dropout < 1 else 1) * kept


def _magnitudes(
    tensors: Sequence[Any], d_out: Tensor, d_lse: Tensor, options: Options
) -> tuple[dict[str, Tensor], float]:
    """({name: the sum of the magnitudes of its terms}, the largest score)."""
    inputs = Inputs(*tensors)
    query, key, value, mask, sinks, *_ = inputs
    if all(one is None for one in inputs[LENGTHS:]):
        return _magnitudes_of_one(inputs, d_out, d_lse, options)
    scores = scores_of(inputs, options)
    sizes = {"out": torch.zeros(d_out.shape), "lse": torch.ones(d_lse.shape), "dQ": torch.zeros(query.shape)}
    sizes |= {"dK": torch.zeros(key.shape), "dV": torch.zeros(value.shape)}
    sizes |= {} if mask is None else {"dbias": torch.zeros(scores)}
    sizes |= {} if sinks is None else {"dsinks": torch.zeros(sinks.shape)}
    sizes, largest = {name: size.double() for name, size in sizes.items()}, 0.0
    for seq in _sequences(inputs, options):
        rows = seq.q_entry, slice(None), seq.q_rows
        found, score = _magnitudes_of_one(seq.inputs, d_out[rows][None], d_lse[rows][None], seq.options, seq.number)
        for name in ("out", "lse", "dQ"):
            sizes[name][rows] = found[name][0]
        for name in ("dK", "dV"):
            rows_of = sizes[name].transpose(1, 2)
            rows_of.index_put_((seq.kv_entry, seq.kv_row), found[name][0].transpose(0, 1), accumulate=True)
        if mask is not None:
            sizes["dbias"][seq.number, :, : found["dbias"].shape[2], : found["dbias"].shape[3]] += found["dbias"][0]
        if sinks is not None:
            sizes["dsinks"][seq.number] += found["dsinks"][0]
        largest = max(largest, score)
    if mask is not None:
        sizes["dbias"] = sizes["dbias"].sum_to_size(mask.shape)
    return sizes, largest


def _magnitudes_of_one(
    inputs: Inputs, d_out: Tensor, d_lse: Tensor, options: Options, number: int | None = None
) -> tuple[dict[str, Tensor], float]:
    """The same without lengths; `number` as in _attention."""
    scale = options.scale
    query, key, value, mask, sinks, _, seed, *_ = inputs
    heads, group = key.shape[1], query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    P, lse, scores, dtanh = _weights(inputs._replace(key=key, value=value), options)
    dO, dL = d_out.to(P.dtype).abs(), d_lse.to(P.dtype).abs()
    dropped = _dropped(P, seed, options, number)
    D = (dO * (dropped @ value).abs()).sum(-1) + dL
    dS = dropped * (dO @ value.abs().transpose(-1, -2)) + P * D[..., None]
    dX = dS * dtanh * abs(query.shape[-1] ** -0.5 if scale is None else scale)
    largest = scores[scores.isfinite()].abs().max().item() if scores.isfinite().any() else 0.0
    sizes = {
        "out": dropped @ value.abs(),
        "lse": lse.masked_fill(lse.isinf(), 0).abs() + 1,
        "dQ": dX @ key.abs(),
        "dK": (dX.transpose(-1, -2) @ query.abs()).unflatten(1, (heads, group)).sum(2),
        "dV": (dropped.transpose(-1, -2) @ dO).unflatten(1, (heads, group)).sum(2),
    }
    if mask is not None:
        sizes["dbias"] = dS.sum_to_size(mask.shape)
    if sinks is not None:
        column = _column(sinks, scores).squeeze(-1)
        D = (dO * (dropped @ value.abs())).sum(-1) + dL
        sizes["dsinks"] = ((column - lse).exp().nan_to_num(0) * D).sum(-1).sum_to_size(sinks.shape)
        largest = max([largest, *column[column.isfinite()].abs().flatten().tolist()])
    return sizes, largest


def results(
    function: Callable[..., tuple[Tensor, Tensor]],
    tensors: Sequence[Any],
    d_out: Tensor,
    d_lse: Tensor,
    gradients: bool = True,
) -> dict[str, Tensor]:
    """{name: tensor} of out, lse and, with `gradients`, each of those of function(*tensors) -> (out, lse)."""
    if not gradients:
        out, lse = function(*tensors)
        return {"out": out, "lse": lse}
    inputs = [t if t is None else t.detach().requires_grad_(t.is_floating_point()) for t in tensors[:DIFFERENTIABLE]]
    inputs += tensors[DIFFERENTIABLE:]
    out, lse = function(*inputs)
    wanted = {n: t for n, t in zip(("dQ", "dK", "dV", "dbias", "dsinks"), inputs) if t is not None and t.requires_grad}
    loss = (out * d_out.to(out.dtype)).sum() + (lse.masked_fill(lse.isinf(), 0) * d_lse.to(lse.dtype)).sum()
    found = torch.autograd.grad(loss, tuple(wanted.values()), allow_unused=True, materialize_grads=True)
    return {"out": out.detach(), "lse": lse.detach()} | dict(zip(wanted, found))


def _to(dtype: torch.dtype, tensors: Sequence[Any]) -> list[Any]:
    """The tensors in this dtype, but for bool masks, ALiBi's slopes, seeds and blocks."""
    cast = [t.to(dtype) if t is not None and t.is_floating_point() else t for t in tensors[:DIFFERENTIABLE]]
    return [*cast, *tensors[DIFFERENTIABLE:]]


class Comparison(NamedTuple):
    """The largest error of one result, and the error that the rule above allows."""

    name: str
    error: float
    allowed: float
    wrong: str  # what is wrong with it; "" if nothing is


def compare_results(
    function: Callable[..., tuple[Tensor, Tensor]], tensors: Sequence[Any], gradients: bool = True, **options: Any
) -> Iterator[Comparison]:
    """A Comparison of each of out, lse and, with `gradients`, all of those of function(*tensors) -> (out, lse).
    `tensors` are those of Inputs, without some of the last or all."""
    plain, given = _numbers(Inputs(*tensors), Options(**options), torch.float64)
    query, _, value, *_ = plain
    d_out = torch.randn(*query.shape[:3], value.shape[3]).to(query.dtype)
    d_lse = torch.randn(query.shape[:3])

    def naive(*arguments: Any) -> tuple[Tensor, Tensor]:
        return attention(*arguments, **given._asdict())

    exact = _to(torch.float64, plain)
    grads = d_out, d_lse, gradients
    truth = results(naive, exact, *grads)
    yardstick = results(naive, _to(query.dtype, plain), *grads)
    single = results(naive, _to(torch.promote_types(query.dtype, torch.float32), plain), *grads)
    kept = {"lse"}  # in float32 whatever the dtype
    if given.out_type is not None and query.dtype is torch.float16:  # kernels that multiply bf16 round the weights
        kept |= {"out", "dQ", "dK", "dV"}
    sizes, largest = _magnitudes([t if t is None else t.detach() for t in exact], d_out, d_lse, given)
    for name, got in results(function, tensors, *grads).items():
        # a gradient is no more exact than out, whatever the dtype of the mask
        dtype, of_naive = max(got.dtype, query.dtype, key=lambda d: torch.finfo(d).eps), yardstick[name]
        if name in kept and got.dtype is not torch.float16:  # which autograd makes of gradients
            dtype, of_naive = got.dtype, single[name]
        yield _compare(name, got, of_naive, truth[name], sizes[name], largest, dtype)


def check(
    function: Callable[..., tuple[Tensor, Tensor]], tensors: Sequence[Any], gradients: bool = True, **options: Any
) -> None:
    """Asserts that nothing is wrong with any of them."""
    for comparison in compare_results(function, tensors, gradients, **options):
        assert not comparison.wrong, comparison.wrong


def compare(*arguments: Any) -> None:
    """Asserts that one result is within the tolerance; the arguments are those of _compare."""
    comparison = _compare(*arguments)
    assert not comparison.wrong, comparison.wrong


def _compare(
    name: str,
    got: Tensor,
    yardstick: Tensor,
    truth: Tensor,
    size: Tensor,
    largest_score: float,
    dtype: torch.dtype,
) -> Comparison:
    """The Comparison of `got`, with the ulp of `dtype`."""
    finite = torch.isfinite(truth)
    if got.shape != truth.shape or got.isnan().any():
        what = "has NaN" if got.shape == truth.shape else f"has the shape {tuple(got.shape)}"
        return Comparison(name, math.inf, 0.0, f"{name} {what}")
    if not torch.equal(got[~finite].double(), truth[~finite]):
        return Comparison(name, math.inf, 0.0, f"{name}: infinite in other places")
    if not finite.any():
        return Comparison(name, 0.0, 0.0, "")
    error = (got - truth)[finite].abs().max().item()
    naive = (yardstick - truth)[finite].abs().nan_to_num(0).max().item()
    sums = torch.promote_types(dtype, torch.float32)
    unit = ULPS[dtype] * torch.finfo(dtype).eps + ULPS[sums] * torch.finfo(sums).eps * largest_score
    allowed = 2 * naive + unit * size[finite].abs().max().item()
    wrong = "" if error <= allowed else f"{name}: error {error:.3g}, allowed {allowed:.3g} (naive {naive:.3g})"
    return Comparison(name, error, allowed, wrong)


def agree(
    name: str,
    ours: Tensor,
    theirs: Tensor,
    truth: Tensor,
    dtype: torch.dtype,
    terms: int,
    size: float = 1.0,
    largest_score: float = 1.0,
) -> None:
    """Asserts that two computations of the same tensor in `dtype` agree: our error is at most twice theirs, or a few
    ulp of a sum of `terms` numbers of this `size`, or of the largest exact value if that is larger."""
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape, name
    finite = theirs.isfinite()
    assert torch.equal(ours.isfinite(), finite), f"{name}: not finite in other places"
    if not finite.any():
        return
    ours, theirs, truth = (tensor.detach()[finite].double() for tensor in (ours, theirs, truth))
    sums = torch.promote_types(dtype, torch.float32)
    unit = ULPS[dtype] * torch.finfo(dtype).eps + ULPS[sums] * torch.finfo(sums).eps * largest_score
    error, other = (ours - truth).abs().max().item(), (theirs - truth).abs().max().item()
    allowed = 2 * other + unit * max(size, truth.abs().max().item()) * terms**0.5
    assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g} (theirs {other:.3g})"


def operands(sizes: Scalars, seed: int) -> Inputs:
    """Random Inputs of a problem in the memory order of models: (batch, length, heads, head_dim)."""
    generator = torch.Generator().manual_seed(seed)
    dtypes = {code: dtype for dtype, code in DTYPES.items()}

    def tensor(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    of_query = (1, sizes.total_q) if sizes.varlen_q else (sizes.batch, sizes.q_len)
    of_key = sizes.kv_batch or sizes.batch, sizes.page_size or sizes.kv_len
    of_key = (1, sizes.total_kv) if sizes.varlen_kv else of_key
    query, key, value = (
        tensor(*rows, heads, columns).to(dtypes[sizes.dtype]).transpose(1, 2)
        for rows, heads, columns in (
            (of_query, sizes.q_heads, sizes.head_dim),
            (of_key, sizes.kv_heads, sizes.head_dim),
            (of_key, sizes.kv_heads, sizes.value_dim),
        )
    )
    mask: Tensor | None = None
    if sizes.mask == MASK_BOOL:
        mask = tensor(sizes.batch, 1, sizes.q_len, sizes.kv_len) < 0.5
    elif sizes.mask == MASK_ADDITIVE:
        mask = tensor(sizes.q_heads, sizes.q_len, sizes.kv_len).to(dtypes[sizes.mask_dtype])
    slopes = tensor(sizes.batch, sizes.q_heads).abs() / 8 if sizes.alibi else None
    sinks = tensor(sizes.batch, sizes.q_heads) if sizes.sinks else None
    of_dropout = torch.randint(2**62, (sizes.batch,), generator=generator) if sizes.dropout else None
    blocks: Tensor | None = None
    if sizes.block_map_q:
        q_blocks, kv_blocks = -(-sizes.q_len // sizes.block_map_q), -(-sizes.kv_len // sizes.block_map_kv)
        blocks = tensor(sizes.batch, sizes.q_heads, q_blocks, kv_blocks) < 0.5
    of_rows = _lengths(sizes, generator)
    key, k_scale = _coded(key, sizes.k_type, sizes.k_group)
    value, v_scale = _coded(value, sizes.v_type, sizes.v_group)
    return Inputs(query, key, value, mask, sinks, slopes, of_dropout, blocks, *of_rows, k_scale, v_scale)


def _coded(numbers: Tensor, kv_type: int, group: int) -> tuple[Tensor, Tensor | None]:
    """(codes, scale) of a type of mfa_kv_type; for 0 the numbers, without scales."""
    return quantize_kv(numbers, KV_NAMES[kv_type], group) if kv_type else (numbers, None)


def _lengths(sizes: Scalars, generator: torch.Generator) -> Lengths:
    """Random lengths, as far as the problem has them."""

    def integers(most: Tensor | int, *shape: int) -> Tensor:
        return (torch.rand(shape, generator=generator, dtype=torch.float64) * (most + 1)).floor().int()

    def starts(most: int, total: int) -> Tensor:
        return torch.cat([torch.zeros(1), integers(most, sizes.batch).cumsum(0)]).clamp(max=total).int()

    packed_q = starts(sizes.q_len, sizes.total_q) if sizes.varlen_q else None
    packed_kv = starts(sizes.kv_len, sizes.total_kv) if sizes.varlen_kv else None
    keys = torch.full((sizes.batch,), sizes.kv_len) if packed_kv is None else packed_kv.diff()
    used = integers(keys, sizes.batch) if sizes.seqused_k else None
    padding = integers(keys if used is None else used, sizes.batch) if sizes.leftpad_k else None
    index = integers(sizes.kv_batch - 1, sizes.batch) if sizes.cache_batch_idx else None
    table: Tensor | None = None
    if sizes.page_size:
        table = integers(sizes.kv_batch - 1, sizes.batch, -(-sizes.kv_len // sizes.page_size))
    return Lengths(packed_q, packed_kv, used, padding, index, table)
