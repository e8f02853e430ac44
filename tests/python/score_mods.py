"""Functions score_mod and mask_mod of flex_attention, and attention with them written out."""

import math
import warnings

import torch
from torch.nn.attention import flex_attention as flex

from mps_flash_attn import flex_attention, score_trace
from stand_in import ON_METAL

DTYPE = torch.float32 if ON_METAL else torch.float64
TOLERANCE = {"rtol": 1e-3, "atol": 1e-3} if ON_METAL else {"rtol": 1e-5, "atol": 5e-6}
B, H, L, S = 2, 4, 70, 90

CAPTURED = {
    "slopes": lambda: torch.rand(H),
    "slopes_bh": lambda: torch.rand(B, H),
    "bias": lambda: torch.randn(B, H, L, S),
    "of_pairs": lambda: torch.randn(L + 3, S + 5),
    "transposed": lambda: torch.randn(S, H, L),
    "relative": lambda: torch.randn(H, L + S),
    "of_keys": lambda: torch.randn(B, 1, S),
    "number": lambda: torch.tensor(0.7),
}


class Captured:
    """The tensors that the score_mods below read."""

    def __init__(self, dtype=DTYPE, requires_grad=False):
        generator_state = torch.get_rng_state()
        for name, draw in CAPTURED.items():
            is_of_slopes = name.startswith("slopes")
            tensor = draw() if is_of_slopes else draw().to(dtype)
            setattr(self, name, tensor.requires_grad_(requires_grad))
        torch.set_rng_state(generator_state)

    def __iter__(self):
        return iter(vars(self).values())


FORMS = {
    "nothing": lambda c: lambda s, b, h, q, k: s,
    "scaled": lambda c: lambda s, b, h, q, k: 0.5 * s / 0.25,
    "alibi": lambda c: lambda s, b, h, q, k: s + c.slopes[h] * (k - q),
    "alibi subtracted": lambda c: lambda s, b, h, q, k: s - (q - k) * c.slopes[h],
    "alibi aligned": lambda c: lambda s, b, h, q, k: s - c.slopes[h] * (q + (S - L) - k).abs(),
    "alibi of both": lambda c: lambda s, b, h, q, k: s - c.slopes_bh[b, h] * torch.abs(k - q - (S - L)),
    "alibi negative": lambda c: lambda s, b, h, q, k: s - -c.slopes[h] * (q + (S - L) - k).abs() / 9,
    "alibi of numbers": lambda c: lambda s, b, h, q, k: s + torch.exp2(-((h + 1) * 2.0)) * (k - q),
    "places": lambda c: lambda s, b, h, q, k: s + (q - k),
    "softcap": lambda c: lambda s, b, h, q, k: 2.0 * torch.tanh(s / 2.0),
    "softcap by factors": lambda c: lambda s, b, h, q, k: (s * 0.5).tanh() * 3,
    "softcap of a tensor": lambda c: lambda s, b, h, q, k: torch.tensor(2.0) * torch.tanh(s / torch.tensor(2.0)),
    "bias": lambda c: lambda s, b, h, q, k: s + c.bias[b, h, q, k],
    "bias by steps": lambda c: lambda s, b, h, q, k: s + c.bias[b][0][q][k],
    "bias of pairs": lambda c: lambda s, b, h, q, k: s - c.of_pairs[q, k],
    "bias transposed": lambda c: lambda s, b, h, q, k: c.transposed[k, h, q] + s,
    "bias of keys": lambda c: lambda s, b, h, q, k: s + c.of_keys[b, 0, k],
    "bias of a diagonal": lambda c: lambda s, b, h, q, k: s + c.bias[b, b, q, k],
    "two biases": lambda c: lambda s, b, h, q, k: s + c.bias[b, h, q, k] - c.of_pairs[q, k],
    "relative": lambda c: lambda s, b, h, q, k: s + c.relative[h, q - k + S],
    "softcap, then biases": lambda c: lambda s, b, h, q, k: 3 * torch.tanh(s / 3) + c.bias[b, h, q, k] + c.number,
    "softcap, then alibi": lambda c: lambda s, b, h, q, k: 3 * torch.tanh(s / 3) + c.slopes[h] * (k - q),
    "alibi and a bias": lambda c: lambda s, b, h, q, k: s + c.slopes[h] * (k - q) + c.of_pairs[q, k],
    "sum, then scaled": lambda c: lambda s, b, h, q, k: (s + c.of_pairs[q, k]) * 0.5,
    "hidden keys": lambda c: lambda s, b, h, q, k: torch.where(q + 40 >= k, s, -float("inf")),
    "hidden, a tensor": lambda c: (
        lambda s, b, h, q, k: torch.where(
            (q - k) % 3 > 0, s + c.number, torch.tensor(-math.inf, device=s.device, dtype=s.dtype)
        )
    ),
    "filled": lambda c: lambda s, b, h, q, k: s.masked_fill((q > k + 20) | (h == 2), -math.inf),
    "one of two": lambda c: lambda s, b, h, q, k: torch.where(q > k, s + c.slopes[h], c.number + s),
    "of queries": lambda c: lambda s, b, h, q, k: s + c.of_pairs[q, 3],
    "minus minus": lambda c: lambda s, b, h, q, k: torch.sin(q * 0.1) * k / 9 - -s,
}


