"""replace_sdpa under each setting of the kernels that PyTorch may use: sdpa_kernel, sdp_kernel, enable_flash_sdp and so
on. Ours is none of PyTorch's kernels; docs/pytorch.md says what each setting means for it."""

import contextlib
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from calls import Seen, calls, problem
from mps_flash_attn import replaced_sdpa, sdpa_stats

pytestmark = [pytest.mark.usefixtures("everything", "one_thread"), pytest.mark.filterwarnings("ignore")]
KERNELS = ("flash", "mem_efficient", "math", "cudnn")
CUDA = torch.backends.cuda


@contextlib.contextmanager
def allowed(*kernels):
    """Allows only these kernels, by flags such as enable_flash_sdp()."""
    before = [getattr(CUDA, f"{name}_sdp_enabled")() for name in KERNELS]
    try:
        for name in KERNELS:
            getattr(CUDA, f"enable_{name}_sdp")(name in kernels)
        yield
    finally:
        for name, was in zip(KERNELS, before, strict=True):
            getattr(CUDA, f"enable_{name}_sdp")(was)


SETTINGS = [tuple(itertools.compress(KERNELS, bits)) for bits in itertools.product((True, False), repeat=4)]
EACH_SETTING = pytest.mark.parametrize("kernels", SETTINGS, ids=lambda kernels: " ".join(kernels) or "none")


def reason(kernels):
    """The documented reason why a call is left to PyTorch; None if it is replaced."""
    return None if "flash" in kernels or "mem_efficient" in kernels else "flash attention is disabled"


def transposed(value_dim=24):
    tensors = problem(2, 33, 4, 24, kv_len=4, kv_heads=33, value_dim=value_dim)
    return [t.transpose(1, 2).requires_grad_() for t in tensors]


def outcome(function, *arguments):
    try:
        return function(*arguments)
    except (NotImplementedError, RuntimeError) as error:
        return type(error), str(error)


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("value_dim", [24, 10])
@EACH_SETTING
def test_setting(kernels, value_dim, again):
    """Results have PyTorch's layout; a call that its kernels reject raises its error; a call left to PyTorch gives its
    bits."""
    tensors = transposed(value_dim)
    with allowed(*kernels):
        theirs = outcome(F.scaled_dot_product_attention, *tensors)
    with replaced_sdpa():
        for _ in range(3 if again else 0):
            F.scaled_dot_product_attention(*tensors)
        sdpa_stats(reset=True)
        with allowed(*kernels):
            ours = outcome(F.scaled_dot_product_attention, *tensors)
    left, stats = reason(kernels), sdpa_stats()
    if isinstance(theirs, tuple):
        assert ours == theirs and "replaced" not in stats
        return
    assert stats == {left or "replaced": 1}
    assert ours.stride() == theirs.stride()
    d_out = torch.randn_like(theirs)
    found, wanted = (torch.autograd.grad(out, tensors, d_out) for out in (ours, theirs))
    exact = {"rtol": 0, "atol": 0} if left else {}
    torch.testing.assert_close(ours, theirs, **exact)
    torch.testing.assert_close(found, wanted, **exact)


@EACH_SETTING
def test_setting_under_a_mode_and_a_transform(kernels):
    """The rule holds under a mode and a transform, with PyTorch's errors and layout."""
    tensors = transposed()
    stacked = [torch.stack([t, -t]) for t in tensors]
    with allowed(*kernels), torch.no_grad():
        expected = outcome(F.scaled_dot_product_attention, *tensors)
        with Seen() as mode:
            ours, stats = calls(outcome, F.scaled_dot_product_attention, *tensors)
        mapped, mapped_stats = calls(outcome, torch.vmap(F.scaled_dot_product_attention), *stacked)
    if isinstance(expected, tuple):
        assert ours == expected and mapped == expected
        return
    left = reason(kernels)
    assert stats == mapped_stats == {left or "replaced": 1}
    assert ("mfa::attention_forward" in mode.operators) is (left is None)
    assert ours.stride() == expected.stride()
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(mapped[0], expected)


@EACH_SETTING
def test_setting_in_compiled_code(kernels):
    """Compiled code keeps the setting of the time of compiling."""
    torch._dynamo.reset()
    tensors = [t.detach() for t in transposed()]
    with allowed(*kernels):
        expected = outcome(F.scaled_dot_product_attention, *tensors)
        if isinstance(expected, tuple):
            with replaced_sdpa(), pytest.raises(Exception, match=r"No viable backend|No available"):
                torch.compile(F.scaled_dot_product_attention, backend="aot_eager")(*tensors)
            return
        compiled = torch.compile(lambda q, k, v: F.scaled_dot_product_attention(q, k, v), backend="aot_eager")
        found, stats = calls(compiled, *tensors)
    assert set(stats) == {reason(kernels) or "traced into a compiled graph"}
    assert found.stride() == expected.stride()
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kernels", [("mem_efficient", "math"), ("flash", "math"), ("math",)], ids=" ".join)
def test_second_derivative(kernels):
    """A second derivative exists where PyTorch's kernel of that setting has one, even if the setting has changed
    since."""
    tensors = transposed()

    def penalty():
        with allowed(*kernels):
            out = F.scaled_dot_product_attention(*tensors)
        gradients = torch.autograd.grad(out.sin().sum(), tensors, create_graph=True)
        return torch.autograd.grad(sum(gradient.square().sum() for gradient in gradients), tensors)

    theirs = outcome(penalty)
    ours, _ = calls(outcome, penalty)
    if "flash" in kernels:
        assert ours == theirs and "is not implemented" in theirs[1]
    else:
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def of_sam_2():
    """As SAM 2 comes to it without CUDA: OLD_GPU, no USE_FLASH_ATTN, MATH_KERNEL_ON."""
    return CUDA.sdp_kernel(enable_flash=False, enable_math=True, enable_mem_efficient=True)


def unfused_alone_as_of_old():
    return CUDA.sdp_kernel(enable_flash=False, enable_math=True, enable_mem_efficient=False)


PROGRAMS = {
    "SAM 2": (of_sam_2, True),
    "without flash": (lambda: allowed("mem_efficient", "math", "cudnn"), True),
    "either": (lambda: sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]), True),
    "flash": (lambda: sdpa_kernel(SDPBackend.FLASH_ATTENTION), True),
    "diffusers' _native_math": (lambda: sdpa_kernel(SDPBackend.MATH), False),
    "unfused alone": (unfused_alone_as_of_old, False),
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_what_programs_set(program):
    context, is_ours = PROGRAMS[program]
    tensors = problem()
    with context():
        expected = F.scaled_dot_product_attention(*tensors)
        out, stats = calls(F.scaled_dot_product_attention, *tensors)
    assert stats == {"replaced" if is_ours else "flash attention is disabled": 1}
    torch.testing.assert_close(out, expected)


@pytest.mark.skipif(not hasattr(torch.library, "get_kernel"), reason="nn.MultiheadAttention keeps its own way")
@EACH_SETTING
def test_native_multi_head_attention(kernels):
    """PyTorch's operator of nn.MultiheadAttention ignores the settings, and raises no errors."""
    layer, x = torch.nn.MultiheadAttention(32, 4, batch_first=True).eval(), torch.randn(2, 9, 32)

    def attend():
        with torch.no_grad(), allowed(*kernels):
            return layer(x, x, x, need_weights=False)[0]

    expected = attend()
    out, stats = calls(attend)
    torch.testing.assert_close(out, expected)
    is_ours = reason(kernels) is None and ("flash" in kernels or "math" in kernels)
    assert ("replaced" in stats) is is_ours and sum(stats.values()) == 1
