"""The storage of a tensor: too small for it, freed, or shared copy-on-write."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from mps_flash_attn import dispatch_cache, explain, flash_attention, replaced_sdpa, sdpa_stats

SHAPE = (2, 2, 9, 8)
OUT_OF_BOUNDS = r"{}: sizes .* requiring a storage size of \d+ are out of bounds for storage of size {}"
pytestmark = pytest.mark.usefixtures("everything", "one_thread")


@pytest.fixture(params=["at first", "again"], autouse=True)
def _first_or_cached(request):
    """Runs each test also with calls that have an entry in the dispatch cache."""
    dispatch_cache.clear()
    if request.param == "again":
        with replaced_sdpa():
            for _ in range(4):
                for attention in ATTENTIONS.values():
                    for requires_grad in (True, False):
                        for mask in (None, torch.zeros(9, 9)):
                            tensors = operands(requires_grad)
                            out = attention(*tensors, attn_mask=mask)
                            if requires_grad:
                                torch.autograd.grad(out, tensors, torch.ones_like(out))


ATTENTIONS = {"flash_attention": flash_attention, "sdpa": F.scaled_dot_product_attention}
either = pytest.mark.parametrize("attention", ATTENTIONS.values(), ids=ATTENTIONS)


def operands(requires_grad=False):
    return [torch.randn(SHAPE).requires_grad_(requires_grad) for _ in range(3)]


def resized(size, offset=0):
    """A tensor whose storage was resized to `size` bytes after it was made."""
    count = torch.Size(SHAPE).numel()
    memory = torch.randn(offset + count)
    tensor = memory[offset:].view(SHAPE)
    memory.untyped_storage().resize_(size)
    return tensor


# --- storages that were resized ------------------------------------------------------------------


@either
@pytest.mark.parametrize("size, offset", [(0, 0), (0, 5), (1151, 0), (1160, 5)])
@pytest.mark.parametrize("which", range(3))
def test_short_operand(attention, which, size, offset):
    tensors = operands()
    tensors[which] = resized(size, offset)
    name = ("query", "key", "value")[which]
    with replaced_sdpa(), pytest.raises(RuntimeError, match=OUT_OF_BOUNDS.format(name, size)):
        attention(*tensors)


@either
def test_short_mask(attention):
    mask = torch.randn(9, 9)
    mask.untyped_storage().resize_(80)
    with replaced_sdpa(), pytest.raises(RuntimeError, match=OUT_OF_BOUNDS.format("attn_mask", 80)):
        attention(*operands(), attn_mask=mask)


@pytest.mark.parametrize("backward", [False, True])
def test_explained_short_mask(backward):
    mask = torch.randn(9, 9)
    mask.untyped_storage().resize_(80)
    with pytest.raises(RuntimeError, match=OUT_OF_BOUNDS.format("attn_mask", 80)):
        explain(*operands(), attn_mask=mask, backward=backward)


def test_storage_that_just_suffices():
    expected = flash_attention(*[torch.ones(SHAPE)] * 3)
    tensors = [resized(1152 + 20, 5).fill_(1) for _ in range(3)]
    assert torch.equal(flash_attention(*tensors), expected)


def test_tensor_without_elements_needs_no_storage():
    nothing = torch.empty(0).as_strided((2, 2, 0, 8), (1, 1, 1, 1), 100)
    assert flash_attention(nothing, *operands()[1:]).shape == (2, 2, 0, 8)
    assert not flash_attention(operands()[0], nothing, nothing).any()


@either
@pytest.mark.parametrize("freed", ["query", "key", "value", "out", "d_out"])
def test_freed_before_backward(attention, freed):
    """A freed storage raises, as in a sharded model that has freed its parameters; it works again once restored."""
    tensors, d_out = operands(requires_grad=True), torch.randn(SHAPE)
    with replaced_sdpa():
        out = attention(*tensors)
        expected = torch.autograd.grad(out, tensors, d_out, retain_graph=True)
        found = {"query": tensors[0], "key": tensors[1], "value": tensors[2], "out": out, "d_out": d_out}[freed].data
        numbers = found.clone()
        found.untyped_storage().resize_(0)
        with pytest.raises(RuntimeError, match=OUT_OF_BOUNDS.format(freed, 0)):
            torch.autograd.grad(out, tensors, d_out, retain_graph=True)
        found.untyped_storage().resize_(numbers.nbytes)
        found.copy_(numbers)
        assert all(map(torch.equal, torch.autograd.grad(out, tensors, d_out), expected))


def test_freed_log_sum_exp():
    tensors = operands(requires_grad=True)
    out, lse = flash_attention(*tensors, return_lse=True)
    d_lse = torch.randn_like(lse)
    d_lse.untyped_storage().resize_(4)
    with pytest.raises(RuntimeError, match=OUT_OF_BOUNDS.format("d_lse", 4)):
        torch.autograd.grad(lse, tensors, d_lse, retain_graph=True)
    lse.detach().untyped_storage().resize_(4)
    with pytest.raises(RuntimeError, match=OUT_OF_BOUNDS.format("lse", 4)):
        torch.autograd.grad(out, tensors, torch.ones_like(out))


# --- zero tensors --------------------------------------------------------------------------------


@either
@pytest.mark.parametrize("which", range(3))
def test_zero_tensor(attention, which):
    """A zero tensor, which has no memory, counts as zeros, even where PyTorch's fused kernel would read invalid
    memory."""
    tensors = operands()
    tensors[which] = torch.zeros(SHAPE)
    with sdpa_kernel(SDPBackend.MATH):
        expected = F.scaled_dot_product_attention(*tensors)
    tensors[which] = torch._efficientzerotensor(SHAPE)
    with replaced_sdpa():
        torch.testing.assert_close(attention(*tensors), expected)


@pytest.mark.parametrize("options, outcome", [({}, "replaced"), ({"dropout_p": 1.0}, "replaced")], ids=str)
def test_zero_tensor_is_counted_once(options, outcome):
    sdpa_stats(reset=True)
    with replaced_sdpa():
        F.scaled_dot_product_attention(*operands()[:2], torch._efficientzerotensor(SHAPE), **options)
    assert sdpa_stats() == {outcome: 1}


@either
def test_zero_mask_and_gradient(attention):
    tensors = operands(requires_grad=True)
    with replaced_sdpa():
        out = attention(*tensors, attn_mask=torch._efficientzerotensor((9, 9)))
        torch.testing.assert_close(out, attention(*tensors))
        out = attention(*tensors)
        assert not any(t.any() for t in torch.autograd.grad(out, tensors, torch._efficientzerotensor(SHAPE)))


# --- storages that are shared until they are written ---------------------------------------------


@pytest.mark.cpu("the stand-in for an MTLBuffer is written")
@pytest.mark.skipif(not hasattr(torch.Tensor, "const_data_ptr"), reason="this PyTorch has no address to read from")
@either
@pytest.mark.parametrize("masked", [False, True])
def test_copy_on_write(attention, masked):
    """Copy-on-write tensors that are only read stay shared, forward and backward."""
    tensors, d_out, mask = operands(), torch.randn(SHAPE), torch.zeros(9, 9) if masked else None
    shared = [torch._lazy_clone(t).requires_grad_() for t in tensors]
    d_shared, mask_shared = torch._lazy_clone(d_out), torch._lazy_clone(mask) if masked else None
    with replaced_sdpa():
        out = attention(*shared, attn_mask=mask_shared)
        gradients = torch.autograd.grad(out, shared, d_shared)
        assert torch.equal(out, attention(*tensors, attn_mask=mask))
    assert not any(t.isnan().any() for t in gradients)
    for tensor in (*shared, d_shared, *([mask_shared] if masked else [])):
        assert torch._C._is_cow_tensor(tensor)
