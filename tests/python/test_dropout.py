"""Dropout: flash_attention(..., dropout_p=...) and replaced SDPA, against attention written out with the same mask,
dropout_mask()."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from dropped import attend, close, gradients, problem, weights_of
from mps_flash_attn import (
    Unsupported,
    dropout_mask,
    explain,
    flash_attention,
    reference,
    replaced_sdpa,
    run,
    sdpa_stats,
)
from mps_flash_attn.dropout import draw
from mps_flash_attn.options import Options
from mps_flash_attn.problem import Inputs
from stand_in import DTYPES, FLOAT64

FORWARD = torch.ops.mfa.attention_forward.default
MASK = torch.ops.mfa.dropout_mask.default
SEEDS = (0, 1, -1, 0x0123456789ABCDEF, -(2**63), 2**63 - 1)
RATES = (0.1, 0.5, 0.9)


def written_out(query, key, value, kept, dropout_p, mask=0.0):
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    weights = (query @ key.mT * query.shape[3] ** -0.5 + mask).softmax(-1)
    return weights * kept / (1 - dropout_p) @ value


# --- The mask ------------------------------------------------------------------------------------


def philox(counter, key):
    """Philox4x32-10, from the paper."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        first, second = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (second >> 32) ^ c1 ^ k0, second % 2**32, (first >> 32) ^ c3 ^ k1, first % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("dropout_p", [0, 1e-6, 0.1, 0.5, 1 - 1e-6, 1])
