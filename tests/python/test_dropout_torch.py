"""Dropout through what PyTorch offers: compilers, checkpoints, autocast, torch.func and the modules of torch.nn."""

import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from calls import calls
from dropped import attend, close, gradients, problem, weights_of
from mps_flash_attn import dropout, dropout_mask, flash_attention, replaced_sdpa, sdpa_stats, transforms
from mps_flash_attn.options import Options
from mps_flash_attn.problem import Inputs
from stand_in import DTYPES

FORWARD = torch.ops.mfa.attention_forward.default
BACKWARD = torch.ops.mfa.attention_backward.default
MASK = torch.ops.mfa.dropout_mask.default
ATTENTION = {"flash_attention": flash_attention, "SDPA": F.scaled_dot_product_attention}


# --- Operators, compilers, checkpoints, modes ----------------------------------------------------


@pytest.mark.usefixtures("one_thread")
def test_opcheck():
    query, key, value = problem()
    seed = torch.tensor([3, 4])
    inputs = Inputs(query.requires_grad_(), key, value, None, torch.randn(2, 4), torch.rand(2, 4), seed)
    opcheck(FORWARD, (*inputs, *Options(softcap=2.0, dropout=0.3)))
    inputs = [t if t is None else t.detach() for t in inputs]
    out, lse = FORWARD(*inputs, *Options(dropout=0.3))
    wanted = [True, True, True, False, True]
    opcheck(BACKWARD, (torch.randn_like(out), torch.randn_like(lse), *inputs, out, lse, *Options(dropout=0.3), wanted))
    opcheck(MASK, (seed, 2, 3, 4, 0.3))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled(backend):
    """With a seed it gives what eager calls do; a drawn one is new in each call, and made again by manual_seed()."""
    torch._dynamo.reset()
    tensors = problem()
    compiled = torch.compile(attend, fullgraph=True, backend=backend)
    close(gradients(lambda *t: compiled(*t, torch.tensor(3)), *tensors), gradients(lambda *t: attend(*t, 3), *tensors))
    for seed in (3, 4, 5):
        close(compiled(*tensors, seed), attend(*tensors, seed))

    @torch.compile(fullgraph=True, backend=backend)
    def drawn(value):
        zeros = torch.zeros(2, 2, 33, 8), torch.zeros(2, 2, 37, 8)
        return flash_attention(*zeros, value, dropout_p=0.5)

    def run():
        value = torch.eye(37).expand(2, 2, -1, -1).contiguous().requires_grad_()
        out = drawn(value)
        d_out = torch.randn_like(out)
        close(torch.autograd.grad(out, value, d_out)[0], out.detach().mT @ d_out)
        return out.detach()

    torch.manual_seed(3)
    first, second = run(), run()
    assert not torch.equal(first, second)
    assert 0.4 < (first > 0).float().mean() < 0.6
    torch.manual_seed(3)
    assert torch.equal(run(), first) and torch.equal(run(), second)


@pytest.mark.usefixtures("everything")
def test_compiled_sdpa():
    torch._dynamo.reset()
    with replaced_sdpa():
        compiled = torch.compile(F.scaled_dot_product_attention, fullgraph=True, backend="aot_eager")
        outs = [weights_of(compiled, dropout_p=0.5) for _ in range(2)]
    assert set(sdpa_stats()) <= {"traced into a compiled graph"}
    assert not torch.equal(*outs)
    torch.testing.assert_close(outs[0], (outs[0] > 0) * 2.0)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.usefixtures("everything")
@pytest.mark.parametrize("attention", ATTENTION)
def test_checkpoint_drops_the_same_again(use_reentrant, attention):
    def run(value):
        zeros = torch.zeros(2, 2, 33, 8), torch.zeros(2, 2, 37, 8)
        return ATTENTION[attention](*zeros, value, dropout_p=0.5)

    value = torch.eye(37).expand(2, 2, -1, -1).contiguous().requires_grad_()
    with replaced_sdpa():
        out = checkpoint(run, value, use_reentrant=use_reentrant)
        torch.rand(3)
        d_out = torch.randn_like(out)
        (gradient,) = torch.autograd.grad(out, value, d_out) if not use_reentrant else (None,)
        if use_reentrant:
            out.backward(d_out)
            gradient = value.grad
    close(gradient, out.detach().mT @ d_out)


def test_selective_checkpoint():
    """Attention is not computed again there, but its seed is drawn again."""
    context = functools.partial(create_selective_checkpoint_contexts, [FORWARD])

    def run(value):
        zeros = torch.zeros(2, 2, 33, 8), torch.zeros(2, 2, 37, 8)
        return flash_attention(*zeros, value, dropout_p=0.5)

    value = torch.eye(37).expand(2, 2, -1, -1).contiguous().requires_grad_()
    out = checkpoint(run, value, use_reentrant=False, context_fn=context)
    torch.rand(3)
    d_out = torch.randn_like(out)
    (gradient,) = torch.autograd.grad(out, value, d_out)
    close(gradient, out.detach().mT @ d_out)


