"""Calls that sdpa_stats() does not count since they never reach SDPA, and what brings each there: the rows of "Why is
nothing counted?" in docs/pytorch.md."""

import multiprocessing

import pytest
import torch
import torch.nn.functional as F

from calls import calls, problem
from mps_flash_attn import replace_sdpa, replaced_sdpa, sdpa_stats, sdpa_thresholds

pytestmark = pytest.mark.usefixtures("everything", "one_thread")
LAYERS = 2


def tokens():
    return torch.randn(2, 7, 16)


def count(function, *arguments, **options):
    return calls(function, *arguments, **options)[1].get("replaced", 0)


def test_weights_are_wanted():
    layer, x = torch.nn.MultiheadAttention(16, 2, batch_first=True), tokens()
    assert count(layer, x, x, x) == 0
    assert count(layer, x, x, x, need_weights=False) == 1


def test_nested_tensors_of_padded_rows():
    padding = torch.zeros(2, 7, dtype=torch.bool)
    padding[1, 4:] = True
    for nested, counted in ((True, 0), (False, LAYERS)):
        layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        encoder = torch.nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=nested).eval()
        with torch.no_grad():
            assert count(encoder, tokens(), src_key_padding_mask=padding) == counted


@pytest.mark.needs("diffusers")
def test_sliced_attention():
    from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0

    attention = Attention(16, heads=2, dim_head=8)
    attention.set_attention_slice(1)  # as enable_attention_slicing() does
    assert count(attention, tokens()) == 0
    attention.set_attention_slice(None)
    assert count(attention, tokens()) == 1
    attention.set_processor(AttnProcessor())
    assert count(attention, tokens()) == 0
    attention.set_processor(AttnProcessor2_0())
    assert count(attention, tokens()) == 1


@pytest.mark.needs("transformers")
def test_eager_attention():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "vocab_size": 50}
    for name, counted in (("eager", 0), ("sdpa", LAYERS)):
        config = LlamaConfig(num_hidden_layers=LAYERS, **sizes)
        model = LlamaForCausalLM._from_config(config, attn_implementation=name)
        assert count(model, torch.randint(0, 50, (1, 9))) == counted


def test_compiled_code():
    """Calls in compiled code are counted when they are traced; code that was compiled before is not traced again."""
    torch._dynamo.reset()
    function, tensors = torch.compile(F.scaled_dot_product_attention, backend="aot_eager"), problem()
    function(*tensors)
    assert calls(function, *tensors)[1] == {}
    torch.compiler.reset()
    assert "traced into a compiled graph" in calls(function, *tensors)[1]
    assert calls(function, *tensors)[1] == {}


def _in_a_worker(replacing):
    for dtype in sdpa_thresholds:
        sdpa_thresholds[dtype] = 0
    if replacing:
        replace_sdpa()
    F.scaled_dot_product_attention(*problem())
    return sdpa_stats()


@pytest.mark.cpu("a process of its own has no stand-in for Metal")
def test_spawned_worker():
    with replaced_sdpa(), multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(_in_a_worker, (False,)) == {}
        assert pool.apply(_in_a_worker, (True,)) == {"replaced": 1}
