"""The function for ComfyUI: its arguments, and the calls that are left to the original attention. That for transformers
is in test_transformers.py."""

import functools
import sys
import types

import pytest
import torch
import torch.nn.functional as F

from mps_flash_attn import comfyui_attention, register_comfyui, sdpa_stats
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
        passed_on = {name: options[name] for name in ("is_causal", "scale", "enable_gqa") if name in options}
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
    "causal": ((FLAT[0],) * 3, {"is_causal": True}),
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


@pytest.fixture
def comfy(monkeypatch):
    """A stand-in for comfy.ldm.modules.attention, with what register_comfyui() uses of it."""
    module = types.ModuleType("comfy.ldm.modules.attention")
    registered = module.REGISTERED_ATTENTION_FUNCTIONS = {}

    def wrap_attn(function):
        @functools.wraps(function)
        def wrapper(*args, transformer_options=None, **kwargs):
            override = (transformer_options or {}).get("optimized_attention_override")
            if override is not None and not kwargs.get("_inside_attn_wrapper"):
                return override(function, *args, **kwargs, _inside_attn_wrapper=True)
            return function(*args, **kwargs, transformer_options=transformer_options)

        return wrapper

    module.wrap_attn, module.own = wrap_attn, ComfyUI()
    module.attention_pytorch = wrap_attn(module.own.own)
    module.register_attention_function = registered.setdefault
    registered["pytorch"] = module.attention_pytorch
    for name in ("comfy", "comfy.ldm", "comfy.ldm.modules"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["comfy.ldm.modules"].attention = module
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def test_comfyui_by_name(comfy):
    tensors, registered = [torch.randn(shape) for shape in FLAT], comfy.REGISTERED_ATTENTION_FUNCTIONS
    with register_comfyui():
        ours = registered["mfa"]
        found = ours(*tensors, H, mask=None, transformer_options={"block_index": 3})
        assert comfy.own.own_calls == 0 and sdpa_stats() == {"replaced": 1}
        torch.testing.assert_close(found, comfy.own.own(*tensors, H))
        options = {"optimized_attention_override": lambda function, *args, **options: 7}
        assert ours(*tensors, H, transformer_options=options) == 7  # an override is honoured, as by ComfyUI's own
        wide = [torch.randn(1, 9, 520) for _ in range(3)]
        assert torch.equal(ours(*wide, 1), comfy.own.own(*wide, 1)) and comfy.own.own_calls == 3
        with pytest.raises(ValueError, match=r'^name is "pytorch"; it must not be that of another'):
            register_comfyui("pytorch")
    assert set(registered) == {"pytorch"}
    first, second = register_comfyui(), register_comfyui()
    first.remove()
    assert set(registered) == {"pytorch", "mfa"}
    second.remove()
    assert set(registered) == {"pytorch"}
    with register_comfyui():
        registered["mfa"] = print  # by another
    assert registered["mfa"] is print


def test_comfyui_without_names(comfy, monkeypatch):
    monkeypatch.delattr(comfy, "register_attention_function")
    with pytest.raises(ImportError, match="has no register_attention_function; use comfyui_attention"):
        register_comfyui()