def test_mask_is_philox(seed, dropout_p):
    below = round(dropout_p * 2**16)
    below = min(below, 2**16 - 1) if dropout_p < 1 else below
    found = dropout_mask((2, 3, 4, 19), dropout_p, seed)
    assert found.dtype == torch.bool and found.shape == (2, 3, 4, 19)
    for b, h, i, j in itertools.product(range(2), range(3), range(4), range(19)):
        words = philox((j // 8, i, h, b), (seed % 2**32, seed % 2**64 >> 32))
        assert found[b, h, i, j] == ((words[j % 8 // 2] >> 16 * (j % 2)) % 2**16 >= below)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("dropout_p", RATES)
def test_mask_is_that_of_the_calls(seed, dropout_p):
    """A number, a scalar and a tensor of one element are the same seed."""
    kept = dropout_mask((2, 2, 33, 37), dropout_p, seed)
    assert torch.equal(dropout_mask((2, 2, 33, 37), dropout_p, torch.tensor(seed)), kept)
    for form in (seed, torch.tensor(seed), torch.tensor([seed])):
        found = weights_of(flash_attention, dropout_p=dropout_p, dropout_seed=form)
        torch.testing.assert_close(found, kept / (1 - dropout_p))


# --- Values --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [{}, {"q_len": 1, "kv_len": 300}, {"q_len": 130, "kv_len": 61, "value_dim": 24}])
@pytest.mark.parametrize("mask", ["none", "bool", "float"])
@pytest.mark.parametrize("extra", ["plain", "softcap", "sinks and ALiBi"])
def test_results_and_gradients(dtype, sizes, mask, extra):
    query, key, value = problem(dtype=dtype, **sizes)
    scores = query.shape[2], key.shape[2]
    masks = {"none": lambda: None, "bool": lambda: torch.rand(scores) < 0.7, "float": lambda: torch.randn(4, *scores)}
    sinks, slopes = (torch.randn(2, 4), torch.rand(2, 4)) if "sinks" in extra else (None, None)
    options = {"softcap": 5.0 if extra == "softcap" else 0.0}
    seed = torch.randint(2**62, ())

    def ours(query, key, value, mask, sinks, slopes, *_):
        keywords = {"attn_mask": mask, "sinks": sinks, "alibi_slopes": slopes, "enable_gqa": True, "return_lse": True}
        keywords |= {"window_size": (-1, 9), "dropout_p": 0.3, "dropout_seed": seed}
        return flash_attention(query, key, value, **keywords, **options)

    inputs = Inputs(query, key, value, masks[mask](), sinks, slopes, seed.expand(2))
    reference.check(ours, inputs, upper=key.shape[2] - query.shape[2] + 9, dropout=0.3, **options)


@FLOAT64
@pytest.mark.parametrize("dropout_p", RATES)
@pytest.mark.parametrize("is_causal", [False, "bottom_right"])
def test_attention_written_out(dropout_p, is_causal):
    tensors = problem(dtype=torch.float64)
    kept = dropout_mask((2, 4, 19, 37), dropout_p, 7)
    visible = torch.arange(37) <= torch.arange(19)[:, None] + 18
    mask = torch.where(visible, 0.0, -torch.inf) if is_causal else 0.0
    options = {"enable_gqa": True, "dropout_p": dropout_p, "dropout_seed": 7}
    found = gradients(lambda *tensors: flash_attention(*tensors, is_causal, **options), *tensors)
    expected = gradients(lambda *tensors: written_out(*tensors, kept, dropout_p, mask), *tensors)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("attention", ["flash_attention", "SDPA"])
@pytest.mark.usefixtures("everything")
def test_all_dropped(attention):
    """With a probability of 1 results and gradients are zero."""
    tensors = problem(kv_heads=4)
    functions = {"flash_attention": flash_attention, "SDPA": F.scaled_dot_product_attention}
    with replaced_sdpa():
        results = gradients(lambda *tensors: functions[attention](*tensors, dropout_p=1.0), *tensors)
    assert not any(result.any() for result in results)
    assert sdpa_stats(reset=True) == ({"replaced": 1} if attention == "SDPA" else {})


def test_log_sum_exp_has_no_dropout():
    tensors = problem(kv_heads=4)
    _, lse = flash_attention(*tensors, return_lse=True)
    _, found = flash_attention(*tensors, return_lse=True, dropout_p=0.5)
    torch.testing.assert_close(found, lse)


def test_any_number_of_threads_gives_the_same_bits():
    tensors, before = problem(300, 400), torch.get_num_threads()
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(gradients(attend, *tensors))
    torch.set_num_threads(before)
    assert all(map(torch.equal, found[0], found[1])) and all(map(torch.equal, found[0], found[2]))


def test_same_shapes_with_and_without():
    """Neither is served by what was cached for the other."""
    tensors = problem(kv_heads=4)
    plain = [flash_attention(*tensors) for _ in range(3)]
    dropped = [flash_attention(*tensors, dropout_p=0.3, dropout_seed=1) for _ in range(3)]
    other = flash_attention(*tensors, dropout_p=0.3, dropout_seed=2)
    assert torch.equal(plain[0], flash_attention(*tensors, dropout_p=0.0, dropout_seed=1))
    assert torch.equal(dropped[0], dropped[2]) and not torch.equal(dropped[0], other)
    assert not torch.allclose(plain[0], dropped[0])


# --- Seeds ---------------------------------------------------------------------------------------


def test_manual_seed_makes_it_reproducible():
    tensors = problem(kv_heads=4)

    def run():
        return flash_attention(*tensors, dropout_p=0.3)

    torch.manual_seed(3)
    first, second = run(), run()
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(run(), first) and torch.equal(run(), second)
    with torch.random.fork_rng():
        run()
    third = run()
    torch.manual_seed(3)
    assert [torch.equal(run(), one) for one in (first, second, third)] == [True] * 3


def test_nothing_is_drawn_without_need():
    """Neither without dropout, nor with a seed, nor where nothing is computed."""
    query, key, value = problem(kv_heads=4)
    before = torch.get_rng_state()
    flash_attention(query, key, value, dropout_p=0.0)
    flash_attention(query, key, value, dropout_p=0.3, dropout_seed=1)
    assert "_dropout_" in explain(query, key, value, dropout_p=0.3).kernel
    assert torch.equal(torch.get_rng_state(), before)


def test_drawn_seeds_are_different():
    query = torch.zeros(3, 1, 1, 1)
    seeds = [draw(query, 3) for _ in range(100)]
    assert all(seed.dtype == torch.int64 and seed.shape == (3,) and seed.stride() == (0,) for seed in seeds)
    words = [(seed[0].item() & 0xFFFFFFFF, seed[0].item() >> 32) for seed in seeds]
    assert len({low for low, _ in words}) == len({high for _, high in words}) == 100


@pytest.mark.parametrize("dropout_p", RATES)
@pytest.mark.usefixtures("everything")
def test_rate_through_sdpa(dropout_p):
    """Every weight is dropped with this probability, over calls, heads, queries and keys."""
    with replaced_sdpa():
        outs = [weights_of(F.scaled_dot_product_attention, dropout_p=dropout_p) for _ in range(200)]
    assert sdpa_stats() == {"replaced": 200}
    found = torch.stack(outs)
    kept = found > 0
    torch.testing.assert_close(found, kept / (1 - dropout_p))
    number, keep = kept.numel(), 1 - dropout_p
    assert abs(kept.float().mean() - keep) < 4.5 * (keep * dropout_p / number) ** 0.5
    for along in range(kept.dim()):
        means = kept.float().mean([n for n in range(kept.dim()) if n != along])
        deviation = (keep * dropout_p / (number / len(means))) ** 0.5
        assert (means - keep).abs().max() < 5 * deviation


# --- Gradients -----------------------------------------------------------------------------------


@FLOAT64
@pytest.mark.usefixtures("one_thread")
def test_gradcheck():
    query, key, value = problem(3, 5, head_dim=4, value_dim=3, dtype=torch.float64)
    mask = torch.randn(3, 5, dtype=torch.float64)

    def run(query, key, value, mask):
        options = {"attn_mask": mask, "enable_gqa": True, "return_lse": True, "softcap": 3.0}
        return flash_attention(query, key, value, "bottom_right", dropout_p=0.4, dropout_seed=11, **options)

    leaves = [t.requires_grad_() for t in (query, key, value, mask)]
    assert torch.autograd.gradcheck(run, leaves)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.autograd.gradgradcheck(run, leaves)


def test_backward_drops_what_forward_dropped():
    """With a seed that was drawn: the gradient of V shows its mask."""
    value = torch.eye(37).expand(2, 2, -1, -1).contiguous().requires_grad_()
    out = flash_attention(torch.zeros(2, 2, 33, 8), torch.zeros(2, 2, 37, 8), value, dropout_p=0.5)
    d_out = torch.randn_like(out)
    flash_attention(out.detach(), out.detach(), out.detach(), dropout_p=0.5)  # draws another
    (gradient,) = torch.autograd.grad(out, value, d_out)
    close(gradient, out.detach().mT @ d_out)


def test_seed_changed_before_backward():
    query, key, value = problem(kv_heads=4)
    seed = torch.tensor(3)
    out = flash_attention(query.requires_grad_(), key, value, dropout_p=0.3, dropout_seed=seed)
    seed.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@FLOAT64
@pytest.mark.usefixtures("everything")
@pytest.mark.parametrize("case", ["plain", "causal", "mask", "grouped"])
def test_second_derivatives_of_sdpa(case):
    """PyTorch's operator computes them, with the mask that libmfa had in forward."""
    query, key, value = problem(5, 7, kv_heads=2 if case == "grouped" else 4, dtype=torch.float64)
    options = {"enable_gqa": case == "grouped", "is_causal": case == "causal", "dropout_p": 0.3}
    mask = torch.rand(5, 7) < 0.8 if case == "mask" else None
    bias = torch.zeros(5, 7, dtype=torch.float64)
    if case in ("mask", "causal"):
        visible = mask if case == "mask" else torch.ones(5, 7, dtype=torch.bool).tril()
        bias = bias.masked_fill(~visible, -1e30)
    torch.manual_seed(3)
    kept = MASK(draw(query, 2), 4, 5, 7, 0.3)

    def penalty(attention):
        leaves = [t.detach().requires_grad_() for t in (query, key, value)]
        out = attention(*leaves)
        first = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(one.square().sum() for one in first), leaves)
        return out.detach(), *(one.detach() for one in first), *second

    torch.manual_seed(3)
    sdpa_stats(reset=True)
    with replaced_sdpa():
        found = penalty(lambda *given: F.scaled_dot_product_attention(*given, mask, **options))
    assert sdpa_stats() == {"replaced": 1, "a second derivative": 1}
    torch.testing.assert_close(found, penalty(lambda *given: written_out(*given, kept, 0.3, bias)))


@FLOAT64
@pytest.mark.usefixtures("everything")
def test_backward_without_a_kernel(monkeypatch):
    """PyTorch's operator computes the gradients of SDPA, with the mask of forward."""

    def refuse(*_):
        raise Unsupported("no kernel")

    monkeypatch.setattr(run, "backward", refuse)
    tensors = problem(5, 7, kv_heads=4, dtype=torch.float64)
    torch.manual_seed(3)
    kept = MASK(draw(tensors[0], 2), 4, 5, 7, 0.3)
    torch.manual_seed(3)
    sdpa_stats(reset=True)
    with replaced_sdpa():
        found = gradients(lambda *t: F.scaled_dot_product_attention(*t, dropout_p=0.3), *tensors)
    assert sdpa_stats() == {"replaced": 1, "no kernel": 1}
    torch.testing.assert_close(found, gradients(lambda *t: written_out(*t, kept, 0.3), *tensors))


# --- Errors --------------------------------------------------------------------------------------

WRONG = {
    "negative": ({"dropout_p": -0.1}, ValueError, "dropout_p is -0.1; it must be from 0 to 1"),
    "above 1": ({"dropout_p": 1.5}, ValueError, "dropout_p is 1.5; it must be from 0 to 1"),
    "NaN": ({"dropout_p": float("nan")}, ValueError, "dropout_p is nan; it must be from 0 to 1"),
    "text": ({"dropout_p": "0.1"}, TypeError, "dropout_p is '0.1'; it must be a number"),
    "seed of 65 bits": ({"dropout_seed": 2**63}, TypeError, "dropout_seed is 9223372036854775808; it must be a tensor"),
    "seed that is a float": ({"dropout_seed": 1.0}, TypeError, "dropout_seed is 1.0; it must be a tensor of int64"),
    "seed of float32": ({"dropout_seed": torch.ones(1)}, TypeError, "dropout_seed is float32; it must be int64"),
    "seed of int32": ({"dropout_seed": torch.ones(1).int()}, TypeError, "dropout_seed is int32; it must be int64"),
    "two seeds": (
        {"dropout_seed": torch.tensor([1, 2])},
        ValueError,
        r"dropout_seed has the shape \(2,\); it must be \(\) or \(1,\)",
    ),
    "device": ({"dropout_seed": torch.ones(1).long().to("meta")}, ValueError, "dropout_seed is on meta and query on"),
}


@pytest.mark.parametrize("function", [flash_attention, explain])
@pytest.mark.parametrize("case", WRONG)
def test_wrong_dropout(case, function):
    options, error, words = WRONG[case]
    with pytest.raises(error, match=words):
        function(*problem(kv_heads=4), **({"dropout_p": 0.5} | options))


@pytest.mark.parametrize("case", [name for name in WRONG if name != "device"])
def test_wrong_mask(case):
    options, error, words = WRONG[case]
    with pytest.raises(error, match=words):
        dropout_mask((2, 3, 4, 5), **({"dropout_p": 0.5, "dropout_seed": 1} | options))
    with pytest.raises(ValueError, match=r"shape is \(2, 3, 4\); it must have 4 sizes"):
        dropout_mask((2, 3, 4), 0.5, 1)


def test_operator_without_a_seed_and_a_seed_without_dropout():
    query, key, value = problem()
    with pytest.raises(ValueError, match="seed"):
        FORWARD(*Inputs(query, key, value), *Options(dropout=0.5))
    with pytest.raises(ValueError, match="seed"):
        FORWARD(*Inputs(query, key, value, dropout_seed=torch.tensor([1, 2])), *Options())


def test_short_storage():
    query, key, value = problem(kv_heads=4)
    seed = torch.tensor([1])
    seed.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="out of bounds for storage of size 0"):
        flash_attention(query, key, value, dropout_p=0.5, dropout_seed=seed)