def test_saved_tensors_may_be_moved():
    """Hooks for saved tensors get the seed, too."""
    tensors = problem()
    expected = gradients(attend, *tensors)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        found = gradients(attend, *tensors)
    assert all(map(torch.equal, found, expected))


def test_autocast():
    query, key, value = problem()
    with torch.autocast("cpu", torch.bfloat16):
        found = attend(query, key, value)
    assert torch.equal(found, attend(query.bfloat16(), key.bfloat16(), value.bfloat16()))


def test_inference_mode():
    with torch.inference_mode():
        first, second = (weights_of(flash_attention, dropout_p=0.5) for _ in range(2))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("places", [(0, 0, 0, 0), (0, None, 0, None), (None, None, None, 0), (2, 1, 3, 0)])
def test_vmap_over_seeds(places):
    """Each sample is what a call of its own gives, whether the seeds are mapped or not."""
    tensors = (*problem(dtype=DTYPES[0]), torch.tensor([5]))
    mapped = [
        t if place is None else torch.stack([t, 2 * t, t - 1], place) for t, place in zip(tensors, places, strict=True)
    ]
    found = torch.vmap(attend, places)(*mapped)
    for n in range(3):
        sample = [t if place is None else t.select(place, n) for t, place in zip(mapped, places, strict=True)]
        torch.testing.assert_close(found[n], attend(*sample))


def test_vmap_of_the_mask():
    seeds = torch.tensor([3, 4, 5])
    found = torch.vmap(lambda seed: dropout_mask((2, 2, 5, 9), 0.5, seed))(seeds)
    assert torch.equal(found, torch.stack([dropout_mask((2, 2, 5, 9), 0.5, seed) for seed in seeds]))


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.usefixtures("everything")
def test_randomness_of_vmap(attention):
    zeros = torch.zeros(3, 2, 2, 33, 8), torch.zeros(2, 2, 37, 8)

    def run(query):
        return ATTENTION[attention](query, zeros[1], torch.eye(37).expand(2, 2, -1, -1), dropout_p=0.5)

    with replaced_sdpa():
        with pytest.raises(RuntimeError, match="randomness"):
            torch.vmap(run)(zeros[0])
        same = torch.vmap(run, randomness="same")(zeros[0]) > 0
        different = torch.vmap(run, randomness="different")(zeros[0]) > 0
        nested = (
            torch.vmap(torch.vmap(run, randomness="different"), randomness="different")(
                zeros[0].expand(2, -1, -1, -1, -1, -1)
            )
            > 0
        )
        if attention == "SDPA":  # PyTorch's operator says what it cannot
            with pytest.raises(RuntimeError, match="different inplace randomness on an unbatched tensor"):
                torch.vmap(lambda x: run(zeros[0][0]) + x, randomness="different")(torch.zeros(3, 1))
            unmapped = ()
        else:
            unmapped = torch.vmap(lambda x: run(zeros[0][0]) + x, randomness="different")(torch.zeros(3, 1)) > 0
    assert torch.equal(same[0], same[1]) and torch.equal(same[0], same[2])
    for one, other in itertools.combinations((*different, *nested.flatten(0, 1), *unmapped), 2):
        assert 0.4 < (one == other).float().mean() < 0.6  # of independent masks half of the elements are equal


def test_seed_is_the_same_without_a_rule_for_views(monkeypatch):
    """vmap has no rule for Tensor.view(dtype) before PyTorch 2.13; the seed drawn without it is that of plain calls."""
    monkeypatch.setattr(transforms, "vmaps_view_as_dtype", False)
    torch.manual_seed(3)
    expected = dropout.draw(torch.zeros(2, 1), 2)
    torch.manual_seed(3)
    found = torch.vmap(lambda query: dropout.draw(query, 2), randomness="same")(torch.zeros(3, 2, 1))
    assert torch.equal(found, expected.expand(3, 2)) and int(expected[0]) >= 2**32


@pytest.mark.parametrize("transform", ["grad", "vmap of grad", "grad of vmap"])
def test_torch_func(transform):
    tensors = problem(dtype=DTYPES[0])

    def loss(query, key, value):
        return attend(query, key, value).square().sum()

    grad = torch.func.grad(loss, (0, 1, 2))
    expected = gradients(attend, *tensors)[1:]
    if transform == "grad":
        torch.testing.assert_close(grad(*tensors), expected)
        return
    stacked = [torch.stack([t, t]) for t in tensors]
    if transform == "vmap of grad":
        found = torch.vmap(grad)(*stacked)
    else:
        found = torch.func.grad(lambda *all_: torch.vmap(loss)(*all_).sum(), (0, 1, 2))(*stacked)
    torch.testing.assert_close(tuple(t[1] for t in found), expected)


