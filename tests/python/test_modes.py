"""Attention under dispatch modes (profilers, flop counters, selective checkpointing, fake tensors, tracers): they see
torch.ops.mfa, forward and backward, and our kernels run."""

import contextlib
import functools

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from calls import Seen, calls, problem
from mps_flash_attn import flash_attention, replaced_sdpa, run, sdpa_stats
from mps_flash_attn.options import Options
from mps_flash_attn.problem import Inputs
from stand_in import FLOAT64

pytestmark = pytest.mark.usefixtures("everything", "one_thread")
FORWARD, BACKWARD = "mfa::attention_forward", "mfa::attention_backward"
SDPA = "aten::scaled_dot_product_attention"

CALLS = {
    "plain": lambda q, k, v: F.scaled_dot_product_attention(q, k, v),
    "causal": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
    "mask": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, q[..., :1] * 2),
    "transposed": lambda q, k, v: F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v[:, :, :33]))),
    "other width": lambda q, k, v: F.scaled_dot_product_attention(q, k, v[..., :7]),
    "three dimensions": lambda q, k, v: F.scaled_dot_product_attention(q[0], k[0], v[0]),
    "broadcast": lambda q, k, v: F.scaled_dot_product_attention(q, k[:1], v[:1]),
    "grouped": lambda q, k, v: F.scaled_dot_product_attention(q, k[:, :2], v[:, :2], enable_gqa=True),
}


def leaves(dtype=torch.float32, call=""):
    kv_len = 33 if call == "transposed" else None
    return [t.to(dtype).requires_grad_() for t in problem(2, 4, 33, 24, kv_len=kv_len)]


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("call", CALLS)
def test_mode_sees_our_operators(call, again):
    """A mode in the forward pass, the backward pass or both changes neither results nor their layout."""
    tensors, nothing = leaves(call=call), contextlib.nullcontext
    with replaced_sdpa():
        for _ in range(3 if again else 0):
            CALLS[call](*tensors)
        expected = CALLS[call](*tensors)
        d_out = torch.randn_like(expected)
        wanted = torch.autograd.grad(expected, tensors, d_out)
        sdpa_stats(reset=True)
        for in_forward, in_backward in ((Seen, nothing), (nothing, Seen), (Seen, Seen)):
            with in_forward() as forward:
                out = CALLS[call](*tensors)
            with in_backward() as backward:
                found = torch.autograd.grad(out, tensors, d_out)
            assert forward is None or forward.attention() == [FORWARD]
            assert backward is None or backward.attention() == [BACKWARD]
            assert torch.equal(out, expected) and out.stride() == expected.stride()
            assert all(map(torch.equal, found, wanted))
        assert sdpa_stats() == {"replaced": 3}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_mode_without_gradients(mode):
    """Under inference_mode, modes see PyTorch's own operator, whichever kernel runs."""
    tensors = leaves()
    with mode(), Seen() as outer, Seen() as inner:
        out, stats = calls(F.scaled_dot_product_attention, *tensors)
    assert outer.attention() == inner.attention() == [SDPA if mode is torch.inference_mode else FORWARD]
    assert stats == {"replaced": 1}
    assert torch.equal(out, flash_attention(*tensors))


class Decomposing(TorchDispatchMode):
    """Runs the decomposition of an operator that has one."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        with self:
            result = function.decompose(*args, **(kwargs or {}))
        return function(*args, **(kwargs or {})) if result is NotImplemented else result


def test_mode_that_decomposes():
    """Our operator has no decomposition. Under inference_mode the mode sees PyTorch's operator first, and runs it."""
    tensors = leaves()
    expected = F.scaled_dot_product_attention(*tensors)
    with Decomposing():
        out, stats = calls(F.scaled_dot_product_attention, *tensors)
    assert stats == {"replaced": 1} and torch.equal(out, flash_attention(*tensors))
    with torch.inference_mode(), Decomposing():
        out, stats = calls(F.scaled_dot_product_attention, *tensors)
    assert stats == {} and torch.equal(out, expected)


@pytest.mark.filterwarnings("ignore")  # PyTorch says why it has no backend
def test_mode_where_pytorch_has_no_backend():
    query, key, value = problem(value_dim=10)
    no_backend = pytest.raises(RuntimeError, match=r"No viable backend|No available")
    with replaced_sdpa(), Seen(), sdpa_kernel(SDPBackend.FLASH_ATTENTION), no_backend:
        F.scaled_dot_product_attention(query, key, value)


@pytest.mark.parametrize("call", ["plain", "other width", "broadcast"])
def test_flops(call):
    """Forward has the operations that PyTorch counts for its unfused path; backward has five products instead of
    two."""
    tensors = leaves()
    with FlopCounterMode(display=False) as expected, sdpa_kernel(SDPBackend.MATH):
        CALLS[call](*tensors)
    with replaced_sdpa(), FlopCounterMode(display=False) as forward:
        out = CALLS[call](*tensors)
    assert forward.get_total_flops() == expected.get_total_flops() > 0
    with FlopCounterMode(display=False) as backward:
        torch.autograd.grad(out.sum(), tensors)
    query, key, value = tensors[0].shape, tensors[1].shape, (*tensors[2].shape[:3], out.shape[3])
    rows = 2 * 2 * 4 * query[2] * key[2]
    assert backward.get_total_flops() == rows * (3 * query[3] + 2 * value[3])


# --- selective checkpointing ---------------------------------------------------------------------


