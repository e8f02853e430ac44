"""Attention sinks: flash_attention(..., sinks=...) against attention written out, through all that PyTorch offers."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

from calls import Seen
from mps_flash_attn import explain, flash_attention, reference
from mps_flash_attn.options import Options
from mps_flash_attn.problem import Inputs
from stand_in import DTYPES, FLOAT64

FORWARD = torch.ops.mfa.attention_forward.default
BACKWARD = torch.ops.mfa.attention_backward.default
SHAPES = ((4,), (2, 4))


def problem(q_len=19, kv_len=37, heads=4, kv_heads=2, head_dim=16, value_dim=16, dtype=torch.float32, sinks=(2, 4)):
    shapes = (2, heads, q_len, head_dim), (2, kv_heads, kv_len, head_dim), (2, kv_heads, kv_len, value_dim)
    return *(torch.randn(shape).to(dtype) for shape in shapes), torch.randn(sinks)


def written_out(query, key, value, sinks, mask=0.0):
    """(out, lse) with the sinks as one more column of logits, which the softmax drops: as in gpt-oss."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    logits = query @ key.mT * query.shape[3] ** -0.5 + mask
    column = sinks.to(query.dtype)[..., None, None].expand(*query.shape[:3], 1)
    logits = torch.cat([logits, column], -1)
    return logits.softmax(-1)[..., :-1] @ value, logits.logsumexp(-1)


def attend(query, key, value, sinks):
    return flash_attention(query, key, value, "bottom_right", enable_gqa=True, sinks=sinks)


