"""replace_sdpa: replaced calls are right, other calls give PyTorch's own bits, and it can be undone."""

import contextlib
import functools
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as imported_early

from calls import calls, problem
from mps_flash_attn import dispatch_cache, replace_sdpa, replaced_sdpa, restore_sdpa, sdpa_stats, sdpa_thresholds
from mps_flash_attn.library import Unsupported
from mps_flash_attn.reference import agree
from mps_flash_attn.sdpa import dispatch, replace, run
from mps_flash_attn.stats import _outcomes
from mps_flash_attn.tensors import is_plain
from stand_in import DTYPES, FLOAT64, TIMEOUT

pytestmark = pytest.mark.usefixtures("everything", "one_thread")


@pytest.fixture(params=["at first", "again"], autouse=True)
def _first_or_cached(request, monkeypatch):
    """Runs each test also with calls that come for the third time, which have an entry in the dispatch cache."""
    dispatch_cache.clear()
    if request.param == "at first":
        return
    attention = dispatch.attention

    def thrice(*arguments, **options):
        tensors = [one for one in arguments if isinstance(one, torch.Tensor)]
        if all(map(is_plain, tensors)) and not torch._C._len_torch_dispatch_stack():
            before = _outcomes.copy()
            with torch.random.fork_rng():
                attention(*arguments, **options)
                attention(*arguments, **options)
            _outcomes.clear()
            _outcomes.update(before)
        return attention(*arguments, **options)

    for key in ("CPU", "AutogradCPU", "MPS", "AutogradMPS"):
        monkeypatch.setitem(replace._KERNELS, (replace._NAME, key), thrice)


# For what runs in another process, which has its own cache.
once = pytest.mark.parametrize("_first_or_cached", ["at first"], indirect=True)


# --- on and off ----------------------------------------------------------------------------------


def taken():
    sdpa_stats(reset=True)
    imported_early(*problem(1, 1, 4, 8))
    return sdpa_stats() == {"replaced": 1}


def test_handle():
    assert not taken()
    handle = replace_sdpa()
    assert taken()
    handle.remove()
    assert not taken()
    handle.remove()
    assert not taken()


@pytest.mark.parametrize("block", [replaced_sdpa, replace_sdpa])
def test_with_block(block):
    with pytest.raises(KeyError), block():
        assert taken()
        raise KeyError
    assert not taken()


def test_decorator():
    @replaced_sdpa()
    def function():
        return taken()

    assert function() and function() and not taken()