@pytest.mark.parametrize("randomness", ["same", "different"])
@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.usefixtures("everything")
def test_gradients_of_each_sample(randomness, attention):
    """vmap(grad(...)), as for differential privacy: each sample's gradient has the mask of its result."""
    zeros = torch.zeros(2, 2, 33, 8), torch.zeros(2, 2, 37, 8)
    d_out = torch.randn(2, 2, 33, 37)

    def loss(value):
        out = ATTENTION[attention](*zeros, value, dropout_p=0.5)
        return (out * d_out).sum(), out.detach()

    values = torch.eye(37).expand(3, 2, 2, -1, -1)
    with replaced_sdpa():
        found, outs = torch.vmap(torch.func.grad(loss, has_aux=True), randomness=randomness)(values)
    close(found, outs.mT @ d_out)
    assert torch.equal(outs[0], outs[1]) == (randomness == "same")


# --- Modules of torch.nn -------------------------------------------------------------------------


@pytest.mark.usefixtures("everything")
@pytest.mark.parametrize("name", ["MultiheadAttention", "TransformerEncoderLayer", "Transformer"])
def test_modules_in_training(name):
    x = torch.randn(2, 9, 32)
    modules = {
        "MultiheadAttention": lambda: torch.nn.MultiheadAttention(32, 4, 0.3, batch_first=True),
        "TransformerEncoderLayer": lambda: torch.nn.TransformerEncoderLayer(32, 4, 64, 0.3, batch_first=True),
        "Transformer": lambda: torch.nn.Transformer(32, 4, 1, 1, 64, 0.3, batch_first=True),
    }
    module = modules[name]()

    def run():
        if name == "MultiheadAttention":
            return module(x, x, x, need_weights=False)[0]
        return module(x, x) if name == "Transformer" else module(x)

    torch.manual_seed(1)
    first, stats = calls(run)
    assert stats == {"replaced": 3 if name == "Transformer" else 1}
    assert not torch.equal(calls(run)[0], first)
    torch.manual_seed(1)
    assert torch.equal(calls(run)[0], first)
    first.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in module.parameters())


@pytest.mark.needs("transformers")
@pytest.mark.usefixtures("everything")
def test_model_of_transformers_in_training():
    """BERT's attention has dropout only while it is trained."""
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 64}
    model = BertModel(BertConfig(vocab_size=99, attention_probs_dropout_prob=0.3, hidden_dropout_prob=0.0, **sizes))
    tokens = torch.randint(99, (2, 9))
    for training in (True, False):
        model.train(training)
        with replaced_sdpa():
            first, second = (model(tokens).last_hidden_state for _ in range(2))
        assert sdpa_stats(reset=True) == {"replaced": 4}
        assert torch.equal(first, second) != training
    model.train()
    model(tokens).last_hidden_state.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.encoder.parameters())


def losses(seed, steps):
    """Those of a classifier of sequences, which is trained with dropout."""
    torch.manual_seed(seed)
    layer = torch.nn.TransformerEncoderLayer(32, 4, 64, dropout=0.1, batch_first=True)
    model = torch.nn.Sequential(torch.nn.Embedding(11, 32), layer, torch.nn.Linear(32, 11))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    found = []
    for _ in range(steps):
        tokens = torch.randint(11, (16, 24))
        loss = F.cross_entropy(model(tokens).flatten(0, 1), tokens.flip(1).flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


@pytest.mark.usefixtures("everything", "one_thread")
def test_training_as_with_pytorch():
    """Masks differ from PyTorch's, so losses do; their means over many runs agree."""
    seeds, steps = range(20), 15
    theirs = torch.tensor([losses(seed, steps) for seed in seeds])
    with replaced_sdpa():
        ours = torch.tensor([losses(seed, steps) for seed in seeds])
    assert sdpa_stats() == {"replaced": len(seeds) * steps}
    difference = ours - theirs  # of a seed: the same weights and batches
    deviation = difference.std(0) / len(seeds) ** 0.5
    assert (difference.mean(0).abs() < 4 * deviation + 1e-4).all(), f"{difference.mean(0)} {deviation}"
    assert ours[:, -3:].mean() < ours[:, :3].mean() - 0.05
    print(f"last losses {ours[:, -1].mean():.4f}, PyTorch's {theirs[:, -1].mean():.4f}, +- {deviation[-1]:.4f}")
