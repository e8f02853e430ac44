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

from .block_mask import elements
from .library import MASK_ADDITIVE, MASK_BOOL, Scalars
from .operators import dropout_mask
from .options import Options
from .problem import DIFFERENTIABLE, Inputs
from .tensors import DTYPES

# The exact result, in float64, is rounded as well: hence the number of float64.
ULPS = {torch.float32: 4, torch.float16: 2, torch.bfloat16: 2, torch.float64: 64}


def _weights(inputs: Inputs, options: Options) -> tuple[Tensor, Tensor, Tensor, Tensor | float]:
    """(P, log-sum-exp, scores, derivative of the softcap), for K with as many heads as Q."""
    query, key, _, mask, sinks, slopes, _, blocks = inputs
    lower, upper, scale, softcap, _, block_q, block_kv = options
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
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """(out, lse) of (B, H, N, D) tensors. `options`: the fields of Options. The band is lower <= j - i <= upper."""
    group, given = query.shape[1] // key.shape[1], Options(**options)
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    weights, lse, _, _ = _weights(Inputs(query, key, value, mask, sinks, slopes, seed, blocks), given)
    return _dropped(weights, seed, given) @ value, lse


def _dropped(weights: Tensor, seed: Tensor | None, options: Options) -> Tensor:
    """The weights after dropout."""
    if seed is None:
        return weights
    kept = dropout_mask(seed, *weights.shape[1:], options.dropout)
    return weights / (1 - options.dropout if options.dropout < 1 else 1) * kept


def _magnitudes(
    tensors: Sequence[Any], d_out: Tensor, d_lse: Tensor, options: Options
) -> tuple[dict[str, Tensor], float]:
    """({name: the sum of the magnitudes of its terms}, the largest score)."""
    scale = options.scale
    query, key, value, mask, sinks, _, seed, _ = inputs = Inputs(*tensors)
    heads, group = key.shape[1], query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    P, lse, scores, dtanh = _weights(inputs._replace(key=key, value=value), options)
    dO, dL = d_out.to(P.dtype).abs(), d_lse.to(P.dtype).abs()
    dropped = _dropped(P, seed, options)
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
    function: Callable[..., tuple[Tensor, Tensor]], tensors: Sequence[Any], d_out: Tensor, d_lse: Tensor
) -> dict[str, Tensor]:
    """{name: tensor} of out, lse and every gradient of function(*tensors) -> (out, lse)."""
    inputs = [t if t is None else t.detach().requires_grad_(t.is_floating_point()) for t in tensors[:DIFFERENTIABLE]]
    inputs += tensors[DIFFERENTIABLE:]
    out, lse = function(*inputs)
    wanted = {n: t for n, t in zip(("dQ", "dK", "dV", "dbias", "dsinks"), inputs) if t is not None and t.requires_grad}
    loss = (out * d_out.to(out.dtype)).sum() + (lse.masked_fill(lse.isinf(), 0) * d_lse.to(lse.dtype)).sum()
    gradients = torch.autograd.grad(loss, tuple(wanted.values()))
    return {"out": out.detach(), "lse": lse.detach()} | dict(zip(wanted, gradients))


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
    function: Callable[..., tuple[Tensor, Tensor]], tensors: Sequence[Any], **options: Any
) -> Iterator[Comparison]:
    """A Comparison of each of out, lse and all gradients of function(*tensors) -> (out, lse). `tensors` are those of
    Inputs, without some of the last or all."""
    query, _, value, *_ = tensors
    d_out = torch.randn(*query.shape[:3], value.shape[3]).to(query.dtype)
    d_lse = torch.randn(query.shape[:3])

    def naive(*arguments: Any) -> tuple[Tensor, Tensor]:
        return attention(*arguments, **options)

    exact = _to(torch.float64, tensors)
    truth = results(naive, exact, d_out, d_lse)
    yardstick = results(naive, _to(query.dtype, tensors), d_out, d_lse)
    single = results(naive, _to(torch.promote_types(query.dtype, torch.float32), tensors), d_out, d_lse)
    yardstick["lse"] = single["lse"]  # it is kept in float32 whatever the dtype
    sizes, largest = _magnitudes([t if t is None else t.detach() for t in exact], d_out, d_lse, Options(**options))
    for name, got in results(function, tensors, d_out, d_lse).items():
        # a gradient is no more exact than out, whatever the dtype of the mask
        dtype = got.dtype if name == "lse" else max(got.dtype, query.dtype, key=lambda d: torch.finfo(d).eps)
        yield _compare(name, got, yardstick[name], truth[name], sizes[name], largest, dtype)


def check(function: Callable[..., tuple[Tensor, Tensor]], tensors: Sequence[Any], **options: Any) -> None:
    """Asserts that nothing is wrong with any of them."""
    for comparison in compare_results(function, tensors, **options):
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

    query, key, value = (
        tensor(sizes.batch, length, heads, columns).to(dtypes[sizes.dtype]).transpose(1, 2)
        for length, heads, columns in (
            (sizes.q_len, sizes.q_heads, sizes.head_dim),
            (sizes.kv_len, sizes.kv_heads, sizes.head_dim),
            (sizes.kv_len, sizes.kv_heads, sizes.value_dim),
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
    return Inputs(query, key, value, mask, sinks, slopes, of_dropout, blocks)