@once
def test_silent():
    """Calls print nothing and warn of nothing, whether they are replaced or not."""
    code = (
        "import warnings, torch; warnings.simplefilter('error')\n"
        "from mps_flash_attn import replace_sdpa, sdpa_stats, sdpa_thresholds\n"
        "import torch.nn.functional as F\n"
        "sdpa_thresholds[torch.float32] = 0\n"
        "replace_sdpa(); handle = replace_sdpa()\n"
        "q = torch.randn(1, 2, 4, 8); F.scaled_dot_product_attention(q, q, q)\n"
        "F.scaled_dot_product_attention(q, q, q, scale=-1.0); handle.remove()\n"
        "assert sdpa_stats() == {'replaced': 1, 'scale is not a positive number': 1}"
    )
    path = os.pathsep.join([str(Path(dispatch.__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("key", ["CPU", "AutogradCPU", "MPS", "AutogradMPS"])
def test_keys(key):
    """SDPA is overridden for devices that have a backend, or will have one, and for no others."""
    operator = "aten::scaled_dot_product_attention"
    assert not torch._C._dispatch_has_kernel_for_dispatch_key(operator, key)
    with replaced_sdpa():
        assert torch._C._dispatch_has_kernel_for_dispatch_key(operator, key)
    assert not torch._C._dispatch_has_kernel_for_dispatch_key(operator, key)


def test_device_without_a_backend():
    """Calls on a device without a backend are left to PyTorch, and counted."""
    tensors = [t.to("meta") for t in problem()]
    sdpa_stats(reset=True)
    with replaced_sdpa():
        out = dispatch.attention(*tensors)
    assert out.device.type == "meta" and sdpa_stats() == {"no backend for meta": 1}


def test_nested():
    with replace_sdpa():
        with replace_sdpa():
            assert taken()
        assert taken()
    assert not taken()
    outer, inner = replace_sdpa(), replace_sdpa()
    outer.remove()
    assert taken()
    inner.remove()
    assert not taken()


def test_restore_takes_all_back():
    handle = replace_sdpa()
    replace_sdpa()
    restore_sdpa()
    assert not taken()
    restore_sdpa()
    with replace_sdpa():
        handle.remove()
        assert taken()


def test_from_many_threads():
    """Calls are right while another thread replaces and restores the operators."""
    tensors = problem(2, 2, 40, 16)
    layer, x = torch.nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval(), torch.randn(2, 20, 32)
    ended, wrong = threading.Event(), []

    @torch.no_grad()
    def call(function, *arguments):
        expected = function(*arguments)
        while not ended.is_set():
            try:
                if not torch.allclose(function(*arguments), expected, atol=1e-4):
                    wrong.append("the result")
            except Exception as error:
                wrong.append(error)

    def exchange():
        for _ in range(300):
            replace_sdpa().remove()

    callers = [threading.Thread(target=call, args=args) for args in ((imported_early, *tensors), *[(layer, x)] * 3)]
    exchangers = [threading.Thread(target=exchange) for _ in range(2)]
    for thread in callers + exchangers:
        thread.start()
    for thread in exchangers:
        thread.join()
    ended.set()
    for thread in callers:
        thread.join()
    assert not wrong and not taken()


@once
def test_counted_by_the_garbage_collector():
    """An object's end, which may call attention, can come in the midst of anything, counting too."""
    code = """if True:
        import gc, signal, torch
        from mps_flash_attn import replace_sdpa, sdpa_stats

        q = torch.randn(1, 1, 2, 8)

        class Last:
            def __init__(self):
                self.cycle = self

            def __del__(self):
                torch.nn.functional.scaled_dot_product_attention(q, q, q)

        signal.alarm(30)
        replace_sdpa()
        for allocations in range(1, 30):
            gc.set_threshold(allocations)
            for _ in range(5):
                Last()
                sdpa_stats()
    """
    path = os.pathsep.join([str(Path(dispatch.__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path}, timeout=TIMEOUT, check=True)


# --- what is taken over --------------------------------------------------------------------------


OPTIONS = [{}, {"is_causal": True}, {"scale": 0.3}, {"scale": 2, "is_causal": True}, {"scale": torch.tensor(0.7)}]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_option(options, dtype):
    check(problem(dtype=dtype), **options)


def check(tensors, mask=None, **options):
    """Asserts that a replaced call gives PyTorch's layout, and its result and gradients within the tolerance rule."""
    tensors = [t.detach().requires_grad_() for t in tensors]
    if mask is not None:
        tensors.append(mask.detach().requires_grad_(mask.requires_grad))
    wanted = [t for t in tensors if t.requires_grad]
    theirs = F.scaled_dot_product_attention(*tensors, **options)
    ours, stats = calls(F.scaled_dot_product_attention, *tensors, **options)
    assert stats == {"replaced": 1}
    assert ours.stride() == theirs.stride()
    exact = [t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t for t in tensors]
    with sdpa_kernel(SDPBackend.MATH):
        truth = F.scaled_dot_product_attention(*exact, **options)
    query, key, *_ = tensors
    terms = 8 * max(query.shape[-2], key.shape[-2], query.shape[-1])
    agree("out", ours, theirs, truth, query.dtype, terms)
    d_out = torch.randn_like(theirs)
    ours, theirs = (torch.autograd.grad(out, wanted, d_out) for out in (ours, theirs))
    truth = torch.autograd.grad(truth, [t for t in exact if t.requires_grad], d_out.double())
    for place, found in enumerate(zip(ours, theirs, truth, strict=True)):
        agree(f"gradient {place}", *found, query.dtype, terms)


@pytest.mark.parametrize("shape", [(33, 38), (1, 38), (33, 1), (4, 33, 38), (2, 1, 33, 38), (2, 4, 1, 38), (1,) * 4])
@pytest.mark.parametrize("kind", ["bool", "float", "trained"])
def test_mask(shape, kind):
    mask = torch.rand(shape) < 0.7 if kind == "bool" else torch.randn(shape).requires_grad_(kind == "trained")
    check(problem(), mask)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float_mask_of_lower_precision_tensors(dtype):
    check(problem(dtype=dtype), torch.randn(33, 38))
    check(problem(dtype=dtype), torch.randn(33, 38).to(dtype))


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_rows_that_see_nothing(kind):
    """Rows without visible keys give exactly 0, with gradients of exactly 0, whatever masks the keys."""
    tensors = [t.requires_grad_() for t in problem()]
    mask = torch.rand(2, 1, 33, 38) < 0.5
    mask[:, :, 3:9] = False
    if kind == "float":
        mask = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf).requires_grad_()
    check(tensors, mask)
    out, _ = calls(F.scaled_dot_product_attention, *tensors, mask)
    assert not out[:, :, 3:9].any()
    d_query, d_key, *_ = torch.autograd.grad(out.square().sum(), tensors)
    assert not d_query[:, :, 3:9].any() and d_key.isfinite().all()


SHAPES = {  # of query, key, value, mask
    "two dimensions": ((20, 16), (25, 16), (25, 16), (20, 25)),
    "three dimensions": ((3, 20, 16), (3, 25, 16), (3, 25, 16), (3, 20, 25)),
    "five dimensions": ((2, 3, 4, 20, 16), (2, 3, 4, 25, 16), (2, 3, 4, 25, 16), (3, 1, 20, 1)),
    "six dimensions": ((2, 1, 3, 2, 9, 8), (2, 1, 3, 2, 7, 8), (2, 1, 3, 2, 7, 8), (1, 3, 2, 1, 7)),
    "other width": ((2, 4, 20, 16), (2, 4, 25, 16), (2, 4, 25, 10), (4, 1, 25)),
    "one batch of keys": ((2, 4, 20, 16), (1, 4, 25, 16), (1, 4, 25, 16), (2, 1, 20, 25)),
    "one batch of queries": ((1, 4, 20, 16), (2, 4, 25, 16), (2, 4, 25, 16), (2, 4, 20, 25)),
    "one head of keys": ((2, 4, 20, 16), (2, 1, 25, 16), (2, 1, 25, 16), (20, 25)),
    "one head of values": ((2, 4, 20, 16), (2, 4, 25, 16), (2, 1, 25, 16), (20, 25)),
    "more ranks": ((20, 16), (2, 4, 25, 16), (4, 25, 16), (2, 4, 20, 25)),
    "values of more ranks": ((4, 20, 16), (25, 16), (3, 4, 25, 16), (4, 20, 25)),
    "all broadcast": ((2, 1, 3, 20, 16), (1, 4, 1, 25, 16), (25, 5), (2, 1, 1, 20, 25)),
}


@pytest.mark.parametrize("mask", ["none", "causal", "bool", "float"])
@pytest.mark.parametrize("case", SHAPES)
def test_shapes(case, mask):
    *shapes, mask_shape = SHAPES[case]
    tensors = [torch.randn(shape) for shape in shapes]
    masks = {"bool": torch.rand(mask_shape) < 0.7, "float": torch.randn(mask_shape, requires_grad=True)}
    check(tensors, masks.get(mask), is_causal=mask == "causal")


GROUPS = {  # heads of query, key, value
    "both": (6, 2, 2),
    "one": (6, 1, 1),
    "key only": (6, 2, 6),
    "different": (12, 4, 6),
    "not multiples": (12, 4, 3),
}


@pytest.mark.parametrize("lead", [(), (2,), (2, 3)], ids=str)
@pytest.mark.parametrize("case", GROUPS)
def test_grouped_heads(case, lead):
    heads = GROUPS[case]
    sizes = [(*lead, heads[0], 20, 16), (*lead, heads[1], 25, 16), (*lead[1:], heads[2], 25, 10)]
    check([torch.randn(size) for size in sizes], enable_gqa=True)
    check([torch.randn(size) for size in sizes], torch.rand(heads[0], 20, 25) < 0.7, enable_gqa=True)


LAYOUTS = {
    "plain": lambda t: t,
    "transposed": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "heads outermost": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "columns first": lambda t: t.mT.contiguous().mT,
    "sliced": lambda t: F.pad(t, (1, 2, 3, 4))[..., 3:-4, 1:-2],
    "every second": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "batch expanded": lambda t: t[:1].expand_as(t),
    "packed": lambda t: torch.stack([t, t], -2).transpose(1, 2).contiguous().transpose(1, 2)[..., 1, :],
}


@pytest.mark.parametrize("others", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, others):
    """The memory of the result is ordered as that of PyTorch's own."""
    query, key, value = problem()
    batch = LAYOUTS[layout](query), LAYOUTS[others](key), LAYOUTS[others](value)
    for tensors in (batch, [t[1] for t in batch]):
        check(tensors, is_causal=True)
        check(tensors, torch.randn(33, 38, requires_grad=True))


def test_other_length_of_values_is_refused():
    """PyTorch's unfused path refuses it; its fused one would read beyond the end."""
    query, key, value = problem()
    with sdpa_kernel(SDPBackend.MATH), pytest.raises(RuntimeError) as original:
        F.scaled_dot_product_attention(query, key, value[:, :, :-1])
    with replaced_sdpa(), pytest.raises(RuntimeError) as replaced:
        F.scaled_dot_product_attention(query, key, value[:, :, :-1])
    assert str(replaced.value) == str(original.value)


def test_grad_modes():
    tensors = [t.requires_grad_() for t in problem()]
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            out, stats = calls(F.scaled_dot_product_attention, *tensors)
        assert stats == {"replaced": 1} and (out.grad_fn is not None) == (mode is torch.enable_grad)


def test_autocast():
    tensors = problem()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, stats = calls(F.scaled_dot_product_attention, *tensors)
    assert stats == {"replaced": 1} and out.dtype == torch.bfloat16


def test_script_and_trace():
    def function(query, key, value):
        return F.scaled_dot_product_attention(query, key, value)

    tensors = problem()
    traced = torch.jit.trace(function, tensors)
    out, stats = calls(traced, *tensors)
    assert stats == {"replaced": 1} and torch.allclose(out, function(*tensors), atol=1e-5)


# --- what is left to PyTorch ---------------------------------------------------------------------


NEGATED, SCALE = "a negation still to be carried out", "scale is not a positive number"
UNALIGNED = "memory that is not aligned to its elements"


class Wrapped(torch.Tensor):
    pass


LEFT = {
    "subclass": (lambda q, k, v: F.scaled_dot_product_attention(q.as_subclass(Wrapped), k, v), "a tensor subclass"),
    "negated": (lambda q, k, v: F.scaled_dot_product_attention(torch._neg_view(q), k, v), NEGATED),
    "no queries": (lambda q, k, v: F.scaled_dot_product_attention(q[:, :, :0], k, v), "empty tensors"),
    "no keys": (lambda q, k, v: F.scaled_dot_product_attention(q, k[:, :, :0], v[:, :, :0]), "empty tensors"),
    "no columns": (lambda q, k, v: F.scaled_dot_product_attention(q[..., :0], k[..., :0], v), "empty tensors"),
    "unaligned": (lambda q, k, v: F.scaled_dot_product_attention(unaligned(q), k, v), UNALIGNED),
    "wide": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v.repeat(1, 1, 1, 30)), "head_dim above 512"),
    "scale zero": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=0.0), SCALE),
    "scale negative": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=-1.0, is_causal=True), SCALE),
    "scale infinite": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=float("inf")), SCALE),
    "scale NaN": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=float("nan")), SCALE),
    "jvp": (lambda q, k, v: torch.func.jvp(lambda x: imported_math(x, k, v), (q,), (q,))[1], None),
}


