"""Attention under torch.func: its transforms, alone and within each other, run our kernels through flash_attention and
through a replaced scaled_dot_product_attention, and give what they give of PyTorch's unfused path in float64."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.backends.common import aot_autograd
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from calls import Seen, calls
from mps_flash_attn import comfyui_attention, flash_attention, replaced_sdpa, run, sdpa_thresholds, transforms
from mps_flash_attn.options import Options
from mps_flash_attn.problem import Inputs
from mps_flash_attn.transformers import transformers_attention
from stand_in import DTYPES

pytestmark = pytest.mark.usefixtures("everything", "one_thread")
DTYPE = torch.float64 if torch.float64 in DTYPES else torch.float32  # a GPU has no float64
CLOSE = {} if DTYPE is torch.float64 else {"rtol": 1e-3, "atol": 1e-4, "check_dtype": False}


def flash(query, key, value, mask=None, **options):
    return flash_attention(query, key, value, attn_mask=mask, **options)


def sdpa(query, key, value, mask=None, **options):
    return F.scaled_dot_product_attention(query, key, value, mask, **options)


def unfused(*operands, **options):
    with sdpa_kernel(SDPBackend.MATH):
        return sdpa(*operands, **options)


def operands(case, dtype=DTYPE):
    """(tensors, options) of a call."""
    query, key, value = (torch.randn(2, 4, 5, 3, dtype=torch.float64).to(dtype) for _ in range(3))
    tensors, options = [query, key, value], {}
    if case == "causal":
        options = {"is_causal": True, "scale": 0.3}
    elif case == "grouped":
        tensors, options = [query, key[:, :2], value[:, :2]], {"enable_gqa": True}
    elif case == "other width":
        tensors[2] = value[..., :2]
    elif case == "float mask":
        tensors.append(torch.randn(4, 5, 5, dtype=torch.float64).to(dtype))
    elif case == "bool mask":
        tensors.append(torch.rand(5, 5) < 0.7)
    elif case == "two dimensions":
        tensors = [tensor[0, 0] for tensor in tensors] + [torch.rand(5, 5) < 0.7]
    elif case == "broadcast":
        tensors = [query, key[:1], value[0]]
    return tensors, options


BOTH = ["plain", "causal", "other width", "float mask", "bool mask", "grouped"]
CASES = [(flash, case) for case in BOTH] + [(sdpa, case) for case in (*BOTH, "two dimensions", "broadcast")]
EACH_CASE = pytest.mark.parametrize("function, case", CASES, ids=lambda each: getattr(each, "__name__", each))


def stacked(tensors, dimension=0):
    """Stacks two samples of each tensor."""
    return [torch.stack([t, -t if t.is_floating_point() else ~t], dimension) for t in tensors]


def places(tensors):
    """The positions of operands that have gradients."""
    return tuple(place for place, tensor in enumerate(tensors) if tensor.is_floating_point())


def loss(attend):
    return lambda *tensors: attend(*tensors).sin().sum()


def with_vjp(attend, tensors):
    out, pull = vjp(lambda query, key: attend(query, key, *tensors[2:]), *tensors[:2])
    return out, pull(torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape))


def one_mapped(transformed, tensors, place, dimension=0):
    """vmap along one operand, the others being the same for all."""
    dimensions = [dimension if each == place else None for each in range(len(tensors))]
    given = [stacked([t], dimension)[0] if each == place else t for each, t in enumerate(tensors)]
    return vmap(transformed, tuple(dimensions))(*given)


TRANSFORMS = {
    "grad": lambda f, t: grad(loss(f), places(t))(*t),
    "vjp": with_vjp,
    "jacrev": lambda f, t: jacrev(f, places(t))(*t),
    "jacrev in chunks": lambda f, t: jacrev(f, 1, chunk_size=50)(*t),
    "vmap": lambda f, t: vmap(f)(*stacked(t)),
    "vmap in chunks": lambda f, t: vmap(f, chunk_size=1)(*stacked(t)),
    "vmap of the query": lambda f, t: one_mapped(f, t, 0),
    "vmap of the key": lambda f, t: one_mapped(f, t, 1, -1),
    "vmap of the last": lambda f, t: one_mapped(f, t, len(t) - 1, 1),
    "vmap of none": lambda f, t: vmap(lambda x: f(*t) * x)(t[0].new_ones(2)),
    "vmap of vmap": lambda f, t: vmap(vmap(f))(*stacked(stacked(t))),
    "vmap of grad": lambda f, t: vmap(grad(loss(f), places(t)))(*stacked(t)),
    "vmap of grad, of the query": lambda f, t: one_mapped(grad(loss(f), (0, 1)), t, 0),
    "grad of vmap": lambda f, t: grad(loss(vmap(f)), places(t))(*stacked(t)),
    "vmap of jacrev": lambda f, t: vmap(jacrev(f))(*stacked(t)),
    "functionalize": lambda f, t: torch.func.functionalize(grad(loss(f)))(*t),
}


@pytest.fixture
def passes(monkeypatch):
    """A list that grows with each pass of our kernels."""
    found = []
    for name in ("run_forward", "run_backward"):
        original = getattr(run, name)

        def counted(*arguments, original=original, name=name):
            query = arguments[1][0][0] if name == "run_backward" else arguments[1][0]
            found.append((name, tuple(query.shape)))
            return original(*arguments)

        monkeypatch.setattr(run, name, counted)
    return found


@pytest.mark.parametrize("transform", TRANSFORMS)
@EACH_CASE
def test_transform(passes, function, case, transform):
    """The transform runs on our kernels and is right, whichever dimension is mapped and whichever operands are
    differentiated."""
    tensors, options = operands(case)
    exact = [t.double() if t.is_floating_point() else t for t in tensors]
    expected = TRANSFORMS[transform](functools.partial(unfused, **options), exact)
    found, stats = calls(TRANSFORMS[transform], functools.partial(function, **options), tensors)
    torch.testing.assert_close(found, expected, **CLOSE)
    assert passes
    assert set(stats) == ({"replaced"} if function is sdpa else set())


def test_samples_are_one_call(passes):
    """vmap turns samples into one batch, forward and backward."""
    tensors, _ = operands("plain")
    calls(vmap(grad(loss(sdpa))), *stacked(tensors))
    vmap(grad(loss(flash)))(*stacked(tensors))
    assert passes == 2 * [("run_forward", (4, 4, 5, 3)), ("run_backward", (4, 4, 5, 3))]


@pytest.mark.parametrize("detached", [True, False])
def test_gradients_for_each_sample(passes, detached):
    """Of a model's parameters, whether or not those require gradients outside of torch.func."""
    layer = torch.nn.TransformerEncoderLayer(12, 4, 16, dropout=0.0, batch_first=True).to(DTYPE)
    x, parameters = torch.randn(3, 5, 12, dtype=DTYPE), dict(layer.named_parameters())
    if detached:
        parameters = {name: parameter.detach() for name, parameter in parameters.items()}

    def for_each():
        return vmap(grad(lambda p, x: functional_call(layer, p, x[None]).square().sum()), (None, 0))(parameters, x)

    expected = for_each()
    found, stats = calls(for_each)
    torch.testing.assert_close(found, expected, **CLOSE)
    assert stats == {"replaced": 1} and len(passes) == 2
    assert all(gradient.requires_grad is not detached for gradient in found.values())


