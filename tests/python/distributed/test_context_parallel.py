"""PyTorch's context_parallel under a replaced scaled_dot_product_attention, over four processes beside one."""

import pytest
import torch
import torch.nn.functional as F
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.experimental import _attention, context_parallel
from torch.distributed.tensor.experimental._attention import context_parallel_unshard
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.functional import scaled_dot_product_attention as imported_early

import pool
from mps_flash_attn import context_parallel_state, flash_attention, flash_attention_kvcache, replaced_sdpa, sdpa_stats
from mps_flash_attn.distributed import Layout, context_parallel_attention
from sharded import R, drawn, mesh_of, replace_all_sizes, sentence

ALL = range(pool.WORLD)


def within(buffers, balance=True):
    """context_parallel of buffers whose rows are in dimension 2."""
    _attention._cp_options.enable_load_balance = balance
    return context_parallel(mesh_of(4), buffers=buffers, buffer_seq_dims=[2] * len(buffers))


def unshard(*tensors):
    return context_parallel_unshard(mesh_of(4), [one.detach() for one in tensors], [2] * len(tensors))


def largest(pairs):
    return max((one - whole).abs().max().item() for one, whole in pairs)


def trained(shapes, options, balance):
    """The largest difference of the result and of gradients from those of one process."""
    tensors = drawn(*shapes)
    expected = F.scaled_dot_product_attention(*tensors, **options)
    torch.manual_seed(1)
    d_out = torch.randn_like(expected)
    expected.backward(d_out)
    buffers = [one.detach().clone() for one in (*tensors, d_out)]
    with replaced_sdpa(), within(buffers, balance):
        leaves = [one.clone().requires_grad_() for one in buffers[:3]]
        out = F.scaled_dot_product_attention(*leaves, **options)
        out.backward(buffers[3])
        found = unshard(out, *(one.grad for one in leaves))
    assert context_parallel_state.is_active() is False
    return largest(zip(found, (expected, *(one.grad for one in tensors)), strict=True))


SELF = ((2, 4, 64, 16),) * 3
GROUPED = (2, 4, 64, 16), (2, 2, 64, 16), (2, 2, 64, 8)


@pytest.mark.parametrize("balance", [True, False])
@pytest.mark.parametrize("is_causal", [True, False])
def test_trained(is_causal, balance):
    assert max(pool.shared().run(ALL, trained, SELF, {"is_causal": is_causal}, balance)) < 1e-12


def test_grouped_heads():
    options = {"is_causal": True, "enable_gqa": True, "scale": 0.3}
    assert max(pool.shared().run(ALL, trained, GROUPED, options, True)) < 1e-12


def spans(length, layout, balance):
    """(what context_parallel_state says of the load balancer, whether a rank gets the rows of this layout)."""
    rows = torch.arange(length).view(1, 1, -1, 1).clone()
    with within([rows], balance):
        found = context_parallel_state.is_balanced()
        own = rows.flatten().clone()
    assert not context_parallel_state.is_balanced()
    places = Layout.zigzag(length) if layout == "zigzag" else Layout.of_lengths(chunks(length))
    return found, torch.equal(own, places.positions())