def imported_math(*tensors):
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(*tensors)


def unaligned(tensor):
    """A tensor at an unaligned address, as in a file that is mapped into memory."""
    memory = torch.frombuffer(bytearray(tensor.nbytes + 1), dtype=tensor.dtype, offset=1)
    return memory.view(tensor.shape).copy_(tensor)


ON_CPU = pytest.mark.cpu("the storage of a tensor of mps is aligned")


@pytest.mark.parametrize("case", [pytest.param(n, marks=ON_CPU) if n == "unaligned" else n for n in LEFT])
def test_left_to_pytorch(case):
    """Calls left to PyTorch give its bits, and are counted under their reason."""
    function, reason = LEFT[case]
    tensors = problem()
    torch.manual_seed(1)
    expected = function(*tensors)
    torch.manual_seed(1)
    out, stats = calls(function, *tensors)
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)
    assert type(out) is type(expected)
    assert "replaced" not in stats
    if reason:
        assert stats == {reason: 1}


@pytest.mark.parametrize("backends", [[SDPBackend.FLASH_ATTENTION], [SDPBackend.EFFICIENT_ATTENTION]], ids=str)
@pytest.mark.filterwarnings("ignore")  # PyTorch says why it has no backend
def test_no_viable_backend(backends):
    """A call that no PyTorch backend supports stays an error, though libmfa could run it."""
    query, key, value = problem(value_dim=10)
    for replacement in (contextlib.nullcontext, replaced_sdpa):
        with replacement(), sdpa_kernel(backends), pytest.raises(RuntimeError, match=r"No viable backend|No available"):
            F.scaled_dot_product_attention(query, key, value)


