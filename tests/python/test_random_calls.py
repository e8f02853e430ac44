"""flash_attention on calls that hypothesis draws from all its options together, against attention written out."""

import pytest
import torch
from hypothesis import given, note, settings
from hypothesis import strategies as st

from mps_flash_attn import flash_attention, reference
from mps_flash_attn.arguments import block_map_shape
from mps_flash_attn.options import Options
from mps_flash_attn.problem import Inputs
from stand_in import DTYPES, FULL, ON_METAL

DRAWS = (25 if ON_METAL else 300) * (4 if FULL else 1)


@st.composite
def calls(draw):
    """(the Inputs, their Options, the keywords of flash_attention that mean them)."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    kv_heads, group, batch = (draw(st.sampled_from((1, 2, 3))) for _ in range(3))
    q_len, kv_len = (draw(st.sampled_from((1, 2, 7, 33, 64, 130, 0))) for _ in range(2))
    head_dim, value_dim = (draw(st.sampled_from((8, 3, 16, 40))) for _ in range(2))
    dtype = draw(st.sampled_from(DTYPES))
    heads = kv_heads * group

    def tensor(heads, length, columns):
        if draw(st.booleans()):
            return torch.randn(batch, length, heads, columns).to(dtype).transpose(1, 2)
        return torch.randn(batch, heads, length, columns).to(dtype)

    query, key = tensor(heads, q_len, head_dim), tensor(kv_heads, kv_len, head_dim)
    value = tensor(kv_heads, kv_len, value_dim)
    sinks = None
    if draw(st.booleans()):
        sinks = 2 * torch.randn(draw(st.sampled_from(((heads,), (batch, heads)))))
        sinks = sinks.to(draw(st.sampled_from([torch.float32] + [dtype] * (dtype is not torch.float64))))
        if draw(st.booleans()):
            sinks[..., 0] = draw(st.sampled_from((-torch.inf, 0.0, 30.0)))
    mask, kind = None, draw(st.sampled_from(("none", "bool", "float", "none")))
    if kind != "none":
        shape = draw(st.sampled_from(((q_len, kv_len), (batch, 1, 1, kv_len), (heads, q_len, 1))))
        mask = torch.rand(shape) < 0.6 if kind == "bool" else torch.randn(shape)
    slopes = torch.rand(batch, heads) if draw(st.booleans()) else None
    left, right = (draw(st.sampled_from((-1, 0, 5))) for _ in range(2))
    softcap = draw(st.sampled_from((0.0, 0.0, 4.0)))
    keywords = {"window_size": (left, right), "softcap": softcap, "enable_gqa": True, "return_lse": True}
    seed, dropout = None, draw(st.sampled_from((0.0, 0.0, 0.1, 0.5, 0.9, 1.0)))
    if dropout:
        seed = torch.tensor(draw(st.integers(-(2**63), 2**63 - 1)))
        keywords |= {"dropout_p": dropout, "dropout_seed": seed}
        seed = seed.expand(batch)
    lower, upper = (None if side < 0 else kv_len - q_len + side for side in (left, right))
    lower = lower if lower is None else kv_len - q_len - left
    blocks, size = None, (0, 0)
    if draw(st.sampled_from((False, False, True))):
        size = draw(st.sampled_from(((16, 16), (16, 48), (32, 16), (128, 64))))
        blocks = torch.rand(batch, heads, *block_map_shape(query.shape, key.shape, size)[2:]) < 0.6
        keywords |= {"block_size": size}
    inputs = Inputs(query, key, value, mask, sinks, slopes, seed, blocks)
    return inputs, Options(lower, upper, None, softcap, dropout, *size), keywords


@pytest.mark.usefixtures("one_thread")
@settings(max_examples=DRAWS)
@given(calls())
def test_any_options(call):
    inputs, options, keywords = call
    note(f"{[t if t is None else (tuple(t.shape), t.dtype) for t in inputs]} {options}")

    def ours(query, key, value, mask, sinks, slopes, seed, blocks, *_):
        options = {"attn_mask": mask, "sinks": sinks, "alibi_slopes": slopes, "block_mask": blocks, **keywords}
        return flash_attention(query, key, value, **options)

    reference.check(ours, inputs, **options._asdict())
