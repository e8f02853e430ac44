"""What PyTorch's own tests know of scaled_dot_product_attention, its OpInfo, with replace_sdpa: each sample, in each
dtype, through the checks that PyTorch runs on it. Values are compared without dropout, whose masks differ."""

import functools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

from mps_flash_attn import replaced_sdpa, sdpa_stats
from mps_flash_attn.reference import agree
from stand_in import DTYPES

pytestmark = [pytest.mark.usefixtures("everything", "one_thread"), pytest.mark.needs("expecttest")]


@functools.cache
def opinfo():
    from torch.testing._internal.common_methods_invocations import op_db  # all of PyTorch's: it takes its time

    (found,) = (op for op in op_db if op.name == "nn.functional.scaled_dot_product_attention")
    return found


def samples(dtype, requires_grad=False):
    return list(opinfo().sample_inputs("cpu", dtype, requires_grad=requires_grad))


def run(sample, *tensors):
    """The operator as the OpInfo calls it: with a seed of its own for the dropout."""
    query, key, value = tensors or (sample.input, *sample.args)
    return opinfo()(query, key, value, **sample.kwargs)


def outcome(function, *arguments, **options):
    try:
        return function(*arguments, **options)
    except Exception as error:
        return type(error), str(error)


def test_the_list_is_not_empty():
    assert len(samples(torch.float32)) >= 20
    assert any(sample.kwargs.get("attn_mask") is not None for sample in samples(torch.float32))


