"""Tensor subclasses: those read as memory, those whose __torch_function__ is called, and masks that are translated."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.bias import CausalBias, CausalVariant, causal_lower_right, causal_upper_left

from calls import calls, problem
from mps_flash_attn import explain, flash_attention
from mps_flash_attn.options import Options
from mps_flash_attn.problem import Inputs

LENGTHS = {"more keys": (5, 9), "more queries": (9, 5), "as many": (7, 7)}
pytestmark = pytest.mark.filterwarnings("ignore:Lower right causal bias")


def operands(q_len=5, kv_len=9, requires_grad=False):
    shapes = (2, 4, q_len, 16), (2, 2, kv_len, 16), (2, 2, kv_len, 12)
    return [torch.randn(shape).requires_grad_(requires_grad) for shape in shapes]


def all_results(tensors, mask, **options):
    """The result, log-sum-exp and gradients."""
    out, lse = flash_attention(*tensors, attn_mask=mask, enable_gqa=True, return_lse=True, **options)
    seen = lse.isfinite()
    return out, lse, *torch.autograd.grad(out.sin().sum() + lse[seen].sin().sum(), tensors)


# --- masks that are a band -----------------------------------------------------------------------


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("make", [causal_upper_left, causal_lower_right])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True},
        {"is_causal": "bottom_right"},
        {"window_size": 3},
        {"window_size": (2, 1)},
        {"window_size": (-1, 2), "is_causal": "top_left", "softcap": 2.0, "scale": 0.3},
    ],
    ids=str,
)
def test_causal_bias(make, lengths, options, monkeypatch):
    """A causal bias gives the result of its bool mask, which is not materialised."""
    tensors = operands(*lengths, requires_grad=True)
    bias = make(*lengths)
    expected = all_results(tensors, bias._materialize(), **options)
    monkeypatch.delattr(CausalBias, "_materialize")
    torch.testing.assert_close(all_results(tensors, bias, **options), expected)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("make", [causal_upper_left, causal_lower_right])
def test_causal_bias_is_as_pytorchs(make, lengths):
    query, key, value = operands(*lengths)
    bias = make(*lengths)
    out = flash_attention(query, key, value, attn_mask=bias, enable_gqa=True)
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, enable_gqa=True)
    torch.testing.assert_close(out, expected)


@pytest.mark.usefixtures("everything")
@pytest.mark.parametrize("make", [causal_upper_left, causal_lower_right])
def test_causal_bias_after_replacing(make):
    tensors = problem(2, 4, 5, 16, kv_len=9)
    expected = F.scaled_dot_product_attention(*tensors, attn_mask=make(5, 9))
    out, stats = calls(F.scaled_dot_product_attention, *tensors, attn_mask=make(5, 9))
    assert stats == {"replaced": 1}
    torch.testing.assert_close(out, expected)


def test_causal_bias_has_the_kernel_of_a_band():
    query, key, value = operands()
    options = {"enable_gqa": True}
    expected = explain(query, key, value, "bottom_right", **options)
    assert explain(query, key, value, attn_mask=causal_lower_right(5, 9), **options) == expected


def test_causal_bias_again_and_again():
    """Repeated calls that differ only in the bias are right."""
    tensors = operands()
    plain = flash_attention(*tensors, enable_gqa=True)
    for make in (causal_upper_left, causal_lower_right) * 3:
        out = flash_attention(*tensors, attn_mask=make(5, 9), enable_gqa=True)
        causal = make is causal_upper_left or "bottom_right"
        assert torch.equal(out, flash_attention(*tensors, causal, enable_gqa=True))
        assert torch.equal(flash_attention(*tensors, enable_gqa=True), plain)


def test_causal_bias_under_transforms():
    tensors = operands()
    bias = causal_lower_right(5, 9)
    expected = flash_attention(*tensors, attn_mask=bias, enable_gqa=True)
    batch = [torch.stack([t, t]) for t in tensors]
    mapped = torch.vmap(lambda *given: flash_attention(*given, attn_mask=bias, enable_gqa=True))(*batch)
    torch.testing.assert_close(mapped, torch.stack([expected, expected]))
    with torch.autocast("cpu", torch.bfloat16):
        out = flash_attention(*tensors, attn_mask=bias, enable_gqa=True)
    torch.testing.assert_close(out.float(), expected, rtol=2e-2, atol=2e-2)


def test_causal_bias_compiled():
    torch._dynamo.reset()
    tensors = operands()

    def function(query, key, value, bias):
        return flash_attention(query, key, value, attn_mask=bias, enable_gqa=True)

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    for bias in (causal_upper_left(5, 9), causal_lower_right(5, 9), causal_upper_left(5, 9)):
        expected = flash_attention(*tensors, attn_mask=bias, enable_gqa=True)
        assert torch.equal(compiled(*tensors, bias), expected)
    torch._dynamo.reset()
    with pytest.raises(ValueError, match="CausalBias for 5 queries and 8 keys"):
        torch.compile(function, backend="eager")(*tensors, causal_lower_right(5, 8))


WITHOUT_MEANING = "attn_mask is a CausalBias that does not say which bias it is"
ELSEWHERE = "is a {}, whose values may be elsewhere than in its memory; it must be a plain tensor"


class Mine(CausalBias):
    pass


REFUSED = {
    "lengths": (lambda: causal_upper_left(9, 5), ValueError, "for 9 queries and 5 keys; it must be .* 5 and 9"),
    "part": (lambda: causal_lower_right(5, 9)[1:], TypeError, WITHOUT_MEANING),
    "sum": (lambda: causal_lower_right(5, 9) + 1, TypeError, WITHOUT_MEANING),
    "moved": (lambda: causal_lower_right(5, 9).to(torch.float64), TypeError, WITHOUT_MEANING),
    "subclass": (lambda: Mine(CausalVariant.LOWER_RIGHT, 5, 9), TypeError, "is a Mine that does not say"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_causal_bias_refused(case):
    make, exception, sentence = REFUSED[case]
    mask = make()
    for function in (flash_attention, explain):
        with pytest.raises(exception, match=sentence):
            function(*operands(), attn_mask=mask, enable_gqa=True)


def test_causal_bias_that_is_no_mask():
    query, key, value = operands(requires_grad=True)
    bias = torch.zeros(2, 4, 5, 16).as_subclass(CausalBias)
    with pytest.raises(TypeError, match="query " + ELSEWHERE.format("CausalBias")):
        flash_attention(bias, key, value, enable_gqa=True)
    with pytest.raises(TypeError, match="attn_mask " + ELSEWHERE.format("CausalBias")):
        torch.ops.mfa.attention_forward(*Inputs(query, key, value, causal_lower_right(5, 9)), *Options())
    d_out = torch.zeros(2, 4, 5, 12).as_subclass(CausalBias)
    for _ in range(4):
        out = flash_attention(query, key, value, enable_gqa=True)
        with pytest.raises(TypeError, match="d_out " + ELSEWHERE.format("CausalBias")):
            torch.autograd.grad(out, query, d_out, retain_graph=True)
        torch.autograd.grad(out, query, torch.ones_like(out))


# --- other subclasses ----------------------------------------------------------------------------


class Named(torch.Tensor):
    pass


class Trained(torch.nn.Parameter):
    pass


class Unwrapping(torch.Tensor):
    """A subclass whose results are plain tensors, as torchvision's."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            out = function(*args, **(kwargs or {}))
        return out.as_subclass(torch.Tensor) if isinstance(out, cls) else out