def no_grad_within(attend, query, key, value):
    def function(key):
        with torch.no_grad():
            constant = attend(query, key, value)
        return (constant * key).sum()

    return grad(function)(key)


NO_GRAD = {
    "within": no_grad_within,
    "around": lambda f, q, k, v: torch.no_grad()(grad(loss(f), 1))(q, k, v),
    "around pull": lambda f, q, k, v: torch.no_grad()(vjp(lambda key: f(q, key, v), k)[1])(torch.ones_like(q))[0],
    "not at all": lambda f, q, k, v: grad(loss(f), 1)(q, k, v),
}


@pytest.mark.parametrize("where", NO_GRAD)
@pytest.mark.parametrize("function", [flash, sdpa])
def test_no_grad(function, where):
    """What a level does not differentiate is a constant to it; what it does not record, no outer level has."""
    query, key, value = operands("plain")[0]
    query.requires_grad_()
    expected = NO_GRAD[where](unfused, query, key, value)
    found, _ = calls(NO_GRAD[where], function, query, key, value)
    torch.testing.assert_close(found, expected, **CLOSE)
    assert found.requires_grad == expected.requires_grad


# --- second derivatives, forward mode ------------------------------------------------------------


def squares(gradients):
    return sum(gradient.square().sum() for gradient in gradients)


