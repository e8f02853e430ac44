"""The block_mask of flash_attention, a bool tensor or a BlockMask, against attention written out and flex_attention."""

import warnings

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck
from torch.nn.attention import flex_attention as flex
from torch.utils.checkpoint import checkpoint

from dropped import gradients, problem
from mps_flash_attn import block_mask, explain, flash_attention, reference
from mps_flash_attn.arguments import block_map_shape
from mps_flash_attn.block_mask import elements
from mps_flash_attn.options import Options
from mps_flash_attn.problem import Inputs
from stand_in import DTYPES, FLOAT64

FORWARD = torch.ops.mfa.attention_forward.default
BACKWARD = torch.ops.mfa.attention_backward.default
SIZES = ((16, 16), (16, 48), (64, 32), (128, 128))


def blocks_of(query, key, size, batch=2, heads=4, share=0.6):
    return torch.rand(batch, heads, *block_map_shape(query.shape, key.shape, size)[2:]) < share


def attend(query, key, value, blocks, **options):
    return flash_attention(
        query, key, value, "bottom_right", enable_gqa=True, block_mask=blocks, block_size=16, **options
    )


# --- Bool tensors --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [(70, 130), (1, 300), (64, 64), (130, 61)], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("mask", ["none", "bool", "float"])
def test_results_and_gradients(dtype, lengths, size, mask):
    query, key, value = problem(*lengths, dtype=dtype)
    masks = {"none": lambda: None, "bool": lambda: torch.rand(lengths) < 0.7, "float": lambda: torch.randn(4, *lengths)}
    sinks, slopes = (torch.randn(2, 4), torch.rand(2, 4)) if mask == "none" else (None, None)
    blocks = blocks_of(query, key, size)

    def ours(query, key, value, mask, sinks, slopes, seed, blocks, *_):
        keywords = {"attn_mask": mask, "sinks": sinks, "alibi_slopes": slopes, "enable_gqa": True, "return_lse": True}
        keywords |= {"window_size": (-1, 90), "dropout_p": 0.2, "dropout_seed": 3}
        return flash_attention(query, key, value, block_mask=blocks, block_size=size, **keywords)

    inputs = Inputs(query, key, value, masks[mask](), sinks, slopes, torch.tensor([3, 3]), blocks)
    options = {"upper": key.shape[2] - query.shape[2] + 90, "dropout": 0.2, "block_q": size[0], "block_kv": size[1]}
    reference.check(ours, inputs, **options)


@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (1, 4), (4,), ()], ids=str)
def test_broadcast(shape):
    query, key, value = problem(70, 130)
    blocks = torch.rand(*shape, 5, 9) < 0.6
    found = flash_attention(query, key, value, enable_gqa=True, block_mask=blocks, block_size=16)
    mask = elements(blocks, (16, 16), (70, 130))
    torch.testing.assert_close(found, flash_attention(query, key, value, attn_mask=mask, enable_gqa=True))


def test_strides():
    query, key, value = problem(70, 130)
    blocks = torch.rand(9, 5, 4, 2)[:, ::1].permute(3, 2, 1, 0) < 0.6
    assert torch.equal(attend(query, key, value, blocks), attend(query, key, value, blocks.contiguous()))
    all_visible = torch.ones(1, dtype=torch.bool).expand(5, 9)
    torch.testing.assert_close(
        attend(query, key, value, all_visible), flash_attention(query, key, value, "bottom_right", enable_gqa=True)
    )


def test_number_and_default_of_the_size():
    query, key, value = problem(300, 300, kv_heads=4)
    blocks = torch.tensor([[True, False, False], [True, True, False], [False, True, True]])
    found = flash_attention(query, key, value, block_mask=blocks)
    for size in (128, (128, 128), [128, 128]):
        assert torch.equal(flash_attention(query, key, value, block_mask=blocks, block_size=size), found)


def test_queries_without_blocks():
    query, key, value = problem(70, 130)
    blocks = torch.ones(5, 9, dtype=torch.bool)
    blocks[2] = False
    query.requires_grad_()
    out, lse = attend(query, key, value, blocks, return_lse=True)
    assert not out[:, :, 32:48].any() and lse[:, :, 32:48].eq(-torch.inf).all()
    (gradient,) = torch.autograd.grad(out.sum(), query)
    assert not gradient[:, :, 32:48].any() and gradient[:, :, :32].any()


