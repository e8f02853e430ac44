"""replace_flex_attention(): which names it replaces, which calls, and that it can be undone."""

import copy
import sys
import types
import warnings

import pytest
import torch
from torch.nn.attention import flex_attention as flex

from dropped import problem
from mps_flash_attn import replace_flex_attention, sdpa_stats
from mps_flash_attn.flex_replacement import FlexReplacement

ORIGINAL = flex.flex_attention


def causal(b, h, q, k):
    return q >= k


@pytest.fixture(autouse=True)
def _counts():
    sdpa_stats(reset=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's is slow without being compiled
        yield
    assert flex.flex_attention is ORIGINAL


def user(monkeypatch, name="a_user_of_flex_attention"):
    """A module that has imported the function."""
    module = types.ModuleType(name)
    module.flex_attention = flex.flex_attention
    monkeypatch.setitem(sys.modules, name, module)
    return module


def test_gradients_on_the_cpu():
    query, key, value = (tensor.requires_grad_() for tensor in problem(70, 70))
    blocks = flex.create_block_mask(causal, None, None, 70, 70, device="cpu")
    options = {"block_mask": blocks, "enable_gqa": True}
    with pytest.raises(NotImplementedError, match="backward on CPU"):
        flex.flex_attention(query, key, value, **options)
    with replace_flex_attention() as handle:
        assert isinstance(handle, FlexReplacement)
        out = flex.flex_attention(query, key, value, **options)
        out.sum().backward()
    assert sdpa_stats() == {"replaced": 1}
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    assert query.grad is not None


def test_names_and_nesting(monkeypatch):
    before = user(monkeypatch)
    outer = replace_flex_attention()
    replaced = flex.flex_attention
    during = user(monkeypatch, "a_later_user")
    assert before.flex_attention is during.flex_attention is replaced is not ORIGINAL
    assert replaced.__name__ == "flex_attention" and replaced.__doc__ == ORIGINAL.__doc__
    with replace_flex_attention():
        outer.remove()
        outer.remove()
        assert flex.flex_attention is before.flex_attention is replaced
    assert before.flex_attention is during.flex_attention is ORIGINAL
    tensors = problem(16, 16, kv_heads=4)
    torch.testing.assert_close(replaced(*tensors), ORIGINAL(*tensors))  # one that was kept calls PyTorch's
    assert sdpa_stats() == {}


def test_an_other_name_stays(monkeypatch):
    """One that a user has put in place of ours is not touched."""
    module = user(monkeypatch)
    with replace_flex_attention():
        module.flex_attention = own = object()
    assert module.flex_attention is own


def test_what_pytorch_runs():
    tensors = problem(32, 32, kv_heads=4)

    def squared(score, b, h, q, k):
        return score * score

    expected = ORIGINAL(*tensors, score_mod=squared)
    with replace_flex_attention():
        torch.testing.assert_close(flex.flex_attention(*tensors, score_mod=squared), expected)
        (reason,) = sdpa_stats()
        assert reason.startswith("score_mod applies mul to the score twice")
        with pytest.raises(NotImplementedError, match="backward on CPU"):
            flex.flex_attention(*(tensor.requires_grad_() for tensor in tensors), score_mod=squared)


def test_compiled():
    tensors = [tensor.requires_grad_() for tensor in problem(32, 32, kv_heads=4)]
    torch._dynamo.reset()

    def model(*tensors):
        return flex.flex_attention(*tensors, score_mod=lambda s, b, h, q, k: s + (k - q)) * 2

    with replace_flex_attention():
        compiled = torch.compile(model, backend="aot_eager")
        for _ in range(2):
            found, expected = (
                (out, *torch.autograd.grad(out.sum(), tensors)) for out in (compiled(*tensors), model(*tensors))
            )
            torch.testing.assert_close(found, expected)
        assert sdpa_stats() == {"replaced": 4}


@pytest.mark.needs("transformers")
@pytest.mark.parametrize("name", ["Llama", "Gemma2"])
def test_transformers(name):
    """A padded batch, with a sliding window and softcap in Gemma 2: training with attn_implementation="flex_attention"
    on the CPU, as with "eager"."""
    import transformers

    torch._dynamo.reset()
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "vocab_size": 50, "head_dim": 16}
    config = getattr(transformers, f"{name}Config")(**sizes, **({"sliding_window": 16} if name == "Gemma2" else {}))
    eager = transformers.AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation="eager")
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="flex_attention")
    model.load_state_dict(eager.state_dict())
    words, is_word = torch.randint(50, (2, 40)), torch.ones(2, 40, dtype=torch.int64)
    is_word[0, 33:] = 0
    losses = []
    with replace_flex_attention():
        for one in (eager, model):
            logits = one(words, attention_mask=is_word).logits
            loss = logits[is_word.bool()].square().mean()
            loss.backward()
            losses.append(loss.detach())
    assert sdpa_stats() == {"replaced": 2}
    torch.testing.assert_close(*losses)
    for one, other in zip(eager.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-5)