def within_one_level(attend, query, *others):
    def function(query):
        (gradient,) = torch.autograd.grad(loss(attend)(query, *others), query, create_graph=True)
        return gradient.square().sum()

    return grad(function)(query)


def outside_of_func(attend, *tensors):
    tensors = [t.clone().requires_grad_(t.is_floating_point()) for t in tensors]
    gradient = grad(loss(attend))(*tensors)
    return torch.autograd.grad(gradient.square().sum(), [t for t in tensors if t.requires_grad])


def after_its_level(attend, query, *others):
    """A function whose gradients are differentiated after its transform has ended."""

    def function(query):
        return torch.autograd.grad(loss(attend)(query, *others), query, create_graph=True)[0]

    gradient, pull = vjp(function, query)
    return pull(gradient)


SECOND = {
    "grad of grad": lambda f, *t: grad(lambda *t: squares(grad(loss(f), places(t))(*t)), places(t))(*t),
    "jacrev of jacrev": lambda f, *t: jacrev(jacrev(loss(f), places(t)), places(t))(*t),
    "vmap of grad of grad": lambda f, *t: vmap(grad(lambda *t: squares(grad(loss(f), (0, 1))(*t))))(*stacked(t)),
    "grad of vmap of grad": lambda f, *t: grad(lambda *t: squares(vmap(grad(loss(f), (0, 1)))(*t)))(*stacked(t)),
    "within one level": within_one_level,
    "outside of torch.func": outside_of_func,
    "after its level": after_its_level,
}


def outcome(function, *arguments):
    try:
        return function(*arguments)
    except (NotImplementedError, RuntimeError) as error:
        return type(error), str(error)


@pytest.mark.parametrize("order", SECOND)
@EACH_CASE
def test_second_derivative(function, case, order):
    """A second derivative is never silently zero: flash_attention raises; SDPA has one where PyTorch does, else it
    raises PyTorch's error."""
    tensors, options = operands(case)
    attend = functools.partial(function, **options)
    if function is flash:
        with pytest.raises(NotImplementedError, match="flash_attention has no second derivative"):
            SECOND[order](attend, *tensors)
        return
    theirs = outcome(SECOND[order], attend, *tensors)
    ours, stats = calls(outcome, SECOND[order], attend, *tensors)
    if isinstance(theirs[0], type):
        assert ours == theirs
    else:
        exact = [t.double() if t.is_floating_point() else t for t in tensors]
        truth = SECOND[order](functools.partial(unfused, **options), *exact)
        torch.testing.assert_close(ours, truth, **CLOSE)
    assert stats["a second derivative"] == stats["replaced"] == 1


def test_third_derivative():
    query, key, value = operands("other width")[0]

    def third(query):
        first = grad(lambda x: sdpa(x, key, value).sin().sum())
        return grad(lambda x: grad(lambda x: first(x).square().sum())(x).square().sum())(query)

    found, _ = calls(third, query)
    torch.testing.assert_close(found, third(query), **CLOSE)


FORWARD_MODE = {
    "jvp": lambda f, q, k, v: jvp(lambda q: f(q, k, v), (q,), (q,)),
    "jacfwd": lambda f, q, k, v: jacfwd(f, 1)(q, k, v),
    "hessian": lambda f, q, k, v: hessian(loss(f))(q, k, v),
    "linearize": lambda f, q, k, v: torch.func.linearize(lambda q: f(q, k, v), q)[1](q),
    "jvp of vmap": lambda f, q, k, v: jvp(lambda q: vmap(lambda x: f(q * x, k, v))(q[0, 0, 0]), (q,), (q,)),
    "jvp of grad": lambda f, q, k, v: jvp(lambda q: grad(loss(f))(q, k, v), (q,), (q,)),
    "jvp of what is pulled": lambda f, q, k, v: jvp(vjp(lambda k: f(q, k, v), k)[1], (f(q, k, v),), (f(q, k, v),)),
}