@pytest.mark.parametrize("noncontiguous", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_result_and_gradients(dtype, noncontiguous):
    taken = 0
    for sample in samples(dtype, requires_grad=True):
        sample = sample.noncontiguous() if noncontiguous else sample
        tensors = (sample.input, *sample.args)
        theirs = run(sample)
        with replaced_sdpa():
            ours = run(sample)
        taken += "replaced" in sdpa_stats(reset=True)
        assert ours.stride() == theirs.stride()
        if sample.kwargs.get("dropout_p"):
            continue
        exact = [t.detach().double().requires_grad_() for t in tensors]
        given = {n: v.double() if isinstance(v, torch.Tensor) else v for n, v in sample.kwargs.items()}
        with sdpa_kernel(SDPBackend.MATH):
            truth = opinfo()(*exact, **given)
        d_out = torch.randn_like(theirs)
        groups = max(1, exact[0].shape[-3] // exact[1].shape[-3])
        largest_score = (exact[0] @ exact[1].repeat_interleave(groups, -3).mT).abs().max().item() / 8**0.5
        largest = [t.abs().max().item() for t in (*exact, d_out)]
        agree("out", ours, theirs, truth, dtype, 64, largest[2], largest_score)
        for name, *found in zip(
            ("dQ", "dK", "dV"),
            torch.autograd.grad(ours, tensors, d_out),
            torch.autograd.grad(theirs, tensors, d_out),
            torch.autograd.grad(truth, exact, d_out.double()),
            strict=True,
        ):
            agree(name, *found, dtype, 64, max(largest) ** 2, largest_score)
    assert taken == len(samples(dtype))


def test_gradcheck():
    """Numerical derivatives, and a batch of gradients at once."""
    with replaced_sdpa():
        for sample in samples(torch.float64, requires_grad=True):
            tensors = (sample.input, *sample.args)
            assert torch.autograd.gradcheck(
                lambda *given, sample=sample: run(sample, *given), tensors, check_batched_grad=True, fast_mode=True
            )


def test_gradgradcheck_is_as_without():
    def check(sample):
        tensors = (sample.input, *sample.args)
        return torch.autograd.gradgradcheck(lambda *given: run(sample, *given), tensors, fast_mode=True)

    passed = 0
    for sample in samples(torch.float64, requires_grad=True):
        theirs = outcome(check, sample)
        with replaced_sdpa():
            assert outcome(check, sample) == theirs
        passed += theirs is True
    assert passed >= 6  # where PyTorch takes the unfused path there is a second derivative


def test_compiled():
    """Compiled calls give the bits of eager ones; without dropout, which draws other numbers when compiled."""
    for sample in samples(torch.float32, requires_grad=True):
        if sample.kwargs.get("dropout_p"):
            continue
        tensors = (sample.input, *sample.args)

        def function(*given, options=sample.kwargs):
            return torch.nn.functional.scaled_dot_product_attention(*given, **options)

        torch._dynamo.reset()
        with replaced_sdpa():
            expected = function(*tensors)
            out = torch.compile(function, backend="aot_eager", fullgraph=True)(*tensors)
        assert "traced into a compiled graph" in sdpa_stats(reset=True)
        assert torch.equal(out, expected) and out.stride() == expected.stride()
        got, wanted = (torch.autograd.grad(o.sum(), tensors) for o in (out, expected))
        assert all(map(torch.equal, got, wanted))


@pytest.mark.parametrize("randomness", ["error", "different"])
def test_vmap(randomness):
    for sample in samples(torch.float32):
        tensors = [torch.stack([t, t + 1]) for t in (sample.input, *sample.args)]

        def mapped(*given, options=sample.kwargs):
            torch.manual_seed(0)
            function = torch.vmap(torch.nn.functional.scaled_dot_product_attention, randomness=randomness)
            return function(*given, **options)

        theirs = outcome(mapped, *tensors)
        with replaced_sdpa():
            ours = outcome(mapped, *tensors)
        if isinstance(theirs, tuple):
            assert ours == theirs
        elif sample.kwargs.get("dropout_p"):
            assert ours.shape == theirs.shape
        else:
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("transform", ["grad", "jvp", "vjp", "hessian"])
def test_function_transforms(transform):
    for sample in samples(torch.float64):

        def transformed(query, key, value, options=sample.kwargs):
            def function(query):
                torch.manual_seed(0)
                return torch.nn.functional.scaled_dot_product_attention(query, key, value, **options)

            if transform == "jvp":
                return torch.func.jvp(function, (query,), (torch.ones_like(query),))
            if transform == "vjp":
                return torch.func.vjp(function, query)[0]
            return getattr(torch.func, transform)(lambda query: function(query).sum())(query)

        tensors = [t[..., :2, :] for t in (sample.input, *sample.args)]
        if sample.kwargs.get("attn_mask") is not None:
            continue
        theirs = outcome(transformed, *tensors)
        with replaced_sdpa():
            ours = outcome(transformed, *tensors)
        if not (isinstance(theirs[0], type) or sample.kwargs.get("dropout_p")):
            torch.testing.assert_close(ours, theirs)
        assert isinstance(theirs[0], type) == isinstance(ours[0], type)


def test_fake_tensors():
    """Shapes, dtypes and strides without memory are those of the real result."""
    for sample in samples(torch.float32):
        with replaced_sdpa():
            real = run(sample)
            with FakeTensorMode() as mode:
                fake = sample.transform(lambda x: mode.from_tensor(x) if isinstance(x, torch.Tensor) else x)
                result = run(fake)
        assert result.shape == real.shape and result.dtype == real.dtype
        assert result.stride() == real.stride()


def without_dropout(requires_grad=False):
    return [s for s in samples(torch.float32, requires_grad) if not s.kwargs.get("dropout_p")]


COMPLIANT = {"check_with_mode": [], "check_all_permutations": [], "check_backward_formula": [None, None]}


@pytest.mark.parametrize("name", COMPLIANT)
def test_composite_compliance(name):
    """Tensors of a class that sees every operator, alone, beside plain ones, and as gradients."""
    from torch.testing._internal import composite_compliance

    check = getattr(composite_compliance, name)
    close = functools.partial(torch.testing.assert_close, atol=1e-4, rtol=1e-4)  # PyTorch's numbers beside ours
    for sample in without_dropout(requires_grad=True)[::2]:
        arguments = (sample.input, *sample.args), sample.kwargs, *COMPLIANT[name]
        theirs = outcome(check, opinfo(), *arguments, close)
        with replaced_sdpa():
            assert outcome(check, opinfo(), *arguments, close) == theirs
        assert theirs is None
    assert sdpa_stats(reset=True)["a tensor subclass"]


@pytest.mark.cpu("the stand-in for an MTLBuffer is written")
@pytest.mark.skipif(not hasattr(torch.Tensor, "const_data_ptr"), reason="this PyTorch has no address to read from")
def test_cow_input():
    """Copy-on-write arguments and gradients stay shared, as without this package."""

    def still_shared(sample):
        tensors = [torch._lazy_clone(t.detach()).requires_grad_() for t in (sample.input, *sample.args)]
        out = run(sample, *tensors)
        after_forward = [*map(torch._C._is_cow_tensor, tensors)]
        d_out = torch._lazy_clone(torch.ones_like(out))
        torch.autograd.grad(out, tensors, d_out)
        return after_forward, [*map(torch._C._is_cow_tensor, (*tensors, d_out))]

    for sample in without_dropout(requires_grad=True):
        theirs = still_shared(sample)
        with replaced_sdpa():
            assert still_shared(sample) == theirs
        assert all(theirs[0]) and all(theirs[1])
    assert sdpa_stats(reset=True)["replaced"] >= 12