SECOND = {  # where PyTorch takes its fused kernel there is no second derivative, elsewhere there is
    "fused": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
    "other width": lambda q, k, v: F.scaled_dot_product_attention(q, k, v[..., :2]),
    "mask": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, q[..., :1] * 2),
    "one tensor": lambda q, k, v: F.scaled_dot_product_attention(q, q, q[..., :2]),
    "broadcast": lambda q, k, v: F.scaled_dot_product_attention(q, k[0], v),
    "three dimensions, mask": lambda q, k, v: F.scaled_dot_product_attention(q[0], k[0], v[0], q[0, 0, :, :1] * 2),
}


@pytest.mark.parametrize("case", SECOND)
def test_second_derivative_is_as_without(case):
    tensors = [t.double().requires_grad_() for t in problem(1, 2, 3, 4)]
    check = functools.partial(torch.autograd.gradgradcheck, SECOND[case], tensors, fast_mode=True)
    theirs = outcome(check)
    assert theirs is True or case == "fused"
    with replaced_sdpa():
        assert outcome(check) == theirs
        assert torch.autograd.gradcheck(SECOND[case], tensors, check_batched_grad=True, fast_mode=True)


def outcome(function, *arguments):
    try:
        return function(*arguments)
    except Exception as error:
        return type(error), str(error)