class Asked(torch.Tensor):
    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is flash_attention:
            return "its own", args[3:], kwargs
        return super().__torch_function__(function, types, args, kwargs or {})


def as_(kind, tensor):
    return Trained(tensor.detach()) if kind is Trained else tensor.as_subclass(kind)


@pytest.mark.parametrize("kind", [Named, Trained, Unwrapping])
@pytest.mark.parametrize("which", range(3))
def test_read_as_memory(kind, which):
    """The class of the result is that of PyTorch's function, and the gradient reaches the tensor."""
    tensors = problem(2, 2, 5, 16)
    given = [t.clone() for t in tensors]
    given[which] = as_(kind, given[which]).requires_grad_()
    expected = flash_attention(*[t.requires_grad_(n == which) for n, t in enumerate(tensors)], is_causal=True)
    out = flash_attention(*given, is_causal=True)
    assert type(out) is type(F.scaled_dot_product_attention(*given, is_causal=True))
    assert torch.equal(out.as_subclass(torch.Tensor), expected)
    (found,), (wanted,) = (torch.autograd.grad(o.sum(), t[which]) for o, t in ((out, given), (expected, tensors)))
    assert torch.equal(found.as_subclass(torch.Tensor), wanted)


@pytest.mark.parametrize("kind", [Named, Trained])
def test_mask_read_as_memory(kind):
    tensors, mask = problem(2, 2, 5, 16), torch.randn(5, 10)
    out = flash_attention(*tensors, attn_mask=as_(kind, mask))
    assert torch.equal(out.detach().as_subclass(torch.Tensor), flash_attention(*tensors, attn_mask=mask))


@pytest.mark.parametrize("compiled", [False, True])
def test_mask_that_may_mean_anything(compiled):
    torch._dynamo.reset()
    function = torch.compile(flash_attention, backend="eager") if compiled else flash_attention
    with pytest.raises(TypeError, match="attn_mask " + ELSEWHERE.format("Unwrapping")):
        function(*problem(2, 2, 5, 16), attn_mask=torch.zeros(5, 10).as_subclass(Unwrapping))


def test_class_is_asked():
    query, key, value = problem(2, 2, 5, 16)
    asked = key.as_subclass(Asked)
    said, positional, named = flash_attention(query, asked, value, True, 0.5, softcap=3, return_lse=True)
    assert said == "its own" and positional == (True, 0.5, None, 0)
    given = {"softcap": 3, "enable_gqa": False, "return_lse": True, "dropout_p": 0}
    assert named == given | dict.fromkeys(("alibi_slopes", "sinks", "dropout_seed", "block_mask", "block_size"))


@pytest.mark.parametrize("kind", [Named, Unwrapping])
def test_gradient_read_as_memory(kind):
    tensors = [t.requires_grad_() for t in problem(2, 2, 5, 16)]
    for _ in range(4):
        out = flash_attention(*tensors)
        d_out = torch.randn_like(out)
        expected = torch.autograd.grad(out, tensors, d_out, retain_graph=True)
        found = torch.autograd.grad(out, tensors, d_out.as_subclass(kind))
        assert all(torch.equal(f.as_subclass(torch.Tensor), e) for f, e in zip(found, expected, strict=True))