def chunks(length):
    size = -(-length // pool.WORLD)
    return [max(min(size, length - size * rank), 0) for rank in ALL]


@pytest.mark.parametrize(
    ("length", "balance", "layout"),
    [(64, True, "zigzag"), (64, False, "contiguous"), (36, True, "contiguous")],  # 36 cannot be divided by 8
)
def test_which_rows_a_rank_has(length, balance, layout):
    """The options that say it are private in PyTorch: this fails where a version has changed them."""
    found = pool.shared().run(ALL, spans, length, layout, balance)
    assert found == [(layout == "zigzag", True)] * pool.WORLD


def without_gradients(length, mode):
    """The largest difference of this rank's rows from those of one process, for any length."""
    tensors = [one.detach() for one in drawn(*[(2, 4, length, 16)] * 3)]
    expected = F.scaled_dot_product_attention(*tensors, is_causal=True)
    with mode(), replaced_sdpa():
        buffers = [one.clone() for one in tensors]
        with within(buffers):
            out = F.scaled_dot_product_attention(*buffers, is_causal=True)
    own = Layout.of_lengths(chunks(length)).shard(expected, 2)
    assert out.shape == own.shape
    return largest([(out, own)]) if out.numel() else 0


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("length", [33, 5])
def test_uneven_lengths(length, mode):
    assert max(pool.shared().run(ALL, without_gradients, length, mode)) < 1e-12


def masked(shape, is_divided):
    """The largest difference of the result with a mask of all keys, and of this rank's rows if it is divided."""
    tensors = [one.detach() for one in drawn(*SELF)]
    mask = torch.rand(shape) > 0.3
    mask[..., 0] = True
    expected = F.scaled_dot_product_attention(*tensors, mask)
    buffers = [one.clone() for one in (*tensors, mask)][: 4 if is_divided else 3]
    with replaced_sdpa(), within(buffers):
        out = F.scaled_dot_product_attention(*buffers[:3], buffers[3] if is_divided else mask)
        (found,) = unshard(out)
    return largest([(found, expected)])


@pytest.mark.parametrize(("shape", "is_divided"), [((2, 1, 64, 64), True), ((2, 1, 1, 64), False)])
def test_masks(shape, is_divided):
    assert max(pool.shared().run(ALL, masked, shape, is_divided)) < 1e-12


class Attend(torch.nn.Module):
    def forward(self, *tensors, is_causal):
        return F.scaled_dot_product_attention(*tensors, is_causal=is_causal)


def of_modules(balanced):
    """The largest difference of a module with the plan _ContextParallel, beside which other calls are local."""
    tensors = [one.detach() for one in drawn(*SELF)]
    expected = F.scaled_dot_product_attention(*tensors, is_causal=True)
    kind = _attention._ContextParallel
    plan = kind(seq_dim=2, attention_type=kind.AttentionType.SDPA)
    module = parallelize_module(Attend(), mesh_of(4), plan)
    balancer = _attention._HeadTailLoadBalancer(64, 4, "cpu") if balanced else None
    _attention._enable_context_parallel_dispatcher()
    try:
        shards = _attention._context_parallel_shard(mesh_of(4), tensors, [2] * 3, balancer)
        with replaced_sdpa():
            out = module(*shards, is_causal=True)
            local = F.scaled_dot_product_attention(*tensors, is_causal=True)
        found = context_parallel_unshard(mesh_of(4), [out], [2], balancer)
    finally:
        _attention._disable_context_parallel_dispatcher()
    return largest([(found[0], expected), (local, expected)])


@pytest.mark.parametrize("balanced", [True, False])
def test_modules(balanced):
    assert max(pool.shared().run(ALL, of_modules, balanced)) < 1e-12


def local_calls():
    """The error, or None, of each call with plain tensors inside context_parallel, and of some that are right."""
    replace_all_sizes()
    tensors = [one.detach() for one in drawn(*SELF)]
    layer, rows = torch.nn.MultiheadAttention(16, 2, batch_first=True).eval(), torch.randn(2, 16, 16)
    compiled = torch.compile(lambda *tensors: imported_early(*tensors), backend="aot_eager")
    with replaced_sdpa(), within([one.clone() for one in tensors] + tensors):
        sdpa_stats(reset=True)
        replicated = [DTensor.from_local(one, mesh_of(4), [R], run_check=False) for one in tensors]
        layout = Layout.zigzag(64)
        found = {
            "imported early": sentence(imported_early, *tensors),
            "the operator": sentence(torch.ops.aten.scaled_dot_product_attention, *tensors),
            "compiled": sentence(compiled, *tensors),
            "flash_attention": sentence(flash_attention, *tensors),
            "flash_attention_kvcache": sentence(flash_attention_kvcache, *tensors),
        }
        with torch.no_grad():
            found["nn.MultiheadAttention"] = sentence(layer, rows, rows, rows, need_weights=False)
        right = [sentence(function, *replicated) for function in (imported_early, flash_attention)]
        right += [sentence(context_parallel_attention, *tensors, layout), sdpa_stats()]
    with replaced_sdpa():
        right += [sentence(function, *tensors) for function in (imported_early, flash_attention)]
    return found, right


def test_local_calls_are_refused():
    for found, right in pool.shared().run(ALL, local_calls):
        for name, error in found.items():
            assert error is not None and "inside PyTorch's context_parallel" in error, (name, error)
        assert right == [None, None, None, {"replaced": 1}, None, None]