@pytest.mark.parametrize("same", [False, True])
def test_gradients_fall_back(monkeypatch, same):
    """If only the forward pass can run on libmfa, the gradients are PyTorch's own, and are counted."""
    query, key, value = problem()
    mask = torch.randn(33, 38)
    leaves = [t.requires_grad_() for t in ((query,) * 3 if same else (query, key, value, mask))]

    def gradients():
        out = F.scaled_dot_product_attention(*leaves, is_causal=same)
        return torch.autograd.grad(out.sin().sum(), leaves[:1] if same else leaves)

    def refuse(*_):
        raise Unsupported("no such kernel")

    expected = gradients()
    monkeypatch.setattr("mps_flash_attn.run.backward", refuse)
    found, stats = calls(gradients)
    assert stats == {"replaced": 1, "no such kernel": 1}
    torch.testing.assert_close(found, expected)


@FLOAT64
@pytest.mark.parametrize("masked", ["no", "bool", "float"])
def test_gradient_penalty(masked):
    """Training with a gradient penalty works wherever it does in PyTorch."""
    tensors = [t.double().requires_grad_() for t in problem(1, 2, 5, 4, value_dim=3)]
    mask = {"no": None, "bool": torch.rand(5, 10) < 0.7, "float": torch.randn(5, 10).double()}[masked]

    def penalty():
        out = F.scaled_dot_product_attention(*tensors, mask)
        gradients = torch.autograd.grad(out.sum(), tensors, create_graph=True)
        return gradients + torch.autograd.grad(sum(g.square().sum() for g in gradients), tensors)

    expected = penalty()
    found, stats = calls(penalty)
    torch.testing.assert_close(found, expected)
    assert stats == {"replaced": 1, "a second derivative": 1}


