"""The functions for transformers and ComfyUI: their arguments, and the calls that are left to the original attention.
Whole models are in test_models.py."""

import pytest
import torch
import torch.nn.functional as F

from mps_flash_attn import comfyui_attention, flash_attention, register_transformers, sdpa_stats
from mps_flash_attn.reference import agree

pytestmark = pytest.mark.usefixtures("everything", "one_thread")


# --- ComfyUI -------------------------------------------------------------------------------------


class ComfyUI:
    """What ComfyUI does round a model's attention: a function for (B, N, H * D) or, with skip_reshape, (B, H, N, D)
    tensors, and the override of it that the model's options name, which is given that function first."""

    def __init__(self):
        self.own_calls = 0

    def own(
        self,
        q,
        k,
        v,
        heads,
        mask=None,
        attn_precision=None,
        skip_reshape=False,
        skip_output_reshape=False,
        **options,
    ):
        self.own_calls += 1
        if not skip_reshape:
            q, k, v = (t.view(t.shape[0], t.shape[1], -1, q.shape[-1] // heads).transpose(1, 2) for t in (q, k, v))
        if mask is not None and mask.dim() == 3:
            mask = mask[:, None]
        passed_on = {name: options[name] for name in ("scale", "enable_gqa") if name in options}
        out = F.scaled_dot_product_attention(q, k, v, mask, **passed_on)
        return out if skip_output_reshape else out.transpose(1, 2).flatten(2)

    def attention(self, *arguments, **options):
        override = comfyui_attention
        to_model = {"optimized_attention_override": override, "block_index": 3}
        return override(self.own, *arguments, transformer_options=to_model, _inside_attn_wrapper=True, **options)


B, H, L, S, D = 2, 4, 20, 31, 16
FLAT = ((B, L, H * D), (B, S, H * D), (B, S, H * D))
SPLIT = ((B, H, L, D), (B, H, S, D), (B, H, S, D))
COMFYUI = {
    "plain": (FLAT, {}),
    "mask of two dimensions": (FLAT, {"mask": (L, S)}),
    "mask of three dimensions": (FLAT, {"mask": (B, L, S)}),
    "mask of four dimensions": (FLAT, {"mask": (B, 1, L, S)}),
    "split already": (SPLIT, {"skip_reshape": True, "mask": (B, H, L, S)}),
    "stays split": (SPLIT, {"skip_reshape": True, "skip_output_reshape": True}),
    "flat, comes back split": (FLAT, {"skip_output_reshape": True, "attn_precision": torch.float32}),
    "grouped heads": ((SPLIT[0], (B, 2, S, D), (B, 2, S, D)), {"skip_reshape": True, "enable_gqa": True}),
    "flat grouped heads": ((FLAT[0], (B, S, 2 * D), (B, S, 2 * D)), {"enable_gqa": True}),
    "scale": (FLAT, {"scale": 0.3}),
}


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("case", COMFYUI)
def test_comfyui(case, kind):
    shapes, options = COMFYUI[case]
    tensors, options = [torch.randn(shape) for shape in shapes], dict(options)
    if "mask" in options:
        random = torch.randn(options["mask"])
        options["mask"] = random > 0 if kind == "bool" else random
    comfyui = ComfyUI()
    ours = comfyui.attention(*tensors, H, **options)
    assert comfyui.own_calls == 0 and sdpa_stats() == {"replaced": 1}
    theirs = comfyui.own(*tensors, H, **options)
    if options.get("mask") is not None and kind == "float":
        options["mask"] = options["mask"].double()
    truth = comfyui.own(*(t.double() for t in tensors), H, **options)
    agree("out", ours, theirs, truth, torch.float32, 8 * S)


def test_comfyui_arguments_by_position():
    tensors = [torch.randn(shape) for shape in SPLIT]
    mask = torch.rand(B, H, L, S) < 0.7
    comfyui = ComfyUI()
    found = comfyui.attention(*tensors, H, mask, None, True, True)
    assert comfyui.own_calls == 0
    torch.testing.assert_close(found, comfyui.own(*tensors, H, mask, None, True, True))


@pytest.mark.parametrize("options", [{}, {"skip_reshape": True}], ids=str)
def test_comfyui_unsupported_goes_to_its_own(options):
    """Unsupported calls reach the original attention with all arguments; invalid arguments raise instead."""
    width = 520
    tensors = [torch.randn((1, 1, 9, width) if options else (1, 9, width)) for _ in range(3)]
    comfyui = ComfyUI()
    found = comfyui.attention(*tensors, 1, mask=torch.ones(9, 9, dtype=torch.bool), scale=0.1, **options)
    assert comfyui.own_calls == 1
    assert torch.equal(found, comfyui.own(*tensors, 1, mask=torch.ones(9, 9, dtype=torch.bool), scale=0.1, **options))
    (reason,) = sdpa_stats()
    assert "520" in reason and "512" in reason
    with pytest.raises(ValueError, match="attn_mask"):
        comfyui.attention(*(torch.randn(shape) for shape in FLAT), H, mask=torch.ones(3, 3, dtype=torch.bool))


# --- transformers --------------------------------------------------------------------------------


class Module(torch.nn.Module):
    """What transformers' attention gets from its layer."""

    is_causal = True
    num_key_value_groups = 2


def both_of_transformers(*given, **options):
    """(ours, transformers' own sdpa) of one call."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    register_transformers("ours")
    ours = AttentionInterface()["ours"](Module(), *given, **options)
    return ours, sdpa_attention_forward(Module(), *given, **options)


def layer(length=L):
    return [torch.randn(B, heads, length, D) for heads in (4, 2, 2)]


TRANSFORMERS = {
    "causal": {"is_causal": None},
    "not causal": {"is_causal": False},
    "scaling": {"scaling": 0.4},
    "padding": {"mask": torch.arange(L) < torch.tensor([[[[L]]], [[[7]]]])},
    "bias": {"position_bias": (1, 4, L, L)},
    "bias and padding": {"position_bias": (1, 4, L, L), "mask": torch.arange(L) < torch.tensor([[[[L]]], [[[7]]]])},
}


@pytest.mark.needs("transformers")
@pytest.mark.parametrize("case", TRANSFORMERS)
def test_transformers(case):
    options = dict(TRANSFORMERS[case])
    mask = options.pop("mask", None)
    if "position_bias" in options:
        options["position_bias"] = torch.randn(options["position_bias"])
    ours, theirs = both_of_transformers(*layer(), mask, **options)
    assert sdpa_stats() == {"replaced": 1} and ours[1] is None
    assert ours[0].shape == (B, L, 4, D) and ours[0].is_contiguous()
    torch.testing.assert_close(ours[0], theirs[0])


@pytest.mark.needs("transformers")
def test_transformers_one_query_sees_all():
    """A step of generation: transformers calls it causal, though its query is the last of the keys."""
    query, key, value = layer()
    ours, theirs = both_of_transformers(query[:, :, -1:], key, value, None)
    torch.testing.assert_close(ours[0], theirs[0])


@pytest.mark.needs("transformers")
def test_transformers_dropout():
    torch.manual_seed(1)
    register_transformers("ours")
    from transformers import AttentionInterface

    outs = [AttentionInterface()["ours"](Module(), *layer(), None, dropout=0.5)[0] for _ in range(2)]
    assert outs[0].shape == (B, L, 4, D) and not torch.equal(*outs)
    assert sdpa_stats() == {"replaced": 2}


@pytest.mark.needs("transformers")
def test_transformers_what_is_left_to_its_own():
    register_transformers("ours")
    from transformers import AttentionInterface

    out, weights = AttentionInterface()["ours"](Module(), *layer(), None, cache=object())
    assert out.shape == (B, L, 4, D) and weights is None
    assert sdpa_stats() == {"a paged cache": 1}


@pytest.mark.needs("transformers")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_transformers_sinks(dtype):
    from transformers import AttentionInterface

    register_transformers("ours")
    inputs, sinks = [one.to(dtype) for one in layer()], torch.randn(4)
    out, weights = AttentionInterface()["ours"](Module(), *inputs, None, s_aux=sinks.double())
    expected = flash_attention(*inputs, is_causal=True, enable_gqa=True, sinks=sinks.to(dtype))
    torch.testing.assert_close(out, expected.transpose(1, 2))
    assert weights is None and sdpa_stats() == {"replaced": 1}


@pytest.mark.needs("transformers")
def test_transformers_sinks_are_never_left_out():
    from transformers import AttentionInterface

    register_transformers("ours")
    with pytest.raises(ValueError, match=r"^s_aux is given by Module: attention sinks, .* a paged cache; choose"):
        AttentionInterface()["ours"](Module(), *layer(), None, s_aux=torch.zeros(4), cache=object())


def test_a_name_that_transformers_would_misread():
    with pytest.raises(ValueError, match='may not have "flash" in it'):
        register_transformers("mps_flash")