def causal(b, h, q, k):
    return q >= k


def window(b, h, q, k):
    return (k <= q + (S - L)) & (q + (S - L) - k < 40)


def documents(b, h, q, k):
    return (torch.div(q, 30, rounding_mode="floor") == torch.div(k, 30, rounding_mode="floor")) & (q >= k)


MASKS = {"none": None, "causal": causal, "window": window, "documents": documents}


def blocks_of(mask_mod, lengths=(L, S), size=16):
    return mask_mod and flex.create_block_mask(mask_mod, None, None, *lengths, device="cpu", BLOCK_SIZE=size)


def written_out(query, key, value, function=None, mask_mod=None, scale=None):
    """(out, lse)."""
    key, value = (one.repeat_interleave(query.shape[1] // one.shape[1], 1) for one in (key, value))
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    index = [torch.arange(size) for size in scores.shape]
    places = (None, None, None, 0), (None, None, 0, None), (None, 0, None, None), (0, None, None, None)
    with score_trace.IndexByTensors():
        for place in places if function else ():
            function = torch.vmap(function, (0, *place))
        scores = function(scores, *index) if function else scores
    if mask_mod:
        mask = flex.create_mask(mask_mod, *scores.shape, device="cpu")
        scores = scores.masked_fill(~mask, -math.inf)
    is_empty = (scores == -math.inf).all(-1, keepdim=True)
    weights = scores.masked_fill(is_empty, 0).softmax(-1).masked_fill(is_empty, 0)
    return weights.to(value.dtype) @ value, scores.logsumexp(-1)


def results(attend, leaves, captured=()):
    """out, lse and the gradients of all leaves, and of the captured tensors where they have one."""
    leaves = [tensor.detach().requires_grad_() for tensor in leaves]
    out, lse = attend(*leaves)
    finite = lse.masked_fill(lse == -math.inf, 0)
    loss = (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum() + (finite * finite).sum() / 9
    gradients = torch.autograd.grad(loss, [*leaves, *captured], allow_unused=True)
    return out.detach(), lse.detach(), *gradients


def ours(*tensors, **options):
    return flex_attention(*tensors, enable_gqa=True, return_lse=True, **options)


def theirs(*tensors, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is slow without being compiled, and return_lse is old
        return flex.flex_attention(*tensors, enable_gqa=True, return_lse=True, **options)


def close(found, expected, **tolerance):
    for one, other in zip(found, expected, strict=True):
        if one is None or other is None:  # not of this score_mod
            assert one is other
        else:
            torch.testing.assert_close(one, other, check_dtype=False, **(tolerance or TOLERANCE))
