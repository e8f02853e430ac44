"""The kernels of CUDA, which are PyTorch's operators, replaced by stand-ins on the CPU that take the arguments of their
schemas and compute what these mean. So the arguments, layouts and bands are tested, and not the operators."""

import pytest
import torch

import cases
import pool
from mps_flash_attn import Unsupported
from mps_flash_attn.distributed import cuda, local_step
from mps_flash_attn.options import Options
from mps_flash_attn.problem import Inputs


def visible(q_len, kv_len, left, right):
    """From the last query and the last key; -1: no limit."""
    offset = torch.arange(kv_len) - torch.arange(q_len)[:, None] - (kv_len - q_len)
    seen = torch.ones_like(offset, dtype=torch.bool)
    seen = seen if left < 0 else seen & (offset >= -left)
    return seen if right < 0 else seen & (offset <= right)


def scores_of(query, key, seen, scale):
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return (query.float() @ key.float().mT * scale).masked_fill(~seen, -torch.inf)


def forward(query, key, value, seen, scale):
    scores, group = scores_of(query, key, seen, scale), query.shape[1] // key.shape[1]
    out = scores.softmax(-1) @ value.float().repeat_interleave(group, 1)
    return out.to(query.dtype), scores.logsumexp(-1)


def backward(d_out, query, key, value, out, lse, seen, scale):
    """Of the out and lse of all keys."""
    group = query.shape[1] // key.shape[1]
    weights = (scores_of(query, key, seen, scale) - lse[..., None]).exp()
    d_out, wide = d_out.float(), value.float().repeat_interleave(group, 1)
    rows = (d_out * out.float()).sum(-1, keepdim=True)
    d_scores = weights * (d_out @ wide.mT - rows) * (query.shape[-1] ** -0.5 if scale is None else scale)
    dq = d_scores @ key.float().repeat_interleave(group, 1)
    dk, dv = (one.unflatten(1, (-1, group)).sum(2) for one in (d_scores.mT @ query.float(), weights.mT @ d_out))
    return tuple(one.to(query.dtype) for one in (dq, dk, dv))


class StandIn:
    """In place of torch.ops.aten."""

    def __getattr__(self, name):
        schema = getattr(torch.ops.aten, name).default._schema

        def call(*arguments, **keywords):
            positional = [one.name for one in schema.arguments if not one.kwarg_only]
            assert len(arguments) <= len(positional)
            given = dict(zip(positional, arguments)) | keywords  # noqa: B905
            assert set(given) <= {one.name for one in schema.arguments}
            needed = {one.name for one in schema.arguments if not one.has_default_value()}
            assert needed <= set(given), (name, needed - set(given))
            return getattr(self, f"run{name}")(**given)

        return call

    def run_flash_attention_forward(self, query, key, value, max_q, max_k, is_causal, scale, **given):
        assert given.pop("dropout_p") == 0 and not given.pop("return_debug_mask")
        left, right = given.pop("window_size_left"), given.pop("window_size_right")
        assert given == {"cum_seq_q": None, "cum_seq_k": None}
        assert (max_q, max_k) == (query.shape[1], key.shape[1]) and is_causal == (left == -1 and right == 0)
        heads = [one.transpose(1, 2) for one in (query, key, value)]
        out, lse = forward(*heads, visible(max_q, max_k, left, right), scale)
        return out.transpose(1, 2), lse, None, None, None

    def run_flash_attention_backward(self, grad_out, query, key, value, out, logsumexp, max_q, max_k, scale, **given):
        assert given["dropout_p"] == 0 and logsumexp.is_contiguous() and out.dtype == query.dtype
        seen = visible(max_q, max_k, given["window_size_left"], given["window_size_right"])
        heads = (one.transpose(1, 2) for one in (grad_out, query, key, value, out))
        return tuple(one.transpose(1, 2) for one in backward(*heads, logsumexp, seen, scale))

    def run_scaled_dot_product_cudnn_attention(self, query, key, value, attn_bias, is_causal, scale, **given):
        assert attn_bias is None and given["compute_log_sumexp"] and given["dropout_p"] == 0
        seen = visible(query.shape[2], query.shape[2], -1, 0) if is_causal else torch.tensor(True)
        out, lse = forward(query, key, value, seen, scale)
        return out, lse[..., None]

    def run_scaled_dot_product_cudnn_attention_backward(
        self, grad_out, query, key, value, out, logsumexp, attn_bias, max_q, max_k, is_causal, scale, **given
    ):
        assert attn_bias is None and given["dropout_p"] == 0 and (max_q, max_k) == (query.shape[2], key.shape[2])
        seen = visible(max_q, max_q, -1, 0) if is_causal else torch.tensor(True)
        return backward(grad_out, query, key, value, out, logsumexp[..., 0], seen, scale)