@pytest.mark.parametrize("case", ["plain", "other width"])
@pytest.mark.parametrize("mode", FORWARD_MODE)
def test_forward_mode(mode, case):
    """Forward mode raises in flash_attention, and is left to PyTorch in SDPA."""
    tensors = operands(case)[0]
    with pytest.raises(NotImplementedError, match="flash_attention has no forward-mode differentiation"):
        FORWARD_MODE[mode](flash, *tensors)
    theirs = outcome(FORWARD_MODE[mode], sdpa, *tensors)
    ours, stats = calls(outcome, FORWARD_MODE[mode], sdpa, *tensors)
    if isinstance(theirs[0], type):
        assert ours == theirs
    else:
        torch.testing.assert_close(ours, theirs, **CLOSE)
    assert "forward-mode differentiation" in stats


# --- what is left to PyTorch, modes, the other entries ---------------------------------------------


LEFT = {
    "dropout, the same": lambda q, k, v, m: vmap(lambda q: sdpa(q, k[0], v[0], dropout_p=0.5), randomness="same")(q),
    "dropout, not allowed": lambda q, k, v, m: vmap(lambda q: sdpa(q, k[0], v[0], dropout_p=0.5))(q),
    "dropout of none": lambda q, k, v, m: vmap(lambda x: sdpa(q, k, v, dropout_p=0.5) + x, randomness="same")(m),
    "scale": lambda q, k, v, m: vmap(lambda q: sdpa(q, k[0], v[0], scale=0.0))(q),
    "dtypes": lambda q, k, v, m: vmap(sdpa)(q, k.bfloat16(), v),
    "heads": lambda q, k, v, m: vmap(sdpa)(q, k[:, :3], v[:, :3]),
    "one dimension": lambda q, k, v, m: vmap(sdpa)(q[:, 0, 0], k, v),
    "mask of one dimension": lambda q, k, v, m: vmap(sdpa)(q, k, v, m[:, 0]),
    "mask of many dimensions": lambda q, k, v, m: vmap(sdpa)(q[:, 0], k[:, 0], v[:, 0], q[:, :1, None, :, :1]),
    "unfused": lambda q, k, v, m: vmap(unfused)(q, k, v),
    "grad, unfused": lambda q, k, v, m: grad(loss(unfused))(q, k, v),
}


@pytest.mark.parametrize("case", LEFT)
def test_left_to_pytorch(case):
    """Calls left to PyTorch give its bits and its errors, and are counted once."""
    tensors = [torch.randn(2, 4, 5, 3) for _ in range(3)] + [torch.randn(2, 5, 5)]

    def seeded():
        torch.manual_seed(1)
        return outcome(LEFT[case], *tensors)

    theirs = seeded()
    ours, stats = calls(seeded)
    assert ours == theirs if isinstance(theirs, tuple) else torch.equal(ours, theirs)
    assert sum(stats.values()) == 1 and "replaced" not in stats


@pytest.mark.cpu("on MPS there are no thresholds")
def test_threshold_is_of_all_samples(monkeypatch):
    tensors, work = stacked(operands("plain", torch.float32)[0]), 2 * 2 * 4 * 5 * 5 * 6
    for transformed in (vmap(sdpa), vmap(grad(loss(sdpa))), grad(loss(vmap(sdpa))), vmap(vmap(sdpa))):
        monkeypatch.setitem(sdpa_thresholds, torch.float32, work)
        assert calls(transformed, *tensors)[1] == {"replaced": 1}
        monkeypatch.setitem(sdpa_thresholds, torch.float32, work + 1)
        assert calls(transformed, *tensors)[1] == {"small": 1}


def test_taken_back():
    """PyTorch's own rule for vmap returns."""
    tensors = stacked(operands("plain", torch.float32)[0])
    expected = vmap(sdpa)(*tensors)
    for _ in range(2):
        assert calls(vmap(sdpa), *tensors)[1] == {"replaced": 1}
        assert torch.equal(vmap(sdpa)(*tensors), expected)


@pytest.mark.parametrize("function", [flash, sdpa])
def test_tensors_of_a_transform_that_is_over(function):
    """They hold the values of the tensors that they wrap."""
    (query, key, value), _ = operands("plain")
    leaves, kept = [tensor.requires_grad_() for tensor in (query, key, value)], []
    grad(lambda tensor: kept.append(tensor) or tensor.sum())(query)
    with replaced_sdpa():
        outs = [function(first, key, value) for first in (query, kept[0])]
    assert torch.equal(*outs)
    gradients = [torch.autograd.grad(out.sum(), leaves) for out in outs]
    assert all(map(torch.equal, *gradients))