@pytest.fixture
def forwards(monkeypatch):
    """A list that grows with each forward pass of our kernels."""
    found, run_forward = [], run.run_forward

    def counted(*arguments):
        found.append(arguments)
        return run_forward(*arguments)

    monkeypatch.setattr(run, "run_forward", counted)
    return found


SAVED = {  # operators whose results are kept: how often attention is then computed
    "ours": ([torch.ops.mfa.attention_forward.default], 1),
    "PyTorch's": ([torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default], 2),
    "none": ([], 2),
}


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("function", [flash_attention, F.scaled_dot_product_attention])
@pytest.mark.parametrize("saved", SAVED)
def test_selective_checkpointing(forwards, function, saved, again):
    """Results that the policy saves are not recomputed, and the gradients are those of a run without checkpoints."""
    operators, times = SAVED[saved]
    x = torch.randn(2, 4, 33, 24, requires_grad=True)

    def block(x):
        return function(x.sin(), x * 2, x.cos()).tanh()

    with replaced_sdpa():
        for _ in range(3 if again else 1):
            (expected,) = torch.autograd.grad(block(x).sum(), x)
        forwards.clear()
        context = functools.partial(create_selective_checkpoint_contexts, operators)
        out = checkpoint(block, x, use_reentrant=False, context_fn=context)
        (found,) = torch.autograd.grad(out.sum(), x)
    assert len(forwards) == times
    assert torch.equal(found, expected)


# --- second derivatives --------------------------------------------------------------------------


def penalty(tensors, seen=contextlib.nullcontext):
    """A loss of the gradient's norm, and its gradients."""
    with seen():
        out = F.scaled_dot_product_attention(*tensors)
    with seen():
        first = torch.autograd.grad(out.sin().sum(), tensors, create_graph=True)
    with seen() as mode:
        second = torch.autograd.grad(sum(gradient.square().sum() for gradient in first), tensors)
    return first + second, mode


@FLOAT64
def test_second_derivative_under_a_mode():
    """The second derivative is PyTorch's own, where it has one."""
    tensors = [t.double().requires_grad_() for t in problem(1, 2, 5, 4, value_dim=3)]
    expected, _ = penalty(tensors)
    (found, mode), stats = calls(penalty, tensors, Seen)
    torch.testing.assert_close(found, expected)
    assert stats == {"replaced": 1, "a second derivative": 1}
    assert "aten::bmm" in mode.operators


def test_no_second_derivative_under_a_mode():
    """Where PyTorch has no second derivative, its error is raised."""
    tensors = leaves()
    with pytest.raises(RuntimeError) as theirs:
        penalty(tensors)
    with replaced_sdpa(), pytest.raises(theirs.type) as ours:
        penalty(tensors, Seen)
    assert str(ours.value) == str(theirs.value)


# --- tensors without memory, tracers, nn.MultiheadAttention --------------------------------------


@pytest.mark.parametrize("call", ["plain", "other width", "transposed"])
def test_fake_mode_with_real_tensors(call):
    tensors = leaves(call=call)
    with replaced_sdpa():
        real = CALLS[call](*tensors)
        with FakeTensorMode(allow_non_fake_inputs=True):
            fake = CALLS[call](*tensors)
            gradients = torch.autograd.grad(fake.sum(), tensors)
    assert isinstance(fake, FakeTensor) and all(isinstance(gradient, FakeTensor) for gradient in gradients)
    assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)


@pytest.mark.parametrize("tracing_mode", ["real", "fake", "symbolic"])
def test_traced_by_make_fx(tracing_mode):
    tensors = problem()
    with replaced_sdpa():
        graph = make_fx(CALLS["causal"], tracing_mode=tracing_mode)(*tensors)
        expected = CALLS["causal"](*tensors)
    assert [str(node.target) for node in graph.graph.nodes if "attention" in str(node.target)] == [
        "mfa.attention_forward.default"
    ]
    assert torch.equal(graph(*tensors), expected)


@pytest.mark.skipif(not hasattr(torch.library, "get_kernel"), reason="nn.MultiheadAttention keeps its own way")
def test_native_multi_head_attention():
    """A mode sees PyTorch's operator and nothing inside it, as without this package."""
    layer, x = torch.nn.MultiheadAttention(32, 4, batch_first=True).eval(), torch.randn(2, 9, 32)

    def attend():
        with torch.no_grad(), Seen() as outer, Seen() as inner:
            out = layer(x, x, x, need_weights=False)[0]
        assert inner.operators == outer.operators
        return out, inner.operators

    expected, operators = attend()
    (out, ours), stats = calls(attend)
    assert ours == operators and "aten::_native_multi_head_attention" in ours
    assert stats == {"replaced": 1}
    torch.testing.assert_close(out, expected)


def test_calls_within_a_call_are_their_own():
    """Calls within a call, such as those of a hook for saved tensors, are not differentiated with the outer call."""
    found = []

    def pack(tensor):
        if not found:
            found.append(None)
            with torch.enable_grad():
                x = torch.randn(1, 1, 3, 4, requires_grad=True)
                out, _ = torch.ops.mfa.attention_forward(*Inputs(x, x, x), *Options(softcap=2.0))
                found.append(torch.autograd.grad(out.sin().sum(), x, create_graph=True)[0])
        return tensor

    with Seen(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        calls(F.scaled_dot_product_attention, *leaves())
    with pytest.raises(NotImplementedError, match="no second derivative"):
        found[1].sum().backward()