def test_second_derivative_under_hooks():
    """Hooks for saved tensors, which PyTorch's torch.func does not support."""
    tensors = [t.requires_grad_() for t in problem(1, 2, 5, 4, value_dim=3)]

    def second():
        with torch.autograd.graph.save_on_cpu():
            out = F.scaled_dot_product_attention(*tensors)
            gradients = torch.autograd.grad(out.sin().sum(), tensors, create_graph=True)
            return torch.autograd.grad(sum(g.square().sum() for g in gradients), tensors)

    torch.testing.assert_close(calls(second)[0], second(), rtol=1e-4, atol=1e-4)


WRONG = {
    "head_dim": lambda q, k, v: F.scaled_dot_product_attention(q, k[..., :-1], v),
    "heads": lambda q, k, v: F.scaled_dot_product_attention(q, k[:, :3], v[:, :3]),
    "groups": lambda q, k, v: F.scaled_dot_product_attention(q, k[:, :3], v[:, :3], enable_gqa=True),
    "dtypes": lambda q, k, v: F.scaled_dot_product_attention(q, k.double(), v),
    "mask shape": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, torch.randn(33, 37)),
    "mask dtype": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, torch.ones(33, 38, dtype=torch.int32)),
    "mask dimensions": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, torch.randn(38)),
    "dropout": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=1.5),
    "dropout below 0": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=-0.3),
    "one dimension": lambda q, k, v: F.scaled_dot_product_attention(q[0, 0, 0], k[0, 0, 0], v[0, 0, 0]),
    "no tensor": lambda q, k, v: F.scaled_dot_product_attention(q, k, "value"),
}


@pytest.mark.parametrize("case", WRONG)
def test_errors_are_those_of_pytorch(case):
    tensors = problem()
    with pytest.raises(Exception) as original:
        WRONG[case](*tensors)
    with replace_sdpa(), pytest.raises(original.type) as replaced:
        WRONG[case](*tensors)
    assert str(replaced.value) == str(original.value)


def test_mask_with_is_causal_is_what_this_pytorch_makes_of_it():
    tensors, mask = problem(), torch.rand(33, 38) < 0.7
    try:
        expected = F.scaled_dot_product_attention(*tensors, mask, is_causal=True)
    except RuntimeError as error:
        with replace_sdpa(), pytest.raises(RuntimeError) as replaced:
            F.scaled_dot_product_attention(*tensors, mask, is_causal=True)
        assert str(replaced.value) == str(error)
    else:
        out, stats = calls(F.scaled_dot_product_attention, *tensors, mask, is_causal=True)
        assert torch.equal(out, expected) and stats == {"attn_mask together with is_causal": 1}


def test_only_unsupported_falls_back(monkeypatch):
    tensors = problem()
    expected = F.scaled_dot_product_attention(*tensors)

    def refuse(error):
        def raise_error(*_):
            raise error

        monkeypatch.setattr(run, "run_eager", raise_error)

    refuse(Unsupported("no backend has this"))
    out, stats = calls(F.scaled_dot_product_attention, *tensors)
    assert torch.equal(out, expected) and stats == {"no backend has this": 1}
    refuse(MemoryError("workspace"))
    with pytest.raises(MemoryError):
        calls(F.scaled_dot_product_attention, *tensors)


def test_threshold(monkeypatch):
    tensors = problem()  # 2 * 4 * 33 * 38 * (24 + 24) multiply-adds
    monkeypatch.setitem(sdpa_thresholds, torch.float32, 2 * 4 * 33 * 38 * 48 + 1)
    assert calls(F.scaled_dot_product_attention, *tensors)[1] == {"small": 1}
    monkeypatch.setitem(sdpa_thresholds, torch.float32, 2 * 4 * 33 * 38 * 48)
    assert calls(F.scaled_dot_product_attention, *tensors)[1] == {"replaced": 1}
    monkeypatch.setitem(sdpa_thresholds, torch.float64, float("inf"))
    assert calls(F.scaled_dot_product_attention, *(t.double() for t in tensors))[1] == {"small": 1}
