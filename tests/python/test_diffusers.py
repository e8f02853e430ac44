"""The attention backend of diffusers: models of two kinds beside diffusers' "native", its arguments, and what context
parallelism calls."""

import copy
import importlib
import socket
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd

from mps_flash_attn import Unsupported, flash_attention, register_diffusers, sdpa_stats
from mps_flash_attn.diffusers_backend import diffusers_attention, parallel_backward, parallel_forward
from stand_in import FULL

pytestmark = [
    pytest.mark.needs("diffusers"),
    pytest.mark.usefixtures("everything", "one_thread"),
    pytest.mark.filterwarnings("ignore"),
]

B, L, S, H, D = 2, 20, 31, 4, 16


@pytest.fixture
def dispatch():
    """diffusers' module of backends, with ours."""
    module = importlib.import_module("diffusers.models.attention_dispatch")
    with register_diffusers():
        yield module


def native(dispatch):
    return dispatch._AttentionBackendRegistry._backends[dispatch.AttentionBackendName.NATIVE]


# --- Models --------------------------------------------------------------------------------------


def flux():
    from diffusers import FluxTransformer2DModel

    sizes = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2}
    widths = {"joint_attention_dim": 32, "pooled_projection_dim": 32, "axes_dims_rope": (4, 4, 8)}
    model = FluxTransformer2DModel(patch_size=1, in_channels=4, **sizes, **widths)
    given = {"hidden_states": torch.randn(2, 16, 4), "encoder_hidden_states": torch.randn(2, 9, 32)}
    given |= {"pooled_projections": torch.randn(2, 32), "timestep": torch.rand(2)}
    return model, given | {"img_ids": torch.randn(16, 3), "txt_ids": torch.randn(9, 3)}, 2


def wan():
    from diffusers import WanTransformer3DModel

    sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2, "ffn_dim": 32, "freq_dim": 256}
    model = WanTransformer3DModel(in_channels=4, out_channels=4, text_dim=16, rope_max_seq_len=32, **sizes)
    given = {"hidden_states": torch.randn(1, 4, 2, 8, 8), "encoder_hidden_states": torch.randn(1, 9, 16)}
    return model, given | {"timestep": torch.tensor([7])}, 4  # to itself and to the text


def qwen_image():
    """With a mask of the text."""
    from diffusers import QwenImageTransformer2DModel

    sizes = {"num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 3, "joint_attention_dim": 16}
    model = QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, axes_dims_rope=(8, 4, 4), guidance_embeds=False, **sizes
    )
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[1, 4:] = False
    given = {"hidden_states": torch.randn(2, 16, 16), "encoder_hidden_states": torch.randn(2, 7, 16)}
    given |= {"encoder_hidden_states_mask": mask, "timestep": torch.rand(2), "img_shapes": [[(1, 4, 4)]] * 2}
    return model, given, 2


@pytest.mark.parametrize("kind", [flux, wan, qwen_image])
@pytest.mark.parametrize("by", ["model", "context"])
def test_models(dispatch, kind, by):
    """Results and gradients are those of "native", and each call of attention is ours."""
    model, given, count = kind()
    ours = copy.deepcopy(model)

    def step(model):
        out = model(**given, return_dict=False)[0]
        return out, *torch.autograd.grad(out.square().sum(), list(model.parameters()), allow_unused=True)

    expected = step(model)
    assert not sdpa_stats()
    if by == "model":
        ours.set_attention_backend("mfa")
        found = step(ours)
        ours.reset_attention_backend()
        dispatch._AttentionBackendRegistry.set_active_backend(dispatch.AttentionBackendName.NATIVE)
    else:
        with dispatch.attention_backend("mfa"):
            found = step(ours)
    assert sdpa_stats(reset=True) == {"replaced": count}
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    step(ours)
    assert not sdpa_stats()


@pytest.mark.skipif(not FULL, reason="a whole model takes the compiler 10 s: MFA_TEST_FULL")
def test_compiled_model(dispatch):
    model, given, _ = wan()
    with torch.no_grad():
        expected = model(**given).sample
        model.set_attention_backend("mfa")
        found = torch.compile(model, backend="aot_eager", fullgraph=True)(**given).sample
    model.reset_attention_backend()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


# --- Arguments -----------------------------------------------------------------------------------


def tensors(kv_heads=H, dtype=torch.float32):
    return [torch.randn(B, n, heads, D).to(dtype) for n, heads in ((L, H), (S, kv_heads), (S, kv_heads))]