def test_same_shapes_with_and_without():
    """Neither is served by what was cached for the other."""
    query, key, value = problem(70, 130, kv_heads=4)
    blocks = blocks_of(query, key, (16, 16))
    plain = [flash_attention(query, key, value, "bottom_right") for _ in range(3)]
    blocked = [attend(query, key, value, blocks) for _ in range(3)]
    assert torch.equal(plain[0], flash_attention(query, key, value, "bottom_right"))
    assert not torch.allclose(plain[0], blocked[0]) and torch.equal(blocked[0], blocked[2])
    assert not torch.equal(blocked[0], attend(query, key, value, ~blocks))


@FLOAT64
@pytest.mark.usefixtures("one_thread")
def test_gradcheck():
    query, key, value = problem(18, 35, head_dim=4, value_dim=3, dtype=torch.float64)
    blocks = blocks_of(query, key, (16, 16))
    leaves = [t.requires_grad_() for t in (query, key, value)]
    assert torch.autograd.gradcheck(lambda *t: attend(*t, blocks), leaves, fast_mode=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.autograd.gradgradcheck(lambda *t: attend(*t, blocks), leaves, fast_mode=True)


def test_blocks_changed_before_backward():
    query, key, value = problem(70, 130)
    blocks = blocks_of(query, key, (16, 16))
    out = attend(query.requires_grad_(), key, value, blocks)
    blocks.logical_not_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


# --- BlockMasks ----------------------------------------------------------------------------------


def causal(b, h, q, kv):
    return q >= kv


def prefix(b, h, q, kv):
    return (kv <= 37 + 11 * h) | (q >= kv)


def documents(b, h, q, kv):
    return torch.div(q, 50 + b, rounding_mode="floor") == torch.div(kv, 50 + b, rounding_mode="floor")


def tiles(b, h, q, kv):
    return (q // 32 - kv // 32).abs() <= 1


def nothing_for_some(b, h, q, kv):
    return (q % 3 > 0) & (q >= kv)


MODS = {
    "causal": (causal, None, None),
    "prefix": (prefix, None, 4),
    "documents": (documents, 2, None),
    "tiles": (tiles, None, None),
    "rows without keys": (nothing_for_some, 2, 4),
}


def flex_attention(*tensors, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is slow without being compiled
        return flex.flex_attention(*tensors, enable_gqa=True, **options)


@pytest.mark.parametrize("lengths", [(128, 128), (160, 96), (100, 130)], ids=str)
@pytest.mark.parametrize("size", [(32, 32), (16, 64), (128, 128)], ids=str)
@pytest.mark.parametrize("mod", MODS)
def test_flex_attention(mod, size, lengths):
    mask_mod, batch, heads = MODS[mod]
    query, key, value = problem(*lengths)
    blocks = flex.create_block_mask(mask_mod, batch, heads, *lengths, device="cpu", BLOCK_SIZE=size)
    expected = flex_attention(query, key, value, block_mask=blocks)
    found = flash_attention(query, key, value, enable_gqa=True, block_mask=blocks)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def _eps(dtype):
    return torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mod", MODS)
@pytest.mark.parametrize("mask", ["none", "bool", "float"])
def test_gradients_of_block_masks(dtype, mod, mask):
    """With a mask of the caller's, whose gradient is right, too."""
    mask_mod, batch, heads = MODS[mod]
    query, key, value = problem(100, 130, dtype=dtype)
    masks = {"none": None, "bool": torch.rand(100, 130) < 0.7, "float": torch.randn(4, 100, 130)}
    blocks = flex.create_block_mask(mask_mod, batch, heads, 100, 130, device="cpu", BLOCK_SIZE=(32, 16))
    visible = flex.create_mask(mask_mod, 2, 4, 100, 130, device="cpu")

    def ours(query, key, value, mask):
        options = {"attn_mask": mask, "enable_gqa": True, "return_lse": True, "block_mask": blocks}
        return flash_attention(query, key, value, **options)

    def with_all_of_it(query, key, value, mask):
        if mask is None or mask.dtype is torch.bool:
            given = visible if mask is None else visible & mask
        else:
            given = mask.masked_fill(~visible, -torch.inf)
        return flash_attention(query, key, value, attn_mask=given, enable_gqa=True, return_lse=True)

    d_out, d_lse = torch.randn(2, 4, 100, 16), torch.randn(2, 4, 100)
    tensors = query, key, value, masks[mask]
    found = reference.results(lambda *t: ours(*t[:4]), tensors, d_out, d_lse)
    expected = reference.results(lambda *t: with_all_of_it(*t[:4]), tensors, d_out, d_lse)
    for name in expected:  # the gradient of a mask is of float32
        tolerance = {torch.float64: 1e-9, torch.float32: 1e-4}.get(max(dtype, found[name].dtype, key=_eps), 3e-2)
        torch.testing.assert_close(found[name], expected[name], rtol=tolerance, atol=tolerance)


def test_no_mask_without_partial_blocks(monkeypatch):
    query, key, value = problem(128, 96)
    blocks = flex.create_block_mask(tiles, None, None, 128, 96, device="cpu", BLOCK_SIZE=32)
    monkeypatch.setattr(flex, "create_mask", None)
    for _ in range(2):
        found = flash_attention(query, key, value, enable_gqa=True, block_mask=blocks)
    with torch.inference_mode():
        flash_attention(query, key, value, enable_gqa=True, block_mask=blocks)
    monkeypatch.undo()
    torch.testing.assert_close(found, flex_attention(query, key, value, block_mask=blocks), rtol=1e-4, atol=1e-5)
    assert "mask_bool" not in explain(query, key, value, enable_gqa=True, block_mask=blocks).kernel


def test_mask_mod_holds_in_partial_blocks_alone():
    query, key, value = problem(64, 64, kv_heads=4)
    partial, full = torch.eye(2, dtype=torch.bool), ~torch.eye(2, dtype=torch.bool)
    ordered = [
        (dense.sum(-1).int()[None, None], (~dense).int().argsort(dim=-1, stable=True).int()[None, None])
        for dense in (partial, full)
    ]
    blocks = flex.BlockMask.from_kv_blocks(*ordered[0], *ordered[1], BLOCK_SIZE=32, mask_mod=causal)
    visible = flex.create_mask(causal, 1, 1, 64, 64, device="cpu") | elements(full, (32, 32), (64, 64))
    found = flash_attention(query, key, value, block_mask=blocks)
    torch.testing.assert_close(found, flash_attention(query, key, value, attn_mask=visible))


@pytest.mark.parametrize("mod", MODS)
def test_blocks_that_batch_entries_and_heads_share(mod, monkeypatch):
    """mask_mod is asked for each of them as in PyTorch, and the mask has the sizes that it depends on."""
    mask_mod, *_ = MODS[mod]
    query, key, value = problem(128, 96)
    blocks = flex.create_block_mask(lambda b, h, q, kv: q >= 0, None, None, 128, 96, device="cpu", BLOCK_SIZE=32)
    blocks = flex.BlockMask.from_kv_blocks(
        blocks.full_kv_num_blocks, blocks.full_kv_indices, BLOCK_SIZE=32, mask_mod=mask_mod, seq_lengths=(128, 96)
    )
    expected = flex_attention(query, key, value, block_mask=blocks)
    masks, resolve = [], block_mask.resolve
    monkeypatch.setattr(block_mask, "resolve", lambda *given: masks.append(resolve(*given)) or masks[-1])
    found = flash_attention(query, key, value, enable_gqa=True, block_mask=blocks)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    if masks[0][2] is not None:
        sizes = (2 if mod == "documents" else 1, 4 if mod == "prefix" else 1)
        assert masks[0][2].shape == (*sizes, 128, 96)


def test_block_mask_without_mask_mod():
    query, key, value = problem(64, 96, kv_heads=4)
    numbers, indices = torch.tensor([[[2, 1]]]).int(), torch.tensor([[[[2, 0, 1], [1, 0, 2]]]]).int()
    blocks = flex.BlockMask.from_kv_blocks(numbers, indices, BLOCK_SIZE=32)
    dense = torch.tensor([[True, False, True], [False, True, False]])
    found = flash_attention(query, key, value, block_mask=blocks)
    assert torch.equal(found, flash_attention(query, key, value, block_mask=dense, block_size=32))


def test_partial_blocks_that_appear_later():
    """What is known of a BlockMask is forgotten when its tensors change."""
    query, key, value = problem(64, 64, kv_heads=4)
    blocks = flex.create_block_mask(tiles, None, None, 64, 64, device="cpu", BLOCK_SIZE=32)
    flash_attention(query, key, value, block_mask=blocks)
    blocks.mask_mod = causal
    blocks.kv_num_blocks.fill_(2)
    blocks.full_kv_num_blocks.fill_(0)
    blocks.kv_indices.copy_(torch.arange(2).expand(2, 2))
    found = flash_attention(query, key, value, block_mask=blocks)
    torch.testing.assert_close(found, flash_attention(query, key, value, True))


def test_mask_mod_reads_what_it_has_now():
    """It is evaluated in each call: a tensor that it has may have changed."""
    query, key, value = problem(64, 64, kv_heads=4)
    document = torch.arange(64) // 20

    def same_document(b, h, q, kv):
        return document[q] == document[kv]

    blocks = flex.create_block_mask(same_document, None, None, 64, 64, device="cpu", BLOCK_SIZE=64)
    for width in (20, 30):
        document.copy_(torch.arange(64) // width)
        expected = flash_attention(query, key, value, attn_mask=document[:, None] == document)
        torch.testing.assert_close(flash_attention(query, key, value, block_mask=blocks), expected)


# --- Through PyTorch -----------------------------------------------------------------------------


@pytest.mark.usefixtures("one_thread")
def test_opcheck():
    query, key, value = problem(20, 37)
    blocks = blocks_of(query, key, (16, 16))
    inputs = Inputs(query.requires_grad_(), key, value, None, torch.randn(2, 4), None, None, blocks)
    options = Options(block_q=16, block_kv=16)
    opcheck(FORWARD, (*inputs, *options))
    inputs = [t if t is None else t.detach() for t in inputs]
    out, lse = FORWARD(*inputs, *options)
    wanted = [True, True, True, False, True]
    opcheck(BACKWARD, (torch.randn_like(out), torch.randn_like(lse), *inputs, out, lse, *options, wanted))


@pytest.mark.parametrize("route", ["compile", "checkpoint"])
def test_routes_of_training(route):
    tensors = problem(70, 130)
    blocks = blocks_of(*tensors[:2], (16, 16))
    routes = {
        "compile": torch.compile(attend, fullgraph=True, backend="aot_eager"),
        "checkpoint": lambda *tensors: checkpoint(attend, *tensors, use_reentrant=False),
    }
    torch.testing.assert_close(
        gradients(lambda *t: routes[route](*t, blocks), *tensors), gradients(lambda *t: attend(*t, blocks), *tensors)
    )


def test_compiled_once_for_all_lengths():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attend, backend=counter, fullgraph=True, dynamic=True)
    for lengths in ((39, 91), (70, 130), (133, 107)):
        tensors = problem(*lengths)
        blocks = blocks_of(*tensors[:2], (16, 16))
        torch.testing.assert_close(compiled(*tensors, blocks), attend(*tensors, blocks))
    assert counter.frame_count == 1


@pytest.mark.parametrize("mod", ["causal", "tiles", "prefix"])
def test_compiled_block_mask(mod):
    torch._dynamo.reset()
    tensors = problem(128, 96)
    blocks = flex.create_block_mask(MODS[mod][0], None, None, 128, 96, device="cpu", BLOCK_SIZE=32)

    def run(*tensors):
        return flash_attention(*tensors, enable_gqa=True, block_mask=blocks)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(gradients(compiled, *tensors), gradients(run, *tensors))


@pytest.mark.parametrize("places", [(0, 0, 0, 0), (0, None, 0, None), (None, None, None, 0), (2, 1, 3, 2)])
def test_vmap(places):
    tensors = problem(70, 130)
    blocks = blocks_of(*tensors[:2], (16, 16))
    mapped = [
        t if place is None else torch.stack([t, t.flip(2), t.flip(3)], place)
        for t, place in zip((*tensors, blocks), places, strict=True)
    ]
    found = torch.vmap(attend, places)(*mapped)
    for n in range(3):
        sample = [t if place is None else t.select(place, n) for t, place in zip(mapped, places, strict=True)]
        torch.testing.assert_close(found[n], attend(*sample))


@pytest.mark.parametrize("transform", ["grad", "vmap of grad"])
def test_torch_func(transform):
    tensors = problem(70, 130)
    blocks = blocks_of(*tensors[:2], (16, 16))
    grad = torch.func.grad(lambda *t: attend(*t, blocks).square().sum(), (0, 1, 2))
    expected = gradients(lambda *t: attend(*t, blocks), *tensors)[1:]
    if transform == "grad":
        torch.testing.assert_close(grad(*tensors), expected)
    else:
        found = torch.vmap(grad)(*(torch.stack([t, t]) for t in tensors))
        torch.testing.assert_close(tuple(t[1] for t in found), expected)


def test_autocast():
    query, key, value = problem(70, 130)
    blocks = blocks_of(query, key, (16, 16))
    with torch.autocast("cpu", torch.bfloat16):
        found = attend(query, key, value, blocks)
    assert torch.equal(found, attend(query.bfloat16(), key.bfloat16(), value.bfloat16(), blocks))


def test_explain():
    query, key, value = problem(70, 130)
    blocks = blocks_of(query, key, (16, 16))
    for backward in (False, True):
        found = explain(query, key, value, enable_gqa=True, block_mask=blocks, block_size=16, backward=backward)
        assert "_block_map_" in found.kernel
    assert "_block_map_" not in explain(query, key, value, enable_gqa=True).kernel


# --- Errors --------------------------------------------------------------------------------------

BLOCKS = torch.ones(5, 9, dtype=torch.bool)
WRONG = {
    "list": ({"block_mask": [[True]]}, TypeError, "block_mask is a list; it must be a BlockMask of flex_attention or"),
    "dtype": ({"block_mask": BLOCKS.int()}, TypeError, "block_mask is int32; it must be bool"),
    "shape": (
        {"block_mask": BLOCKS[:4]},
        ValueError,
        r"block_mask has the shape \(4, 9\); with blocks of \(16, 16\) it must be \(2, 4, 5, 9\)",
    ),
    "heads": ({"block_mask": BLOCKS.expand(2, 5, 9)}, ValueError, r"block_mask has the shape \(2, 5, 9\)"),
    "dimensions": ({"block_mask": BLOCKS.expand(1, 1, 1, 5, 9)}, ValueError, r"block_mask has the shape \(1, 1, 1, "),
    "size": ({"block_size": 20}, ValueError, "block_size is 20; it must be .* a multiple of 16"),
    "size of zero": ({"block_size": (16, 0)}, ValueError, r"block_size is \(16, 0\); it must be"),
    "three sizes": ({"block_size": (16, 16, 16)}, ValueError, r"block_size is \(16, 16, 16\); it must be"),
    "size that is a float": ({"block_size": 16.0}, ValueError, "block_size is 16.0; it must be"),
    "size alone": ({"block_mask": None}, ValueError, "block_size is 16 and block_mask None"),
    "device": ({"block_mask": BLOCKS.to("meta")}, ValueError, "block_mask is on meta and query on"),
    "sparse": ({"block_mask": BLOCKS.to_sparse()}, TypeError, "block_mask has the layout sparse_coo"),
}


@pytest.mark.parametrize("function", [flash_attention, explain])
@pytest.mark.parametrize("case", WRONG)
def test_wrong_block_mask(case, function):
    options, error, words = WRONG[case]
    query, key, value = problem(70, 130, kv_heads=4)
    with pytest.raises(error, match=words):
        function(query, key, value, **({"block_mask": BLOCKS, "block_size": 16} | options))


@pytest.mark.parametrize("function", [flash_attention, explain])
def test_block_mask_that_does_not_fit(function):
    query, key, value = problem(70, 130, kv_heads=4)

    def blocks(batch, heads, q_len, kv_len, size):
        return flex.create_block_mask(causal, batch, heads, q_len, kv_len, device="cpu", BLOCK_SIZE=size)

    for wrong, words in (
        (blocks(None, None, 70, 131, 32), "BlockMask for 70 queries and 131 keys; it must be .*, 70 and 130"),
        (blocks(None, None, 70, 130, 40), r"block_size is \(40, 40\); it must be"),
        (blocks(3, None, 70, 130, 32), r"block_mask has the shape \(3, 1, 3, 5\)"),
        (blocks(None, 2, 70, 130, 32), r"block_mask has the shape \(1, 2, 3, 5\)"),
    ):
        with pytest.raises(ValueError, match=words):
            function(query, key, value, block_mask=wrong)
    with pytest.raises(ValueError, match=r"block_size is 16; leave it out: that of the BlockMask is \(32, 32\)"):
        function(query, key, value, block_mask=blocks(None, None, 70, 130, 32), block_size=16)


def test_wrong_blocks_of_the_operator():
    query, key, value = problem(70, 130)
    for wrong, error, words in (
        (BLOCKS, ValueError, r"block_mask has the shape \(5, 9\); with blocks of \(16, 16\) it must be \(2, 4, 5, 9\)"),
        (BLOCKS.expand(2, 4, 5, 9).int(), TypeError, "block_mask is int32; it must be bool"),
    ):
        with pytest.raises(error, match=words):
            FORWARD(*Inputs(query, key, value, block_mask=wrong), *Options(block_q=16, block_kv=16))
    with pytest.raises(ValueError, match="block_map"):
        FORWARD(*Inputs(query, key, value), *Options(block_q=16, block_kv=16))


def test_short_storage():
    query, key, value = problem(70, 130)
    blocks = BLOCKS.expand(2, 4, 5, 9).contiguous()
    blocks.untyped_storage().resize_(12)
    with pytest.raises(RuntimeError, match="out of bounds for storage of size 12"):
        attend(query, key, value, blocks)