def replaced(size, flash, case):
    choose, operators, enabled = local_step.choose, cuda._aten, torch.backends.cuda.flash_sdp_enabled
    local_step.choose, cuda._aten = cuda.choose, StandIn()
    torch.backends.cuda.flash_sdp_enabled = lambda: flash
    try:
        return cases.compare(size, with_lse=False, **case)
    finally:
        local_step.choose, cuda._aten, torch.backends.cuda.flash_sdp_enabled = choose, operators, enabled


CASES = {
    "causal": {"is_causal": True},
    "full": {"scale": 0.3},
    "documents": {"is_causal": True, "documents": (5, 20)},
    "sinks": {"is_causal": True, "sinks": (4,)},
    "all_to_all": {"is_causal": True, "method": "all_to_all"},
}
WINDOWS = {
    "window": {"window_size": 9},
    "both sides": {"window_size": (3, 7)},
    "keys after": {"window_size": (0, -1)},
}


@pytest.mark.parametrize("layout", ["zigzag", "uneven"])
@pytest.mark.parametrize(
    "flash, case",
    [(True, case) for case in (CASES | WINDOWS).items()] + [(False, case) for case in CASES.items()],
    ids=lambda one: one[0] if isinstance(one, tuple) else "flash" if one else "cudnn",
)
def test_operators(layout, flash, case):
    case = {"layout": layout, "dtype": torch.bfloat16, **case[1]}
    for errors in pool.shared().run(pool.RANKS[3], replaced, 3, flash, case):
        for name, (found, of_one) in errors.items():
            assert found <= 2 * of_one + 1e-3, (name, errors)  # parts are rounded before they are added


@pytest.mark.parametrize(
    "change, options, flash, sentence",
    [
        ({"dtype": torch.float32}, {}, True, "query, key and value are float32, float32, float32; on CUDA all must be"),
        ({"mask": True}, {}, True, "attn_mask is given; on CUDA there are"),
        ({}, {"softcap": 2.0}, True, "softcap is 2.0; on CUDA it must be 0"),
        ({"head_dim": 20}, {}, True, "the head_dim of query and key is 20 and that of value 20; on CUDA both must be"),
        ({}, {"lower": -3, "upper": 0}, False, "cuDNN's attention has no windows here; enable flash attention"),
        ({}, {"upper": 2}, False, "cuDNN's attention has no windows here"),
        ({}, {}, None, "neither flash attention nor cuDNN's is enabled"),
    ],
    ids=str,
)
def test_what_cuda_has_not(change, options, flash, sentence, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda, "flash_sdp_enabled", lambda: flash is True)
    monkeypatch.setattr(torch.backends.cuda, "cudnn_sdp_enabled", lambda: flash is False)
    shape, dtype = (1, 2, 8, change.get("head_dim", 16)), change.get("dtype", torch.bfloat16)
    mask = torch.ones(8, 8) if "mask" in change else None
    with pytest.raises(Unsupported) as caught:
        cuda.choose(Inputs(*(torch.empty(shape, dtype=dtype) for _ in range(3)), mask), Options(**options))
    assert sentence in str(caught.value)


def lse_gradient(size):
    choose, operators = local_step.choose, cuda._aten
    local_step.choose, cuda._aten = cuda.choose, StandIn()
    try:
        with pytest.raises(NotImplementedError, match="lse has no gradient on cpu"):
            cases.compare(size, dtype=torch.bfloat16)
    finally:
        local_step.choose, cuda._aten = choose, operators


def test_gradient_of_lse():
    pool.shared().run(pool.RANKS[2], lse_gradient, 2)