def test_under_a_mode():
    tensors, _ = operands("plain")
    with Seen() as mode:
        calls(vmap(grad(loss(sdpa))), *stacked(tensors))
    assert mode.attention() == ["mfa::attention_forward", "mfa::attention_backward"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("function", [flash, sdpa])
def test_autocast(function, dtype):
    tensors, _ = operands("plain", torch.float32)
    with replaced_sdpa(), torch.autocast("cpu", dtype=dtype):
        out = vmap(function)(*stacked(tensors))
        gradient = grad(lambda query: function(query, *tensors[1:]).float().sum())(tensors[0])
    assert out.dtype == dtype and gradient.dtype == torch.float32


@pytest.mark.parametrize("function", [flash, sdpa])
@pytest.mark.parametrize("name", ["grad", "vmap", "vmap of grad"])
def test_compiled(function, name):
    """Our operators are in the graph."""
    torch._dynamo.reset()
    tensors, graphs = operands("causal", torch.float32)[0], []

    def backend(graph, _):
        graphs.extend(str(node.target) for node in graph.graph.nodes if "attention" in str(node.target))
        return graph.forward

    def transformed(*tensors):
        return TRANSFORMS[name](functools.partial(function, is_causal=True), tensors)

    with replaced_sdpa():
        found = torch.compile(transformed, backend=aot_autograd(fw_compiler=backend), fullgraph=True)(*tensors)
        torch.testing.assert_close(found, transformed(*tensors))
    assert graphs[0] == "mfa.attention_forward.default"
    assert graphs[1:] == (["mfa.attention_backward.default"] if "grad" in name else [])


def operator(query, key, value):
    return torch.ops.mfa.attention_forward(*Inputs(query, key, value), *Options())[0]


def of_comfyui(query, key, value):
    return comfyui_attention(None, query, key, value, 4, skip_reshape=True, skip_output_reshape=True)


def of_transformers(query, key, value):
    return transformers_attention(None, query, key, value, None, is_causal=False)[0].transpose(1, 2)


@pytest.mark.parametrize("entry", [operator, of_comfyui, of_transformers])
@pytest.mark.parametrize("transform", ["grad", "vmap", "vmap of grad", "grad of vmap", "jacrev"])
def test_other_entry_points(passes, entry, transform):
    tensors, _ = operands("plain")
    expected = TRANSFORMS[transform](unfused, [t.double() for t in tensors])
    torch.testing.assert_close(TRANSFORMS[transform](entry, tensors), expected, **CLOSE)
    assert passes
    with Seen() as mode:
        TRANSFORMS[transform](entry, tensors)
    assert set(mode.attention()) <= {"mfa::attention_forward", "mfa::attention_backward"}


def test_a_pytorch_whose_transforms_we_do_not_know(monkeypatch):
    monkeypatch.setattr(transforms, "are_supported", False)
    tensors, _ = operands("plain")
    with pytest.raises(NotImplementedError, match=r"cannot differentiate flash_attention under torch\.func"):
        grad(loss(flash))(*tensors)
    expected = grad(loss(sdpa))(*tensors)
    found, stats = calls(grad(loss(sdpa)), *tensors)
    assert torch.equal(found, expected) and stats == {"a functorch transform": 1}


def by_operator(query, key, value):
    results = torch.ops.mfa.attention_forward(*Inputs(query, key, value), *Options())
    return results[0]


@pytest.mark.parametrize("function", [flash, by_operator, sdpa], ids=lambda each: each.__name__)
def test_levels_above_a_transform(function):
    """What an inner transform gives still depends on the level outside of it, which may be plain autograd."""
    (query, key, value), _ = operands("plain")
    weight = torch.tensor(1.5, dtype=DTYPE)

    def inner(function, query):
        return torch.func.grad_and_value(lambda w: function(query * w, key, value).square().sum())(weight)[1]

    def pulled(function, query):
        return vjp(lambda key: function(query, key, value), key)[0].square().sum()

    for level in (inner, pulled):
        wanted = grad(functools.partial(level, unfused))(query)
        torch.testing.assert_close(grad(functools.partial(level, function))(query), wanted, **CLOSE)
        leaf = query.clone().requires_grad_()
        torch.testing.assert_close(torch.autograd.grad(level(function, leaf), leaf)[0], wanted, **CLOSE)