def gradients(function, *tensors):
    """out and the gradients of all tensors."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    out = function(*leaves)
    return out.detach(), *torch.autograd.grad(out.square().sum(), leaves)


# --- Values --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [{}, {"q_len": 1, "kv_len": 300}, {"q_len": 130, "kv_len": 61, "value_dim": 24}])
@pytest.mark.parametrize("mask", ["none", "bool", "float"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_results_and_gradients(dtype, sizes, mask, shape):
    query, key, value, sinks = problem(dtype=dtype, sinks=shape, **sizes)
    scores = query.shape[2], key.shape[2]
    masks = {"none": lambda: None, "bool": lambda: torch.rand(scores) < 0.7, "float": lambda: torch.randn(4, *scores)}

    def ours(query, key, value, mask, sinks):
        options = {"attn_mask": mask, "enable_gqa": True, "return_lse": True, "window_size": (-1, 9), "softcap": 5}
        return flash_attention(query, key, value, sinks=sinks, **options)

    band = {"upper": key.shape[2] - query.shape[2] + 9, "softcap": 5.0}
    reference.check(ours, (query, key, value, masks[mask](), sinks), **band)


@FLOAT64
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("is_causal", [False, "bottom_right"])
def test_attention_written_out(shape, is_causal):
    tensors = problem(dtype=torch.float64, sinks=shape)
    visible = torch.arange(37) <= torch.arange(19)[:, None] + 18
    mask = torch.where(visible, 0.0, -torch.inf) if is_causal else 0.0

    def ours(*tensors):
        options = {"enable_gqa": True, "return_lse": True}
        out, lse = flash_attention(*tensors[:3], is_causal, sinks=tensors[3], **options)
        return torch.cat([out, lse[..., None]], -1)

    def theirs(*tensors):
        out, lse = written_out(*tensors, mask)
        return torch.cat([out, lse[..., None]], -1)

    *found, found_sinks = gradients(ours, *tensors)
    *expected, expected_sinks = gradients(theirs, *tensors)
    torch.testing.assert_close(found, expected)
    assert found_sinks.shape == shape and found_sinks.dtype == torch.float32
    torch.testing.assert_close(found_sinks, expected_sinks)


def test_queries_without_keys():
    query, key, value, sinks = problem()
    mask = torch.ones(19, 37, dtype=torch.bool)
    mask[3] = False
    leaves = [t.requires_grad_() for t in (query, key, value, sinks)]
    out, lse = flash_attention(*leaves[:3], attn_mask=mask, enable_gqa=True, return_lse=True, sinks=leaves[3])
    assert not out[:, :, 3].any() and torch.equal(lse[:, :, 3], sinks)
    (of_out,) = torch.autograd.grad(out[:, :, 3].sum(), sinks, retain_graph=True)
    assert not of_out.any()
    (of_lse,) = torch.autograd.grad(lse[:, :, 3].sum(), sinks)
    torch.testing.assert_close(of_lse, torch.ones_like(sinks))


def test_no_keys_at_all():
    query, key, value, sinks = problem(kv_len=0)
    out, lse = flash_attention(query, key, value, enable_gqa=True, return_lse=True, sinks=sinks)
    assert not out.any() and torch.equal(lse, sinks[..., None].expand_as(lse))


def test_sinks_of_minus_infinity_are_none():
    """Also where a query sees no key."""
    tensors = problem()[:3]
    mask = torch.ones(19, 37, dtype=torch.bool)
    mask[3] = False
    sinks = torch.full((4,), -torch.inf)

    def run(*tensors, **options):
        return flash_attention(*tensors, attn_mask=mask, enable_gqa=True, **options)

    *found, of_sinks = gradients(lambda *all_: run(*all_[:3], sinks=all_[3]), *tensors, sinks)
    torch.testing.assert_close(found, list(gradients(run, *tensors)))
    assert torch.equal(of_sinks, torch.zeros(4))
    _, lse = run(*tensors, return_lse=True, sinks=sinks)
    assert lse[:, :, 3].eq(-torch.inf).all()


def test_sinks_may_have_any_strides():
    query, key, value, _ = problem()
    sinks = torch.randn(4, 6)[:, ::3].t()
    assert all(map(torch.equal, *(gradients(attend, query, key, value, t) for t in (sinks, sinks.contiguous()))))


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype is not torch.float32])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sinks_of_the_querys_dtype(dtype, shape):
    """They are read as float32; the gradient, summed in float32, is rounded once."""
    query, key, value, sinks = problem(dtype=dtype, sinks=shape)
    *others, expected = gradients(attend, query, key, value, sinks.to(dtype).float())
    *found, of_sinks = gradients(attend, query, key, value, sinks.to(dtype))
    assert all(map(torch.equal, found, others))
    assert torch.equal(of_sinks, expected.to(dtype)) and of_sinks.shape == shape


def test_same_shapes_with_and_without():
    """Neither is served by what was cached for the other."""
    query, key, value, sinks = problem(kv_heads=4)
    plain = [flash_attention(query, key, value) for _ in range(3)]
    with_sinks = [flash_attention(query, key, value, sinks=sinks) for _ in range(3)]
    assert torch.equal(plain[0], flash_attention(query, key, value))
    assert not torch.allclose(plain[0], with_sinks[0])
    assert torch.equal(with_sinks[0], with_sinks[2])
    assert not torch.equal(with_sinks[0], flash_attention(query, key, value, sinks=sinks + 1))


# --- Gradients -----------------------------------------------------------------------------------


@FLOAT64
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradcheck(shape):
    """Sinks are read as float32, so they and the steps of gradcheck are multiples of 1/1024, which it holds exactly."""
    step = 2**-10
    query, key, value, sinks = problem(q_len=3, kv_len=5, head_dim=4, value_dim=3, dtype=torch.float64, sinks=shape)
    sinks = (sinks / step).round().double() * step
    mask = torch.randn(3, 5, dtype=torch.float64)

    def run(query, key, value, mask, sinks):
        options = {"attn_mask": mask, "enable_gqa": True, "return_lse": True, "softcap": 3.0, "sinks": sinks}
        return flash_attention(query, key, value, "bottom_right", **options)

    leaves = [t.requires_grad_() for t in (query, key, value, mask, sinks)]
    assert torch.autograd.gradcheck(run, leaves, eps=step, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_of_the_sinks_alone(dtype):
    query, key, value, sinks = problem(dtype=dtype)
    expected = gradients(attend, query, key, value, sinks)[-1]
    out = attend(query, key, value, sinks.requires_grad_())
    assert torch.equal(torch.autograd.grad(out.square().sum(), sinks)[0], expected)


def test_no_gradient_is_computed_for_frozen_sinks():
    query, key, value, sinks = problem()
    wanted = []

    class Wanted(Seen):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is BACKWARD:
                wanted.append(args[-1])
            return super().__torch_dispatch__(function, types, args, kwargs)

    for requires_grad in (False, True):
        with Wanted():
            attend(query.requires_grad_(), key, value, sinks.requires_grad_(requires_grad)).sum().backward()
    assert wanted == [[True, False, False, False, False], [True, False, False, False, True]]


def test_operator_takes_wanted_gradients_alone():
    query, key, value, sinks = problem()
    inputs = Inputs(query, key, value, None, sinks)
    out, lse = FORWARD(*inputs, *Options())
    arguments = torch.ones_like(out), None, *inputs, out, lse, *Options()
    whole = BACKWARD(*arguments, [True, True, True, False, True])
    for place in (0, 1, 2, 4):
        wanted = [n == place for n in range(5)]
        found = BACKWARD(*arguments, wanted)
        assert [gradient.numel() > 0 for gradient in found] == wanted
        torch.testing.assert_close(found[place], whole[place])


def test_a_step_of_training_moves_the_sinks():
    """The gradient of a parameter shared by the batch, accumulated over two calls."""
    query, key, value, _ = problem()
    parameter = torch.nn.Parameter(torch.zeros(4))
    for _ in range(2):
        attend(query, key, value, parameter).square().sum().backward()
    expected = gradients(attend, query, key, value, torch.zeros(4))[-1]
    torch.testing.assert_close(parameter.grad, 2 * expected)


def test_sinks_changed_before_backward():
    query, key, value, sinks = problem()
    out = attend(query.requires_grad_(), key, value, sinks)
    sinks.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_second_derivative_raises():
    query, key, value, sinks = problem()
    out = attend(query, key, value, sinks.requires_grad_())
    (gradient,) = torch.autograd.grad(out.sum(), sinks, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        gradient.sum().backward()


# --- Through PyTorch -----------------------------------------------------------------------------


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    "wanted", [[True] * 3 + [False, True], [False] * 4 + [True], [True] * 3 + [False] * 2], ids=str
)
def test_opcheck(wanted):
    query, key, value, sinks = problem()
    inputs = Inputs(query.requires_grad_(), key, value, None, sinks.requires_grad_(), torch.rand(2, 4))
    opcheck(FORWARD, (*inputs, *Options(softcap=2.0)))
    inputs = [t if t is None else t.detach() for t in inputs]
    out, lse = FORWARD(*inputs, *Options())
    opcheck(BACKWARD, (torch.randn_like(out), torch.randn_like(lse), *inputs, out, lse, *Options(), wanted))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("route", ["compile", "checkpoint"])
def test_routes_of_training(route, shape):
    tensors = problem(dtype=DTYPES[0], sinks=shape)
    routes = {
        "compile": torch.compile(attend, fullgraph=True, backend="aot_eager"),
        "checkpoint": lambda *tensors: checkpoint(attend, *tensors, use_reentrant=False),
    }
    torch.testing.assert_close(gradients(routes[route], *tensors), gradients(attend, *tensors))


def test_compiled_once_for_all_lengths():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attend, backend=counter, fullgraph=True, dynamic=True)
    for lengths in ((9, 11), (10, 20), (33, 7), (64, 65)):
        tensors = problem(*lengths)
        torch.testing.assert_close(gradients(compiled, *tensors), gradients(attend, *tensors))
    assert counter.frame_count == 1


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("places", [(0, 0, 0, 0), (0, None, 0, None), (None, None, None, 0)])
def test_vmap(places, shape):
    tensors = problem(dtype=DTYPES[0], sinks=shape)
    mapped = [t if place is None else torch.stack([t, 2 * t, t - 1]) for t, place in zip(tensors, places, strict=True)]
    found = torch.vmap(attend, places)(*mapped)
    for n in range(3):
        sample = [t if place is None else t[n] for t, place in zip(mapped, places, strict=True)]
        torch.testing.assert_close(found[n], attend(*sample))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("transform", ["grad", "vmap of grad", "vmap of grad of the sinks", "grad of vmap"])
def test_torch_func(transform, shape):
    tensors = problem(dtype=DTYPES[0], sinks=shape)

    def loss(query, key, value, sinks):
        return attend(query, key, value, sinks).square().sum()

    expected = gradients(attend, *tensors)[1:]
    if transform == "grad":
        torch.testing.assert_close(torch.func.grad(loss, (0, 1, 2, 3))(*tensors), expected)
    elif transform == "vmap of grad":
        found = torch.vmap(torch.func.grad(loss, (0, 1, 2, 3)))(*(torch.stack([t, t]) for t in tensors))
        torch.testing.assert_close(tuple(t[1] for t in found), expected)
    elif transform == "vmap of grad of the sinks":
        query, *others = tensors
        found = torch.vmap(torch.func.grad(loss, 3), (0, None, None, None))(torch.stack([query, -query]), *others)
        torch.testing.assert_close(found[0], expected[3])
        torch.testing.assert_close(found[1], gradients(attend, -query, *others)[4])
    else:
        query, key, value, sinks = tensors
        shifted = [sinks, sinks + 1]

        def both(sinks):
            return torch.vmap(loss, (None, None, None, 0))(query, key, value, torch.stack([sinks, sinks + 1])).sum()

        each = [gradients(attend, query, key, value, one)[4] for one in shifted]
        torch.testing.assert_close(torch.func.grad(both)(sinks), sum(each))


def test_autocast_leaves_the_sinks_in_float32():
    query, key, value, sinks = problem()
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(attend, query, key, value, sinks)
        compiled = gradients(torch.compile(attend, backend="aot_eager"), query, key, value, sinks)
    cast = query.bfloat16(), key.bfloat16(), value.bfloat16()
    expected = gradients(attend, *cast, sinks)
    assert found[0].dtype == torch.bfloat16 and torch.equal(found[0], expected[0])
    assert found[-1].dtype == torch.float32 and torch.equal(found[-1], expected[-1])
    torch.testing.assert_close(compiled, found, rtol=2e-2, atol=2e-2)  # without what O loses by rounding


def test_explain():
    query, key, value, sinks = problem(kv_heads=4)
    assert "_sinks_" in explain(query, key, value, sinks=sinks).kernel
    assert "_sinks_" in explain(query, key, value, sinks=sinks[0], backward=True).kernel
    assert "_sinks_" not in explain(query, key, value).kernel


# --- Errors --------------------------------------------------------------------------------------

WRONG = {
    "list": (lambda s: [0.5] * 4, TypeError, "sinks is a list; it must be a torch.Tensor"),
    "dtype": (lambda s: s.half(), TypeError, "sinks is float16; it must be float32$"),
    "integers": (lambda s: s.long(), TypeError, "sinks is int64; it must be float32$"),
    "heads": (
        lambda s: s[:, :2],
        ValueError,
        r"sinks has the shape \(2, 2\); it must be \(heads,\) or \(batch",
    ),
    "one head": (lambda s: s[0, :1], ValueError, r"sinks has the shape \(1,\); it must be .*: \(4,\) or \(2, 4\)"),
    "batch": (lambda s: s[:1], ValueError, r"sinks has the shape \(1, 4\); it must be"),
    "scalar": (lambda s: s[0, 0], ValueError, r"sinks has the shape \(\); it must be"),
    "device": (lambda s: s.to("meta"), ValueError, "sinks is on meta and query on"),
    "sparse": (lambda s: s.to_sparse(), TypeError, "sinks has the layout sparse_coo; it must be strided"),
}


@pytest.mark.parametrize("function", [flash_attention, explain])
@pytest.mark.parametrize("case", WRONG)
def test_wrong_sinks(case, function):
    spoil, error, words = WRONG[case]
    query, key, value, sinks = problem(kv_heads=4)
    with pytest.raises(error, match=words):
        function(query, key, value, sinks=spoil(sinks))


def test_wrong_dtype_beside_half():
    query, key, value, sinks = problem(dtype=torch.float16, kv_heads=4)
    with pytest.raises(TypeError, match="sinks is bfloat16; it must be float32, or float16 as query"):
        flash_attention(query, key, value, sinks=sinks.bfloat16())


def test_wrong_sinks_of_the_operator():
    query, key, value, sinks = problem()
    for wrong, error, words in (
        (sinks.double(), TypeError, "sinks is float64; it must be float32"),
        (sinks[0], ValueError, r"sinks has the shape \(4,\); it must be"),
    ):
        with pytest.raises(error, match=words):
            FORWARD(*Inputs(query, key, value, sinks=wrong), *Options())


def test_short_storage():
    query, key, value, sinks = problem(kv_heads=4)
    sinks.untyped_storage().resize_(12)
    with pytest.raises(RuntimeError, match="sinks: sizes"):
        flash_attention(query, key, value, sinks=sinks)
