"""flash_attn_with_kvcache: flash-attention's own grid of caches, and what is appended, rotated and refused."""

import numpy as np
import pytest
import torch

import sequences
from mps_flash_attn import Unsupported, append_kv, quantize_kv
from mps_flash_attn.flash_attn import apply_rotary_emb, flash_attn_func, flash_attn_with_kvcache
from sequences import integers

pytestmark = [pytest.mark.usefixtures("one_thread")]

# Of flash-attention's tests/test_flash_attn.py.
LENGTHS = [(1, 128), (1, 339), (3, 1024), (64, 800), (64, 256), (3, 799), (64, 2048), (16, 1000), (128, 128)]
HEAD_DIMS = [64, 59, 128]


def rotated(x, cos, sin, positions, interleaved):
    """x (B, L, H, D) by the definition: columns a and b become a cos - b sin and a sin + b cos."""
    out, count = x.double().clone(), cos.shape[1]
    for n in range(count):
        a, b = (2 * n, 2 * n + 1) if interleaved else (n, n + count)
        c, s = (one[positions, n].double()[:, :, None] for one in (cos, sin))
        first, second = x[..., a].double(), x[..., b].double()
        out[..., a], out[..., b] = first * c - second * s, first * s + second * c
    return out.to(x.dtype)


def written_out(q, k, v, lengths, leftpad, causal, window, slopes, dtype):
    """Attention of q with the first lengths[b] keys, but for leftpad[b], in `dtype`."""
    L, S, group = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    query, key, value = (x.transpose(1, 2).to(dtype) for x in (q, k, v))
    key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
    scores = query @ key.mT / q.shape[3] ** 0.5
    ends, starts = lengths[:, None, None, None], leftpad[:, None, None, None]
    column, row = torch.arange(S), torch.arange(L)[:, None]
    distance = column - row - (ends - L)
    hidden = (column >= ends) | (column < starts)
    left, right = window[0], 0 if causal else window[1]
    hidden = hidden | ((distance > right) & (right >= 0)) | ((distance < -left) & (left >= 0))
    if slopes is not None:
        scores = scores - slopes[..., None, None].to(dtype) * distance.abs().to(dtype)
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1).masked_fill(hidden.all(-1, keepdim=True), 0)
    return (weights @ value).transpose(1, 2)


def cases():
    n = 0
    for q_len, kv_len in LENGTHS:
        for band in ("all", "causal", "local"):
            for how in ("dense", "index", "pages", "leftpad"):
                yield n, q_len, kv_len, band, how
                n += 1


