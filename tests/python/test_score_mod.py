"""What is found of functions score_mod and mask_mod: those that are refused, and those that only look like others."""

import math
import random
from functools import partial

import pytest
import torch
from torch.nn.attention import flex_attention as flex

from dropped import problem
from mps_flash_attn import Unsupported, flex_attention, score_mod
from score_mods import DTYPE, MASKS, Captured, L, S, blocks_of, close, ours, results, written_out
from stand_in import FULL, ON_METAL


class Straight(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x + 1

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, gradient):
        return gradient / 2


def without_gradient(score, b, h, q, kv):
    with torch.no_grad():
        return score + 1


class Doubled(torch.autograd.Function):
    """A copy whose gradient is twice as large."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 2


def hooked(score, b, h, q, kv):
    found = score * 2
    found.register_hook(lambda gradient: gradient / 2)
    return found


def in_place(score, b, h, q, kv):
    score += 1
    return score


REFUSED = {
    "sin to the score": lambda c: lambda s, b, h, q, k: torch.sin(s),
    "clamp to the score": lambda c: lambda s, b, h, q, k: s.clamp(max=3) + 1,
    "mul to the score twice": lambda c: lambda s, b, h, q, k: s * s,
    "add to the score twice": lambda c: lambda s, b, h, q, k: s + s,
    "mul to the score with a factor that is no constant": lambda c: lambda s, b, h, q, k: s * c.slopes[h],
    "div to the score with a divisor that is no constant": lambda c: lambda s, b, h, q, k: s / (q + 1),
    "reciprocal to the score": lambda c: lambda s, b, h, q, k: 1 / s,
    "div to the score;": lambda c: lambda s, b, h, q, k: c.number / s,
    "tanh to the score after": lambda c: lambda s, b, h, q, k: 2 * torch.tanh((s + c.number) / 2),
    "tanh to the score after another": lambda c: lambda s, b, h, q, k: torch.tanh(torch.tanh(s)),
    "gt to the score": lambda c: lambda s, b, h, q, k: torch.where(s > 0, s, -math.inf),
    "where to the score, with a value": lambda c: lambda s, b, h, q, k: torch.where(q >= k, s, -1e9),
    "where to the score, of two functions": lambda c: lambda s, b, h, q, k: torch.where(q >= k, s, 2 * s),
    "masked_fill to the score, with a value": lambda c: lambda s, b, h, q, k: s.masked_fill(q < k, 0),
    "_to_copy to the score, to bfloat16": lambda c: lambda s, b, h, q, k: s.bfloat16(),
    "add to the score with alpha": lambda c: lambda s, b, h, q, k: torch.add(s, c.of_pairs[q, k], alpha=2),
    "the factor -1;": lambda c: lambda s, b, h, q, k: -s,
    "the factor -2 and the cap -2": lambda c: lambda s, b, h, q, k: -2 * torch.tanh(s),
    "the factor 0;": lambda c: lambda s, b, h, q, k: 0 * s + c.of_pairs[q, k],
    "does not depend on the score": lambda c: lambda s, b, h, q, k: c.of_pairs[q, k],
    "reads the value of an argument": lambda c: lambda s, b, h, q, k: s + 1 if q > k else s,
    "reads the value of an": lambda c: lambda s, b, h, q, k: s + c.slopes[h].item(),
    "draws random numbers": lambda c: lambda s, b, h, q, k: s + torch.rand(()),
    "draws random": lambda c: lambda s, b, h, q, k: s * torch.rand_like(s),
    "a gradient of its own": lambda c: lambda s, b, h, q, k: s.detach() + 1,
    "a gradient of its": lambda c: lambda s, b, h, q, k: Straight.apply(s),
    "a gradient of": lambda c: without_gradient,
    "changes a tensor in place": lambda c: in_place,
    "registers a hook": lambda c: hooked,
    "registers a hook on": lambda c: lambda s, b, h, q, k: s + hooked(c.slopes.requires_grad_()[h], b, h, q, k),
    "returns int; it must be": lambda c: lambda s, b, h, q, k: 3,
    r"returns a tensor of the shape \(4,\)": lambda c: lambda s, b, h, q, k: s + c.slopes,
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_refused(sentence):
    with pytest.raises(Unsupported, match=sentence):
        flex_attention(*problem(L, L, kv_heads=4), score_mod=REFUSED[sentence](Captured(torch.float32)))


def test_gradients_that_are_switched_off():
    """no_grad and detach around a captured tensor hold, also where it is read as it lies."""
    tensors, captured = problem(L, S, dtype=DTYPE), Captured(requires_grad=True)

    def function(score, b, h, q, kv):
        with torch.no_grad():
            held = captured.of_pairs[q, kv]
        return score + held + captured.bias.detach()[b, h, q, kv]

    found = results(lambda *t: ours(*t, score_mod=function), tensors, captured)
    close(found, results(lambda *t: written_out(*t, function), tensors, captured))
    assert all(gradient is None for gradient in found[5:])
    with torch.no_grad():
        close(ours(*tensors, score_mod=lambda *t: without_gradient(*t)), written_out(*tensors, without_gradient))


def test_gradients_of_a_function_of_its_own():
    """Of a captured tensor: those of the autograd.Function, which its forward pass does not show."""
    tensors, captured = problem(L, S, dtype=DTYPE), Captured(requires_grad=True)

    def function(score, b, h, q, kv):
        return score + Doubled.apply(captured.bias[b, h, q, kv])

    found = results(lambda *t: ours(*t, score_mod=function), tensors, captured)
    close(found, results(lambda *t: written_out(*t, function), tensors, captured))


# --- Approximations of tanh -----------------------------------------------------------------------


@pytest.fixture
def approximation():
    """An operator approx::tanh as attention-gym has it, and its autograd.Function; with a factor."""
    library = torch.library.Library("approx", "DEF")
    library.define("tanh(Tensor x) -> Tensor")
    factors = {"value": 1.0, "gradient": 1.0}

    class Approximate(torch.autograd.Function):
        @staticmethod
        def forward(x):
            return torch.ops.approx.tanh(x)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(output)

        @staticmethod
        def backward(ctx, gradient):
            (y,) = ctx.saved_tensors
            return gradient * (1 - y * y) * factors["gradient"]

        @staticmethod
        def vmap(info, in_dims, x):
            return Approximate.apply(x), in_dims[0]

    library.impl("tanh", lambda x: torch.tanh(x) * factors["value"] * (1 + 1e-4 * torch.cos(x)), "CPU")
    yield Approximate.apply, factors
    library._destroy()


def test_approximations_of_tanh(approximation):
    tanh, factors = approximation
    tensors = problem(L, S)

    def function(score, b, h, q, kv):
        return 3 * tanh(score / 3) + 0.1 * q

    def exact(score, b, h, q, kv):
        return 3 * torch.tanh(score / 3) + 0.1 * q

    found = results(lambda *t: ours(*t, score_mod=function), tensors)
    close(found, results(lambda *t: ours(*t, score_mod=exact), tensors), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        ours(*tensors, score_mod=function)
    for name, factor in (("gradient", 0.9), ("value", 1.01)):
        factors |= {"value": 1.0, "gradient": 1.0, name: factor}
        with pytest.raises(Unsupported, match="approx::tanh to the score, which is not near tanh"):
            ours(*tensors, score_mod=function)
    with pytest.raises(Unsupported, match="a gradient of its own"):
        ours(*tensors, score_mod=lambda s, b, h, q, k: Straight.apply(s))


# --- Functions that look alike --------------------------------------------------------------------


def drawn_term(draw, captured):
    c, number = captured, draw.choice([0.5, 1, 2, -1, 3])
    shift = draw.choice([0, 0, 1, S - L, L - S])
    return draw.choice(
        [
            lambda b, h, q, k: c.slopes[h] * (k - q + shift),
            lambda b, h, q, k: number * (q - k + shift).abs() * c.slopes[h],
            lambda b, h, q, k: (q + k) * c.slopes_bh[b, h] * number,
            lambda b, h, q, k: (k - 2 * q + shift) * 0.01,
            lambda b, h, q, k: c.slopes[h] * (k - q) * (k - q),
            lambda b, h, q, k: (c.slopes[h] * (q - k)).abs().neg(),
            lambda b, h, q, k: (k - q).clamp(max=number) / 7,
            lambda b, h, q, k: c.bias[b, h, q, k] * number,
            lambda b, h, q, k: c.bias[b, h, q, k],
            lambda b, h, q, k: c.bias[b, h // 2, q, k],
            lambda b, h, q, k: c.of_pairs[q + 1, k],
            lambda b, h, q, k: c.of_pairs[q, q],
            lambda b, h, q, k: c.transposed[k, h, q],
            lambda b, h, q, k: c.relative[h, q - k + S],
            lambda b, h, q, k: c.bias[b, 1][q, k],
            lambda b, h, q, k: c.bias[:, h][b, q, k],
            lambda b, h, q, k: torch.where(q >= k + shift, c.number, c.slopes[h]),
            lambda b, h, q, k: c.number.neg() * number,
            lambda b, h, q, k: (q % 5 * c.slopes[h]).floor(),
        ]
    )


def drawn_score(draw, captured):
    steps = []
    for _ in range(draw.randint(1, 3)):
        term, number, cap = drawn_term(draw, captured), draw.choice([0.5, 2, -1]), draw.choice([1, 3.0, -2])
        steps += draw.choices(
            [
                lambda s, *i, term=term: s + term(*i),
                lambda s, *i, term=term: s - term(*i),
                lambda s, *i, term=term: term(*i) - s,
                lambda s, *i, number=number: s * number,
                lambda s, *i, number=number: s / number,
                lambda s, *i, cap=cap: cap * torch.tanh(s / cap),
                lambda s, *i, cap=cap: torch.tanh(s * cap),
                lambda s, *i, term=term: torch.where(i[2] + 9 >= i[3], s, s + term(*i)),
                lambda s, *i: torch.where(i[2] + 30 >= i[3], s, -math.inf),
                lambda s, *i, term=term: torch.where(term(*i) > 0, term(*i), s),
                lambda s, *i, term=term: s * term(*i),
            ],
            (4, 4, 1, 1, 1, 2, 1, 2, 2, 1, 1),
        )

    def function(score, *index):
        for step in steps:
            score = step(score, *index)
        return score

    return function


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("part", range(4))
def test_random_functions(part, request):
    """Each is refused, or right, with all gradients."""
    draw = random.Random(f"{request.config.mfa_seed} {part}")
    accepted, number = 0, 200 if FULL else 20
    for n in range(number):
        captured = Captured(requires_grad=bool(n % 2))
        function, mask = drawn_score(draw, captured), draw.choice(list(MASKS))
        tensors, leaves = problem(L, S, dtype=DTYPE), captured if n % 2 else ()
        options = {"score_mod": function, "block_mask": blocks_of(MASKS[mask])}
        try:
            found = results(partial(ours, **options), tensors, leaves)
        except Unsupported:
            continue
        accepted += 1
        expected = results(partial(written_out, function=function, mask_mod=MASKS[mask]), tensors, leaves)
        close(found, expected, rtol=1e-4, atol=1e-3 if ON_METAL else 1e-5)
    assert number // 10 < accepted < number


def drawn_mask(draw):
    shift, width = draw.randint(-5, 5), draw.randint(0, 30)
    atom = draw.choice(
        [
            lambda b, h, q, k: q >= k + shift,
            lambda b, h, q, k: k < q,
            lambda b, h, q, k: q - k <= width,
            lambda b, h, q, k: (k - q + shift).abs() < width,
            lambda b, h, q, k: torch.abs(q - k) <= width,
            lambda b, h, q, k: width > q - k,
            lambda b, h, q, k: 2 * q >= k,
            lambda b, h, q, k: k <= width,
            lambda b, h, q, k: h * q >= k,
            lambda b, h, q, k: q % 7 != k % 7,
            lambda b, h, q, k: ~(q < k),
            lambda b, h, q, k: q.float() * 0.5 >= k,
            lambda b, h, q, k: (q - k) * (q - k) < width,
            lambda b, h, q, k: (q >= k) != (k > width),
        ]
    )
    if draw.random() < 0.4:
        return atom
    other, join = drawn_mask(draw), draw.choice([flex.and_masks, flex.and_masks, flex.or_masks])
    return (
        join(atom, other)
        if draw.random() < 0.7
        else lambda b, h, q, k: torch.logical_and(atom(b, h, q, k), other(b, h, q, k))
    )


def test_no_band_of_numbers_that_round():
    """In float32 q + 1e9 is k + 1e9 for all of these."""
    for number in (1e9, 1e30, 2**60):
        assert score_mod.band_of(lambda b, h, q, k: k + number <= q + number) == (None, None, False)  # noqa: B023
    assert score_mod.band_of(lambda b, h, q, k: k + 100.0 <= q + 100) == (None, 0, True)


def test_bands_of_random_masks(request):
    draw = random.Random(request.config.mfa_seed)
    distance = torch.arange(40) - torch.arange(30)[:, None]
    known = exact = 0
    for _ in range(1000 if FULL else 150):
        mask_mod = drawn_mask(draw)
        lower, upper, is_exact = score_mod.band_of(mask_mod)
        mask = flex.create_mask(mask_mod, 1, 3, 30, 40, device="cpu")[0]
        band = torch.ones_like(distance, dtype=torch.bool)
        band &= distance >= (-100 if lower is None else lower)
        band &= distance <= (100 if upper is None else upper)
        assert not (mask & ~band).any()
        assert not is_exact or torch.equal(mask, band.expand_as(mask))
        known += (lower, upper) != (None, None)
        exact += is_exact
    assert known > exact > 20
