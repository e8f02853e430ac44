"""flash_attention_varlen and flash_attention_kvcache on calls that hypothesis draws from all their options together,
against attention written out, with gradients where these exist."""

import pytest
import torch
from hypothesis import given, note, settings
from hypothesis import strategies as st

from mps_flash_attn import flash_attention_kvcache, flash_attention_varlen, quantize_kv, reference
from mps_flash_attn import run as passes
from mps_flash_attn.codes import FLOATS, PACKED
from mps_flash_attn.lengths import blocks_of
from mps_flash_attn.library import KV_TYPES
from mps_flash_attn.options import Options
from mps_flash_attn.problem import Inputs, Operands
from mps_flash_attn.quantize import encode
from sequences import cumulative, integers
from stand_in import DTYPES, FULL, ON_METAL

pytestmark = [pytest.mark.usefixtures("one_thread")]
DRAWS = 250 * (4 if FULL else 1)
KINDS = ("packed", "packed", "padded", "index", "pages", "packed pages")


def quantised(draw, numbers):
    """(codes, scale, type) of (entries, heads, rows, columns) numbers; or these, without scales."""
    width = numbers.shape[3]
    kind = draw(st.sampled_from((None, *(kind for kind in KV_TYPES if kind not in PACKED or width % 32 == 0))))
    if kind is None:
        return numbers, None, None
    how = draw(st.sampled_from(("own", "own", "head", "entry", "one", *(("none",) if kind in FLOATS else ()))))
    group = draw(st.sampled_from((0, 0, 32, width // 2, 1)))
    unit = 32 if kind in PACKED else 1
    codes, scale = quantize_kv(numbers, kind, group if group % unit == 0 and width % (group or 1) == 0 else 0)
    if how == "head":
        scale = scale.abs().amax((0, 2), keepdim=True)
    elif how == "entry":
        scale = scale.abs().amax((1, 2, 3), keepdim=True).expand(-1, -1, draw(st.sampled_from((1, scale.shape[2]))), -1)
    elif how == "one":
        scale = torch.tensor(0.05 if kind == "int8" else 0.3)
    elif how == "none":
        codes, scale = encode(numbers, None, kind), None
    if draw(st.booleans()):
        codes = codes.transpose(1, 2).contiguous().transpose(1, 2)
    if kind in FLOATS and draw(st.booleans()):
        codes = codes.view(torch.uint8)
    return codes, scale, kind


@st.composite
def calls(draw, has_codes=False, dtypes=DTYPES):
    """(kind, the Inputs, their Options, the keywords of both functions that mean them)."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    kind, batch = draw(st.sampled_from(KINDS)), draw(st.integers(1, 4))
    kv_heads, group = (draw(st.sampled_from((1, 2, 3))) for _ in range(2))
    head_dim, value_dim = (draw(st.sampled_from((32, 64, 24) if has_codes else (8, 3, 16, 40))) for _ in range(2))
    dtype, heads = draw(st.sampled_from(dtypes)), kv_heads * group
    length = st.sampled_from((0, 1, 2, 7, 33, 64, 130))
    q_lens, kv_lens = ([draw(length) for _ in range(batch)] for _ in range(2))
    q_len, kv_len = (
        max(q_lens) + draw(st.sampled_from((0, 0, 50))),
        max(*kv_lens, 1) + draw(st.sampled_from((0, 9))),
    )
    page = draw(st.sampled_from((1, 3, 16, 64)))
    pages = -(-kv_len // page)
    lengths, entries, rows, q_entries, q_rows = {}, batch, kv_len, batch, q_len
    if "packed" in kind:
        starts = cumulative(q_lens, draw(st.sampled_from((0, 3))))
        lengths["cu_seqlens_q"] = starts
        q_entries, q_rows = 1, int(starts[-1]) + draw(st.sampled_from((0, 4)))
    if kind == "packed":
        lengths["cu_seqlens_k"] = starts = cumulative(kv_lens, draw(st.sampled_from((0, 3))))
        entries, rows = 1, int(starts[-1]) + draw(st.sampled_from((0, 4)))
    if kind == "index":
        entries = batch + 2
        lengths["cache_batch_idx"] = torch.randint(entries, (batch,)).int()
    if "pages" in kind:
        entries, rows, kv_len = batch * pages + 1, page, pages * page
        lengths["block_table"] = torch.randint(entries, (batch, pages)).int()
    most = kv_lens if kind == "packed" else [kv_len] * batch
    used = most
    if kind in ("padded", "pages", "packed pages") or draw(st.booleans()):
        used = [draw(st.integers(0, n)) for n in most]
        lengths["seqused_k"] = integers(used)
    if draw(st.booleans()):
        lengths["leftpad_k"] = integers([draw(st.integers(0, n)) for n in used])

    def tensor(first, heads, rows, columns):
        if draw(st.booleans()):
            return torch.randn(first, rows, heads, columns).to(dtype).transpose(1, 2)
        return torch.randn(first, heads, rows, columns).to(dtype)

    query, key = tensor(q_entries, heads, q_rows, head_dim), tensor(entries, kv_heads, rows, head_dim)
    value = tensor(entries, kv_heads, rows, value_dim)
    sinks = torch.randn(batch, heads) if draw(st.booleans()) else None
    if sinks is not None and draw(st.booleans()):
        sinks[..., 0] = draw(st.sampled_from((-torch.inf, 0.0, 30.0)))
    mask, mask_kind = None, draw(st.sampled_from(("none", "bool", "float", "none")))
    if mask_kind != "none":
        shape = draw(st.sampled_from(((q_len, kv_len), (batch, 1, 1, kv_len), (heads, q_len, 1))))
        mask = torch.rand(shape) < 0.6 if mask_kind == "bool" else torch.randn(shape)
    slopes = torch.rand(batch, heads) if draw(st.booleans()) else None
    left, right = (draw(st.sampled_from((-1, 0, 5))) for _ in range(2))
    aligned = draw(st.sampled_from((False, "top_left", "bottom_right")))
    softcap = draw(st.sampled_from((0.0, 0.0, 4.0)))
    keywords = {"is_causal": aligned, "window_size": (left, right), "softcap": softcap}
    right = 0 if aligned else right
    seed, dropout = None, draw(st.sampled_from((0.0, 0.0, 0.1, 0.5, 1.0)))
    if dropout:
        seed = torch.tensor(draw(st.integers(-(2**63), 2**63 - 1)))
        keywords |= {"dropout_p": dropout, "dropout_seed": seed}
        seed = seed.expand(batch)
    blocks, size = None, (0, 0)
    if draw(st.sampled_from((False, False, True))):
        size = draw(st.sampled_from(((16, 16), (16, 48), (32, 16), (128, 64))))
        blocks = torch.rand(blocks_of((batch, heads, q_len, kv_len), size)) < 0.6
        keywords |= {"block_size": size}
    (key, k_scale, k_type), (value, v_scale, v_type) = ((one, None, None) for one in (key, value))
    if has_codes:
        (key, k_scale, k_type), (value, v_scale, v_type) = (quantised(draw, one) for one in (key, value))
    lengths |= {"k_scale": k_scale, "v_scale": v_scale}
    inputs = Inputs(query, key, value, mask, sinks, slopes, seed, blocks, **lengths)
    band = (None if left < 0 else -left), (None if right < 0 else right)
    max_q = q_len if "packed" in kind else None
    max_kv = kv_len if kind == "packed" or "pages" in kind else None
    types = k_type, v_type
    options = Options(*band, None, softcap, dropout, *size, aligned != "top_left", max_q, max_kv, *types)
    return kind, inputs, options, keywords


def run(kind, inputs, options, keywords):
    """(out, lse) by the function that such a call is for."""
    keywords = keywords | {"attn_mask": inputs.attn_mask, "sinks": inputs.sinks, "alibi_slopes": inputs.alibi_slopes}
    keywords |= {"block_mask": inputs.block_mask, "enable_gqa": True, "return_lse": True}
    lengths = {name: getattr(inputs, name) for name in ("seqused_k", "leftpad_k", "block_table")}
    query, key, value = inputs[:3]
    scales = [inputs.k_scale, inputs.v_scale]
    keywords |= {"k_type": options.k_type, "v_type": options.v_type, "k_scale": scales[0], "v_scale": scales[1]}
    if "packed" not in kind:
        lengths["cache_batch_idx"] = inputs.cache_batch_idx
        return flash_attention_kvcache(query, key, value, **lengths, **keywords)
    if kind == "packed":
        key, value = key[0], value[0]
        scales = [scale if scale is None or scale.dim() == 0 else scale[0] for scale in scales]
    tensors = query[0].transpose(0, 1), key.transpose(-3, -2), value.transpose(-3, -2)
    most = inputs.cu_seqlens_q, inputs.cu_seqlens_k, options.max_q, options.max_kv
    scales = [scale if scale is None or scale.dim() == 0 else scale.transpose(-3, -2) for scale in scales]
    keywords |= {"k_scale": scales[0], "v_scale": scales[1]}
    out, lse = flash_attention_varlen(*tensors, *most, **lengths, **keywords)
    return out.transpose(0, 1)[None], lse[None]


@settings(max_examples=DRAWS // (10 if ON_METAL else 1))
@given(calls())
def test_any_options(call):
    kind, inputs, options, keywords = call
    note(f"{kind} {[t if t is None else (tuple(t.shape), t.dtype) for t in inputs]} {options}")
    note(f"{inputs[8:]}")
    gradients = inputs.cache_batch_idx is None and inputs.block_table is None
    reference.check(lambda *t: run(kind, Inputs(*t), options, keywords), inputs, gradients, **options._asdict())


@settings(max_examples=DRAWS // (20 if ON_METAL else 2))
@given(calls(has_codes=True))
def test_codes(call):
    """Keys and values of any two types, some of them numbers, in every kind of cache."""
    kind, inputs, options, keywords = call
    note(f"{kind} {[t if t is None else (tuple(t.shape), t.dtype, t.stride()) for t in inputs]} {options}")
    note(f"{inputs[8:14]}")
    reference.check(lambda *t: run(kind, Inputs(*t), options, keywords), inputs, False, **options._asdict())


@settings(max_examples=DRAWS // (20 if ON_METAL else 2))
@given(calls(dtypes=(torch.float16, torch.bfloat16)))
def test_out_type(call):
    """Results in float32 are those that are rounded without out_type."""
    kind, inputs, options, _ = call
    note(f"{kind} {[t if t is None else (tuple(t.shape), t.dtype, t.stride()) for t in inputs]} {options}")
    wide = options._replace(out_type="f32")
    found, rounded = passes.forward(inputs, wide), passes.forward(inputs, options)
    assert found[0].dtype is torch.float32
    if inputs.cache_batch_idx is None and inputs.block_table is None:
        (out, lse), d_out = rounded, torch.randn_like(rounded[0])
        mask = inputs.attn_mask
        wanted = (True, True, True, mask is not None and mask.dtype is not torch.bool, inputs.sinks is not None)
        found += passes.backward(Operands(inputs, out.float(), lse, d_out, None), wide, wanted)
        rounded += passes.backward(Operands(inputs, out, lse, d_out, None), options, wanted)
    for got, right in zip(found, rounded, strict=True):
        assert (got is None) == (right is None)
        assert got is None or torch.equal(got.to(right.dtype), right)