@pytest.mark.parametrize("n, q_len, kv_len, band, how", list(cases()))
def test_as_flash_attention_is_tested(n, q_len, kv_len, band, how):
    """The caches are those that copying gives, and out is at most three times as far from the truth as attention
    written out in the same dtype."""
    torch.manual_seed(n)
    dtype, head_dim, batch, heads = (torch.float16, torch.bfloat16)[n % 2], HEAD_DIMS[n % 3], 2, 6
    kv_heads, new = (6, 3, 1)[n // 2 % 3], (0, 1, q_len)[n // 3 % 3]
    causal, window = band == "causal", (-1, -1)
    if band == "local":
        window = tuple(torch.randint(0, kv_len, (2,)).tolist())
    slopes = torch.rand(batch, heads) * 0.3 if n % 5 == 2 else None
    interleaved, rotary = n % 4 < 2, (0, 16, 32)[n // 2 % 3] if new else 0
    q = torch.randn(batch, q_len, heads, head_dim).to(dtype)
    k, v = (torch.randn(batch, new, kv_heads, head_dim).to(dtype) for _ in range(2))
    lengths = torch.randint(0, kv_len - new + 1, (batch,)).int()
    options = {"causal": causal, "window_size": window, "alibi_slopes": slopes, "rotary_interleaved": interleaved}
    leftpad = torch.zeros_like(lengths)
    if how == "leftpad":
        leftpad = (torch.rand(batch) * (lengths + new)).int()
        options["cache_leftpad"] = leftpad
    k_cache, v_cache = (torch.randn(batch, kv_len, kv_heads, head_dim).to(dtype) for _ in range(2))
    given = k_cache.clone(), v_cache.clone()
    if how == "index":
        given = tuple(torch.randn(5, *t.shape[1:]).to(dtype) for t in given)
        options["cache_batch_idx"] = index = integers([3, 1])
        for whole, part in zip(given, (k_cache, v_cache), strict=True):
            whole[index.long()] = part
    if how == "pages":
        page = (256, 16, 7)[n // 4 % 3]
        *pages, options["block_table"] = sequences.paged(*(t.transpose(1, 2) for t in given), page)
        given = tuple(t.transpose(1, 2).contiguous() for t in pages)
    places = lengths[:, None] + torch.arange(new)
    expected_q, expected_k = q, k
    if rotary:
        angles = torch.rand(4096, rotary // 2) * 6.28
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
        options |= {"rotary_cos": cos, "rotary_sin": sin}
        follows = torch.arange(q_len) if causal or band == "local" else torch.zeros(q_len, dtype=torch.int64)
        expected_q = rotated(q, cos, sin, lengths[:, None] + follows, interleaved)
        expected_k = rotated(k, cos, sin, places, interleaved)
    for b in range(batch):
        k_cache[b, places[b]], v_cache[b, places[b]] = expected_k[b], v[b]
    rows = (k, v) if new else (None, None)
    before = tuple(t.clone() for t in given)
    out, lse = flash_attn_with_kvcache(q, *given, *rows, cache_seqlens=lengths, return_softmax_lse=True, **options)
    assert out.shape == q.shape and lse.shape == (batch, heads, q_len) and lse.dtype == torch.float32
    for found, was, wanted in zip(given, before, (k_cache, v_cache), strict=True):
        if how == "index":
            others = [0, 2, 4]
            assert torch.equal(found[others], was[others])
            found = found[index.long()]
        if how == "pages":
            table = options["block_table"].long()
            assert (found.nan_to_num() != was.nan_to_num()).flatten(1).any(1).sum() <= batch * (new // page + 2)
            found = found[table].flatten(1, 2)[:, :kv_len]
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-2 if rotary else 0, equal_nan=True)
        wanted.copy_(found)  # rotation is computed in another order
    total = lengths + new
    settings = total, leftpad, causal, window, slopes
    truth, plain = (written_out(expected_q, k_cache, v_cache, *settings, one) for one in (torch.float64, dtype))
    error, allowed = (out - truth).abs().max(), 3 * (plain - truth).abs().max()
    assert error <= allowed + 1e-5, f"error {error:.2e}, allowed {allowed:.2e}"


@pytest.mark.parametrize("pages", [False, True], ids=["cache", "pages"])
def test_step_by_step(pages):
    """A prompt and then one token at a time give what the whole sequence gives at once, and the cache is not copied."""
    q, k, v = (torch.randn(2, 40, heads, 16) for heads in (4, 2, 2))
    expected = flash_attn_func(q, k, v, causal=True)
    shape = (11, 8, 2, 16) if pages else (2, 64, 2, 16)
    caches = [torch.zeros(shape), torch.zeros(shape)]
    places = [t.data_ptr() for t in caches]
    options = {"block_table": torch.randperm(11)[:10].view(2, 5).int()} if pages else {}
    found, at = [], 0
    for length in (30, *(1,) * 10):
        part = slice(at, at + length)
        found.append(
            flash_attn_with_kvcache(
                q[:, part], *caches, k[:, part], v[:, part], cache_seqlens=at, causal=True, **options
            )
        )
        at += length
    torch.testing.assert_close(torch.cat(found, 1), expected, rtol=1e-4, atol=1e-5)
    assert places == [t.data_ptr() for t in caches]


def test_compiled():
    q, k, v = (torch.randn(2, 1, heads, 16) for heads in (4, 2, 2))
    caches = [torch.randn(2, 16, 2, 16) for _ in range(2)]
    compiled = torch.compile(flash_attn_with_kvcache, backend="aot_eager", fullgraph=True)
    results = []
    for function in (compiled, flash_attn_with_kvcache):
        own = [t.clone() for t in caches]
        out = function(q, *own, k, v, cache_seqlens=integers([3, 9]), causal=True)
        results.append((out, *own))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_rotary(interleaved, dtype):
    x, angles = torch.randn(2, 5, 3, 12).to(dtype), torch.rand(30, 4)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    offsets = integers([3, 20])
    positions = offsets[:, None] + torch.arange(5)
    expected = rotated(x, cos, sin, positions, interleaved)
    tolerance = {"rtol": 0, "atol": 1e-12 if dtype is torch.float64 else 2e-2}
    found = apply_rotary_emb(x, cos, sin, interleaved, seqlen_offsets=offsets)
    torch.testing.assert_close(found, expected, **tolerance)
    packed, starts = torch.cat([x[0, :2], x[1]]), integers([0, 2, 7])
    of_packed = apply_rotary_emb(packed, cos, sin, interleaved, seqlen_offsets=offsets, cu_seqlens=starts, max_seqlen=5)
    assert torch.equal(of_packed, torch.cat([found[0, :2], found[1]]))
    more = torch.cat([packed[:1], packed, packed[:3]])  # rows of no sequence need no position
    of_more = apply_rotary_emb(more, cos[:25], sin[:25], interleaved, seqlen_offsets=offsets, cu_seqlens=starts + 1)
    assert torch.equal(of_more[1:8], of_packed)
    own = x.clone()
    assert apply_rotary_emb(own, cos, sin, interleaved, True, offsets) is own and torch.equal(own, found)
    if dtype is torch.float64:
        assert torch.autograd.gradcheck(
            lambda x: apply_rotary_emb(x, cos, sin, interleaved, seqlen_offsets=7), x.requires_grad_()
        )
    with pytest.raises(ValueError, match="positions are 28 to 32; cos and sin have those from 0 to 29"):
        apply_rotary_emb(x, cos, sin, seqlen_offsets=28)
    with pytest.raises(ValueError, match=r"at most half of the head_dim, 6"):
        apply_rotary_emb(x[..., :6], cos, sin)


NEW = {"k": torch.randn(2, 3, 2, 16), "v": torch.randn(2, 3, 2, 16)}
TABLE = torch.randn(16, 8)
WRONG = {
    "no lengths": (dict(NEW), "k is given and cache_seqlens None"),
    "k alone": ({"k": NEW["k"], "cache_seqlens": 2}, "k and v, and rotary_cos and rotary_sin, must be given together"),
    "cos alone": ({**NEW, "cache_seqlens": 2, "rotary_cos": TABLE}, "must be given together"),
    "no k": ({"cache_seqlens": 2, "rotary_cos": TABLE, "rotary_sin": TABLE}, "rotary_cos is given and k None"),
    "shape": ({**NEW, "cache_seqlens": 2, "v": NEW["v"][:, :2]}, r"v has the shape \(2, 2, 2, 16\); it must be \(2, 3"),
    "dtype": ({**NEW, "cache_seqlens": 2, "k": NEW["k"].half()}, "q is float32, k float16 and k_cache float32"),
    "text": ({"cache_seqlens": "2"}, "cache_seqlens is '2'; it must be a number, or a tensor of int32"),
    "window of three": (
        {**NEW, "cache_seqlens": 2, "window_size": (1, 0, 2)},
        r"window_size is \(1, 0, 2\); it",
    ),
    "int64": ({"cache_seqlens": torch.tensor([1, 2])}, "cache_seqlens is int64 .* int32 of the shape"),
    "full": ({**NEW, "cache_seqlens": integers([2, 14])}, r"cache_seqlens\[1\] is 14, and 3 keys are appended; .* 16"),
    "negative": ({**NEW, "cache_seqlens": integers([-1, 2])}, r"cache_seqlens\[0\] is -1"),
    "index": (
        {**NEW, "cache_seqlens": 2, "cache_batch_idx": integers([0, 4])},
        r"cache_batch_idx\[1\] is 4; the cache has the entries 0 to 3",
    ),
    "leftpad": (
        {**NEW, "cache_seqlens": 2, "cache_leftpad": integers([0, 6])},
        r"cache_leftpad\[1\] is 6; it must be",
    ),
    "page": (
        {**NEW, "cache_seqlens": 14, "block_table": integers([[0, 1], [2, 4]])},
        r"block_table\[1\]\[1\] is 4; there are 4 pages",
    ),
    "index int64": (
        {**NEW, "cache_seqlens": 2, "cache_batch_idx": torch.tensor([0, 1])},
        r"cache_batch_idx is int64 of the shape \(2,\) on cpu; it must be int32 of the shape \(2, \)",
    ),
    "leftpad of one": (
        {**NEW, "cache_seqlens": 2, "cache_leftpad": integers([0])},
        r"cache_leftpad is .* shape \(1,\)",
    ),
    "table int64": (
        {**NEW, "cache_seqlens": 2, "block_table": torch.tensor([[0, 1], [2, 3]])},
        r"block_table is int64 .* it must be int32 of the shape \(2, pages\)",
    ),
    "table of three": (
        {**NEW, "cache_seqlens": 2, "block_table": integers([[0, 1], [2, 3], [0, 0]])},
        r"block_table is int32 of the shape \(3, 2\)",
    ),
    "index and table": (
        {**NEW, "cache_seqlens": 2, "cache_batch_idx": integers([0, 1]), "block_table": integers([[0, 1], [2, 3]])},
        "cache_batch_idx and block_table are given",
    ),
    "table": ({**NEW, "cache_seqlens": 2, "rotary_cos": TABLE[:9], "rotary_sin": TABLE[:9]}, "has 9 positions"),
    "window": ({**NEW, "cache_seqlens": 2, "window_size": (-2, 0)}, r"window_size is \(-2, 0\); it must be"),
    "softcap": ({**NEW, "cache_seqlens": 2, "softcap": "5"}, "softcap is '5'; it must be a number"),
    "softcap below 0": ({**NEW, "cache_seqlens": 2, "softcap": -1.0}, "softcap is -1; it must be"),
    "scale": ({**NEW, "cache_seqlens": 2, "softmax_scale": float("inf")}, "scale is inf; it must be finite"),
    "slopes": ({**NEW, "cache_seqlens": 2, "alibi_slopes": torch.rand(3)}, r"alibi_slopes has the shape \(3,\)"),
    "slopes of float64": (
        {**NEW, "cache_seqlens": 2, "alibi_slopes": torch.rand(4).double()},
        "alibi_slopes is float64; it must be float32",
    ),
    "scales": ({**NEW, "cache_seqlens": 2, "k_scale": torch.tensor(1.0)}, "k_scale is given and k_cache is float32"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments(case):
    """Refused before the cache is written."""
    options, words = WRONG[case]
    q, caches = torch.randn(2, 3, 4, 16), [torch.randn(4, 16, 2, 16) for _ in range(2)]
    before = [t.clone() for t in caches]
    with pytest.raises((TypeError, ValueError), match=words):
        flash_attn_with_kvcache(q, *caches, **options)
    assert all(map(torch.equal, caches, before))


class Overriding(torch.Tensor):
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("case", [name for name in WRONG if name.split()[0] in ("window", "softcap", "scale", "full")])
def test_wrong_arguments_of_a_subclass(case):
    """The same where __torch_function__ of a tensor's class is called."""
    options, words = WRONG[case]
    q, caches = torch.randn(2, 3, 4, 16).as_subclass(Overriding), [torch.zeros(4, 16, 2, 16) for _ in range(2)]
    with pytest.raises((TypeError, ValueError), match=words):
        flash_attn_with_kvcache(q, *caches, **options)
    assert not caches[0].any() and not caches[1].any()
    flash_attn_with_kvcache(q, *caches, **NEW, cache_seqlens=2)
    assert caches[0].any()


def test_wrong_caches():
    q, k = torch.randn(2, 3, 4, 16), torch.zeros(2, 16, 2, 16)
    for caches, words in (
        ((k, torch.zeros(2, 4, 2, 16)), r"v_cache \(2, 4, 2, 16\); they must agree"),
        ((k[:1], torch.zeros(1, 16, 2, 16)), "k_cache has 1 entries and q 2"),
    ):
        with pytest.raises(ValueError, match=words):
            flash_attn_with_kvcache(q, *caches, **NEW, cache_seqlens=2)
    k_cache = torch.zeros(2, 16, 3, 16)
    new = torch.ones(2, 3, 3, 16)
    with pytest.raises(ValueError, match="q has 4 heads; it must be a multiple of the 3 heads of k_cache"):
        flash_attn_with_kvcache(q, k_cache, k_cache.clone(), new, new, cache_seqlens=2)
    assert not k.any() and not k_cache.any()


def test_caches_that_cannot_be_written():
    """Refused before either cache is written; without new rows they are read."""
    q, k_cache, new = torch.randn(2, 3, 4, 16), torch.zeros(2, 16, 2, 16), torch.ones(2, 3, 2, 16)
    with torch.inference_mode():
        of_inference = torch.zeros(2, 16, 2, 16)
    for v_cache, words in (
        (torch.zeros(1, 16, 2, 16).expand(2, -1, -1, -1), "v_cache is expanded: its 2 entries of dimension 0 are one"),
        (of_inference, r"v_cache was made under torch.inference_mode\(\) and can be written there alone"),
    ):
        with pytest.raises(ValueError, match=words):
            flash_attn_with_kvcache(q, k_cache, v_cache, new, new, cache_seqlens=2)
        flash_attn_with_kvcache(q, k_cache, v_cache)
    with pytest.raises(ValueError, match="v is on meta and v_cache on cpu; they must be on one device"):
        flash_attn_with_kvcache(q, k_cache, k_cache.clone(), new, new.to("meta"), cache_seqlens=2)
    assert not k_cache.any()
    with torch.inference_mode():
        flash_attn_with_kvcache(q, k_cache, of_inference, new, new, cache_seqlens=2)
    assert k_cache.any() and of_inference.any()


def test_scales_that_cannot_be_written():
    codes, scale = quantize_kv(torch.randn(2, 2, 16, 32), "int8")
    with torch.inference_mode():
        of_inference = scale.clone()
    before, new = codes.clone(), torch.randn(2, 2, 1, 32)
    with pytest.raises(ValueError, match=r"v_scale was made under torch.inference_mode\(\)"):
        append_kv(codes, codes.clone(), new, new, integers([3, 5]), k_scale=scale, v_scale=of_inference)
    assert torch.equal(codes, before)


def test_a_head_dim_without_kernels():
    """What libmfa refuses is refused before the cache is written, too."""
    q, new = torch.randn(2, 3, 4, 520), torch.randn(2, 3, 2, 520)
    caches = [torch.zeros(2, 16, 2, 520) for _ in range(2)]
    with pytest.raises(Unsupported, match="head_dim is 520"):
        flash_attn_with_kvcache(q, *caches, new, new, cache_seqlens=2)
    assert not caches[0].any() and not caches[1].any()


def test_number_of_numpy():
    q, caches = torch.randn(2, 3, 4, 16), [torch.randn(4, 16, 2, 16) for _ in range(2)]
    out = flash_attn_with_kvcache(q, *caches, cache_seqlens=np.int64(5))
    assert torch.equal(out, flash_attn_with_kvcache(q, *caches, cache_seqlens=5))


def test_page_that_is_not_needed():
    q, caches = torch.randn(2, 3, 4, 16), [torch.randn(4, 16, 2, 16) for _ in range(2)]
    table = integers([[0, -1], [2, -1]])
    out = flash_attn_with_kvcache(q, *caches, **NEW, cache_seqlens=2, block_table=table)
    assert torch.equal(out, flash_attn_with_kvcache(q, *caches, cache_seqlens=5, block_table=table))


def test_no_gradients():
    q, caches = torch.randn(2, 3, 4, 16, requires_grad=True), [torch.randn(4, 16, 2, 16) for _ in range(2)]
    with pytest.raises(NotImplementedError, match="has no backward pass, and a tensor requires a gradient"):
        flash_attn_with_kvcache(q, *caches, cache_seqlens=2)
    table = torch.rand(16, 8, requires_grad=True)
    with pytest.raises(NotImplementedError, match="has no backward pass, and a tensor requires a gradient"):
        flash_attn_with_kvcache(q.detach(), *caches, **NEW, cache_seqlens=2, rotary_cos=table, rotary_sin=TABLE)
    with torch.no_grad():
        flash_attn_with_kvcache(q, *caches, cache_seqlens=2)


# --- Through PyTorch -----------------------------------------------------------------------------


def test_vmap():
    """Where all sizes are alike, so that a row in a wrong place does not raise."""
    q, k, v = torch.randn(3, 2, 2, 2, 2, 32)
    both, lengths = torch.randn(2, 2, 2, 16, 2, 32), integers([3, 5])

    def step(q, k_cache, v_cache, k, v):
        return flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=lengths)

    mapped, single = both.clone(), both.clone()
    found = torch.vmap(step)(q, *mapped, k, v)
    expected = torch.stack([step(q[n], *single[:, n], k[n], v[n]) for n in range(2)])
    torch.testing.assert_close(found, expected)
    assert torch.equal(mapped, single)


@pytest.mark.parametrize("shared", [False, True])
def test_vmap_of_codes(shared, monkeypatch):
    monkeypatch.setattr("mps_flash_attn.caches._is_read", lambda tensor: False)  # as on a GPU: vmap has no numbers
    new, lengths = torch.randn(2, 2, 2, 2, 32), integers([3, 5])
    codes, scale = quantize_kv(torch.randn(2, 2, 2, 16, 32), "int8")
    scales = torch.rand(2, 1, 2, 1, 1) + 0.01 if shared else scale

    def append(key, value, new, k_scale, v_scale):
        return append_kv(key, value, new, new, lengths, k_scale=k_scale, v_scale=v_scale)

    mapped, single = ([one.clone() for one in (codes, codes, scales, scales)] for _ in range(2))
    torch.vmap(append)(*mapped[:2], new, *mapped[2:])
    for n in range(2):
        append(single[0][n], single[1][n], new[n], single[2][n], single[3][n])
    assert all(map(torch.equal, mapped, single)) and not torch.equal(mapped[0], codes)