ARGUMENTS = {
    "plain": {},
    "causal": {"is_causal": True},
    "scale": {"scale": 0.3},
    "grouped": {"enable_gqa": True},
    "padding": {"attn_mask": torch.arange(S) < torch.tensor([[S], [7]])},
    "additive padding": {"attn_mask": torch.randn(B, S)},
    "mask": {"attn_mask": torch.rand(L, S) < 0.7},
    "bias": {"attn_mask": torch.randn(B, H, L, S)},
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_arguments(dispatch, case):
    given = tensors(kv_heads=2 if case == "grouped" else H)
    with dispatch.attention_backend("mfa"):
        found = dispatch.dispatch_attention_fn(*given, **ARGUMENTS[case])
    assert sdpa_stats(reset=True) == {"replaced": 1}
    torch.testing.assert_close(found, dispatch.dispatch_attention_fn(*given, **ARGUMENTS[case]))
    assert not sdpa_stats()


def test_compiled(dispatch):
    given, mask, operators = tensors(), ARGUMENTS["padding"]["attn_mask"], []

    def backend(graph, _):
        operators.extend(str(node.target) for node in graph.graph.nodes if "attention" in str(node.target))
        return graph.forward

    def run(*given):
        return dispatch.dispatch_attention_fn(*given, mask, backend=dispatch.AttentionBackendName("mfa"))

    torch._dynamo.reset()
    compiled = torch.compile(run, backend=aot_autograd(fw_compiler=backend), fullgraph=True)
    torch.testing.assert_close(compiled(*given), run(*given))
    assert operators == ["mfa.attention_forward.default"]


def test_lse():
    query, key, value = tensors()
    out, lse = diffusers_attention(query, key, value, return_lse=True)
    expected = flash_attention(*(t.transpose(1, 2) for t in (query, key, value)), return_lse=True)
    assert out.shape == (B, L, H, D) and lse.shape == (B, L, H)
    torch.testing.assert_close((out, lse), tuple(t.transpose(1, 2) for t in expected))


def test_dropout():
    torch.manual_seed(3)
    found = diffusers_attention(*tensors(), dropout_p=0.5)
    assert found.shape == (B, L, H, D) and not torch.equal(found, diffusers_attention(*tensors(), dropout_p=0.5))


def test_unsupported_goes_to_native(dispatch):
    given = [torch.randn(1, 9, 1, 520) for _ in range(3)]
    mask = torch.rand(9, 9) < 0.9
    found = diffusers_attention(*given, attn_mask=mask, scale=0.1)
    (reason,) = sdpa_stats()
    assert "520" in reason and torch.equal(found, native(dispatch)(*given, attn_mask=mask, scale=0.1))
    with pytest.raises(Unsupported, match="520"):
        diffusers_attention(*given, return_lse=True)


# --- Context parallelism -------------------------------------------------------------------------


class Context:
    """What autograd gives a function."""

    def save_for_backward(self, *saved):
        self.saved_tensors = saved


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ring(dtype):
    """Two parts of the keys, merged and differentiated as diffusers does it."""
    query, key, value = leaves = [t.requires_grad_() for t in tensors(dtype=dtype)]
    parts = list(zip(key.detach().split([17, 14], 1), value.detach().split([17, 14], 1), strict=True))
    context = Context()
    outs = [
        parallel_forward(context, query.detach(), *part, return_lse=True, _save_ctx=not n)
        for n, part in enumerate(parts)
    ]
    lse = torch.stack([lse for _, lse in outs]).logsumexp(0)
    merged = sum(out.float() * (part - lse).exp()[..., None] for out, part in outs).to(dtype)
    expected = diffusers_attention(query, key, value)
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype is torch.float32 else {"rtol": 3e-2, "atol": 3e-2}
    torch.testing.assert_close(merged, expected, **tolerance)
    d_out = torch.randn_like(merged)
    found = [parallel_backward(context, d_out, key=k, value=v, out=merged, lse=lse) for k, v in parts]
    of_query, of_key, of_value = zip(*found, strict=True)
    found = sum(of_query), torch.cat(of_key, 1), torch.cat(of_value, 1)
    torch.testing.assert_close(found, torch.autograd.grad(expected, leaves, d_out), **tolerance)


def test_what_is_refused_in_parallel():
    config = SimpleNamespace(context_parallel_config=SimpleNamespace(ring_degree=2, ulysses_degree=1))
    with pytest.raises(ValueError, match=r"^dropout_p is 0.1; in context parallelism it must be 0"):
        diffusers_attention(*tensors(), dropout_p=0.1, _parallel_config=config)
    with pytest.raises(ValueError, match=r"^attn_mask is given in ring attention"):
        diffusers_attention(*tensors(), attn_mask=torch.ones(B, S).bool(), _parallel_config=config)


def _in_parallel(rank, port):
    """Forward and backward in one of two processes, each of which has half of the rows: what its results and gradients
    are, and what they have to be. diffusers sets this up by itself for models on a GPU."""
    import torch.distributed as dist
    from diffusers import ContextParallelConfig, ParallelConfig
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    register_diffusers()
    results = {}
    for degrees in ({"ring_degree": 2}, {"ulysses_degree": 2}):
        context = ContextParallelConfig(**degrees)
        config = ParallelConfig(context_parallel_config=context)
        mesh = dist.device_mesh.init_device_mesh("cpu", context.mesh_shape, mesh_dim_names=context.mesh_dim_names)
        config.setup(rank, 2, torch.device("cpu"), mesh=mesh)
        torch.manual_seed(1)
        whole, d_out = [torch.randn(B, 34, H, D, requires_grad=True) for _ in range(3)], torch.randn(B, 34, H, D)
        expected = diffusers_attention(*whole)
        expected = expected, *torch.autograd.grad(expected, whole, d_out)
        half = [t.detach().chunk(2, 1)[rank].requires_grad_() for t in whole]
        sdpa_stats(reset=True)
        out = dispatch_attention_fn(*half, scale=D**-0.5, backend="mfa", parallel_config=config)
        found = out, *torch.autograd.grad(out, half, d_out.chunk(2, 1)[rank])
        pairs = [(one.detach(), other.detach().chunk(2, 1)[rank]) for one, other in zip(found, expected, strict=True)]
        results[str(degrees)] = pairs, sdpa_stats()
    dist.destroy_process_group()
    return results


@pytest.mark.skipif(not FULL, reason="two processes that import diffusers take 20 s: MFA_TEST_FULL")
def test_two_processes():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with torch.multiprocessing.get_context("spawn").Pool(2) as pool:
        ranks = pool.starmap(_in_parallel, [(rank, port) for rank in range(2)])
    for results in ranks:
        assert len(results) == 2
        for pairs, counts in results.values():
            assert counts == {"replaced": 1}
            for found, expected in pairs:
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


# --- On and off ----------------------------------------------------------------------------------


def test_on_and_off():
    module = importlib.import_module("diffusers.models.attention_dispatch")
    registry, names = module._AttentionBackendRegistry, module.AttentionBackendName
    before, members = registry.list_backends(), list(names)
    tables = [dict(t) for t in (registry._backends, registry._constraints, registry._supported_arg_names)]
    parallel = set(registry._supports_context_parallel)
    handle, again = register_diffusers("ours"), register_diffusers("ours")
    assert registry.list_backends() == [*before, names("ours")] and list(names)[-1] is names("ours") is names.OURS
    model, given, _ = wan()
    model.set_attention_backend("ours")
    assert registry.get_active_backend() == (names.OURS, diffusers_attention)
    with pytest.raises(ValueError, match=r'^name is "native"; it must not be that of another'):
        register_diffusers("native")
    with pytest.raises(ValueError, match=r'^name is "Ours"; it must have no capital letters'):
        register_diffusers("Ours")
    model.reset_attention_backend()
    handle.remove()
    assert names("ours") in registry.list_backends()
    again.remove()
    assert registry.get_active_backend()[0] is names.NATIVE
    assert registry.list_backends() == before and list(names) == members and not hasattr(names, "OURS")
    assert tables == [registry._backends, registry._constraints, registry._supported_arg_names]
    assert parallel == registry._supports_context_parallel
    model(**given)
    assert not sdpa_stats()
    with pytest.raises(ValueError, match="ours"):
        names("ours")


def test_the_active_backend_is_never_one_that_has_gone():
    module = importlib.import_module("diffusers.models.attention_dispatch")
    registry, names = module._AttentionBackendRegistry, module.AttentionBackendName
    with register_diffusers("second"):
        first = register_diffusers("first")
        registry.set_active_backend(names("first"))
        with register_diffusers("third"):
            registry.set_active_backend(names("third"))
            first.remove()
        assert registry.get_active_backend()[0] is names.NATIVE


def test_old_diffusers(monkeypatch):
    module = importlib.import_module("diffusers.models.attention_dispatch")
    monkeypatch.delattr(module._AttentionBackendRegistry, "set_active_backend")
    with pytest.raises(ImportError, match=r"^diffusers .* has no such attention backends; 0.37 or later is needed"):
        register_diffusers()
