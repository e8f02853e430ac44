"""flash_attention_kvcache, of keys in caches and pages, against flash_attention of each sequence by itself."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck

import sequences
from mps_flash_attn import Unsupported, explain, flash_attention, flash_attention_kvcache, flash_attention_varlen
from mps_flash_attn.options import Options
from mps_flash_attn.problem import Inputs
from sequences import cumulative, gradients, integers, of_entry, paged
from stand_in import DTYPES, FLOAT64

pytestmark = [pytest.mark.usefixtures("one_thread")]
FORWARD = torch.ops.mfa.attention_forward.default
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
USED, PADDING = (37, 100, 1, 64), (0, 12, 1, 60)
OPTIONS = {
    "plain": {},
    "bottom right": {"is_causal": "bottom_right"},
    "top left": {"is_causal": "top_left"},
    "window": {"window_size": (20, 0)},
    "softcap, slopes, sinks": {"softcap": 3.0, "alibi_slopes": torch.rand(4), "sinks": torch.randn(4, 4)},
}


def cache(q_len=1, kv_len=100, batch=4, entries=4, dtype=torch.float32, value_dim=16):
    """Queries, keys and values."""
    query = torch.randn(batch, 4, q_len, 16).to(dtype)
    key, value = (torch.randn(entries, 2, kv_len, columns).to(dtype) for columns in (16, value_dim))
    return query, key, value


def one_by_one(query, key, value, used=None, padding=None, index=None, **options):
    """(out, lse) by a call of flash_attention for each sequence."""
    results = []
    for b in range(len(query)):
        entry = b if index is None else int(index[b])
        part = slice(int(padding[b]) if padding is not None else 0, int(used[b]) if used is not None else key.shape[2])
        one = query[b : b + 1], key[entry : entry + 1, :, part], value[entry : entry + 1, :, part]
        own = of_entry(options, b, query.shape[2], one[1].shape[2])
        results.append(flash_attention(*one, enable_gqa=True, return_lse=True, **own))
    return tuple(map(torch.cat, zip(*results, strict=True)))


def attend(*tensors, **options):
    return flash_attention_kvcache(*tensors, enable_gqa=True, return_lse=True, **options)


def close(found, expected, dtype=torch.float32):
    tolerance = TOLERANCE[dtype]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def hide(tensor, used, padding=None):
    """What does not count becomes NaN."""
    for b, n in enumerate(used):
        tensor[b, :, n:] = torch.nan
        if padding is not None:
            tensor[b, :, : padding[b]] = torch.nan


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("q_len", [1, 3, 40])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("padding", [None, PADDING], ids=["used", "padded"])
def test_lengths(padding, options, q_len, dtype):
    """With gradients, which are 0 for keys that do not count."""
    tensors = cache(q_len, dtype=dtype)
    for tensor in tensors[1:]:
        hide(tensor, USED, padding)
    lengths = {"seqused_k": integers(USED)} | ({} if padding is None else {"leftpad_k": integers(padding)})
    d_out = torch.randn(4, 4, q_len, 16).to(dtype)
    found = gradients(lambda *t: attend(*t, **lengths, **OPTIONS[options]), tensors, d_out, torch.randn(4, 4, q_len))
    assert not any(one.isnan().any() for one in found)
    expected = one_by_one(*tensors, USED, padding, **OPTIONS[options])
    close(found[:2], expected, dtype)
    own = gradients(lambda *t: one_by_one(*t, USED, padding, **OPTIONS[options]), tensors, d_out)
    again = gradients(lambda *t: attend(*t, **lengths, **OPTIONS[options]), tensors, d_out)
    close(again, own, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("q_len", [1, 3, 40])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("page", [1, 5, 16, 256])
def test_pages(page, options, q_len, dtype):
    query, key, value = cache(q_len, dtype=dtype, value_dim=8)
    expected = one_by_one(query, key, value, USED, PADDING, **OPTIONS[options])
    *pages, table = paged(key, value, page)
    lengths = {"seqused_k": integers(USED), "leftpad_k": integers(PADDING), "block_table": table}
    close(attend(query, *pages, **lengths, **OPTIONS[options]), expected, dtype)
    rows_first = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in pages]
    close(attend(query, *rows_first, **lengths, **OPTIONS[options]), expected, dtype)


@pytest.mark.parametrize("index", [(0, 1, 2, 3), (5, 0, 2, 4), (1, 1, 1, 0)], ids=str)
def test_cache_batch_idx(index):
    query, key, value = cache(3, entries=6)
    expected = one_by_one(query, key, value, USED, None, index)
    found = attend(query, key, value, seqused_k=integers(USED), cache_batch_idx=integers(index))
    close(found, expected)


def test_pages_of_packed_queries():
    """As a server has them: a prompt and single tokens, over one cache of pages."""
    _, key, value = cache(1)
    *pages, table = paged(key, value, 16)
    lengths, used = (30, 1, 1, 5), (37, 100, 1, 64)
    rows, starts = torch.randn(37, 4, 16), cumulative(lengths)
    keys = [t.transpose(1, 2) for t in pages]  # (pages, page, heads, columns)
    given = {"is_causal": "bottom_right", "enable_gqa": True, "block_table": table}
    out = flash_attention_varlen(rows, *keys, starts, None, 30, 100, seqused_k=integers(used), **given)
    same = flash_attention_varlen(rows, *keys, starts, cumulative(used), 30, 100, **given)
    assert torch.equal(out, same)
    for b in range(4):
        part = slice(int(starts[b]), int(starts[b + 1]))
        one = rows[part].transpose(0, 1)[None], key[b : b + 1, :, : used[b]], value[b : b + 1, :, : used[b]]
        expected = flash_attention(*one, "bottom_right", enable_gqa=True)
        torch.testing.assert_close(out[part].transpose(0, 1), expected[0], rtol=2e-5, atol=2e-5)
    with pytest.raises(ValueError, match="is_causal is True; with a cache of keys"):
        flash_attention_varlen(rows, *keys, starts, None, 30, 100, True, enable_gqa=True, block_table=table)
    with pytest.raises(ValueError, match=r"block_table has 7 pages of 16 keys .* 113 keys"):
        flash_attention_varlen(rows, *keys, starts, None, 30, 113, enable_gqa=True, block_table=table)


def test_sequences_without_keys():
    query, key, value = cache(3)
    out, lse = attend(query, key, value, "bottom_right", seqused_k=integers([0, 2, 0, 100]))
    assert not out[0].any() and not out[2].any() and lse[0].eq(-torch.inf).all()
    assert not out[1, :, 0].any() and out[1, :, 1:].any() and lse[1, :, 0].eq(-torch.inf).all()


def test_shared_pages():
    """A prompt that two sequences have in common."""
    query, key, value = cache(2, batch=2)
    table = integers([[0, 1, 2], [0, 1, 3]])
    found = attend(query, key, value, seqused_k=integers([250, 300]), block_table=table)
    for b in range(2):
        joined = [torch.cat([t[n] for n in table[b]], 1)[None, :, : (250, 300)[b]] for t in (key, value)]
        expected = flash_attention(query[b : b + 1], *joined, enable_gqa=True)
        torch.testing.assert_close(found[0][b : b + 1], expected, rtol=2e-5, atol=2e-5)


@FLOAT64
def test_gradcheck():
    query, key, value = (t.double()[:, :, :9, :3].requires_grad_() for t in cache(3, batch=2, entries=2))
    lengths = {"seqused_k": integers([9, 4]), "leftpad_k": integers([2, 0])}
    assert torch.autograd.gradcheck(
        lambda *t: attend(*t, "bottom_right", **lengths)[0], (query, key, value), fast_mode=True
    )


# --- Through PyTorch -----------------------------------------------------------------------------


def test_opcheck():
    query, key, value = cache(3, entries=6)
    *pages, table = paged(key[:4], value[:4], 16)
    for tensors, lengths, most in (
        ((key[:4], value[:4]), {"seqused_k": integers(USED), "leftpad_k": integers(PADDING)}, {}),
        ((key, value), {"seqused_k": integers(USED), "cache_batch_idx": integers([5, 0, 2, 4])}, {}),
        (pages, {"seqused_k": integers(USED), "block_table": table}, {"max_kv": table.shape[1] * 16}),
    ):
        inputs = Inputs(query, *tensors, **lengths)
        opcheck(FORWARD, (*inputs, *Options(upper=0, bottom_right=True, **most)))


def test_compiled_decoding():
    """One graph for all steps: lengths are numbers in a tensor."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attend, backend=counter, fullgraph=True)
    query, key, value = cache(1)
    *pages, table = paged(key, value, 16)
    for step in range(5):
        lengths = {"seqused_k": integers([n + step for n in (37, 90, 1, 64)]), "block_table": table}
        close(compiled(query, *pages, "bottom_right", **lengths), attend(query, *pages, "bottom_right", **lengths))
    assert counter.frame_count == 1


def test_vmap():
    query, key, value = cache(3)
    queries = torch.stack([query, -query])
    found = torch.vmap(lambda q: attend(q, key, value, seqused_k=integers(USED))[0])(queries)
    close(found, [attend(q, key, value, seqused_k=integers(USED))[0] for q in queries])


def test_autocast():
    query, key, value = cache(3)
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = attend(query, key, value, seqused_k=integers(USED))
    expected, _ = attend(query.bfloat16(), key.bfloat16(), value.bfloat16(), seqused_k=integers(USED))
    assert torch.equal(found, expected)


def test_explain():
    query, key, value = cache(1)
    *pages, table = paged(key, value, 16)
    lengths = {"seqused_k": integers(USED), "block_table": table}
    kernel = explain(query, *pages, "bottom_right", enable_gqa=True, **lengths).kernel
    assert kernel.startswith(("decode_f32", "decode_vector_f32")) and "_varlen_paged_" in kernel
    refused = explain(query, *pages, enable_gqa=True, backward=True, **lengths)
    assert not refused and "page_size is 16" in refused.reason


# --- Errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_no_backward_of_pages_and_indices(compiled):
    """Refused before anything is computed."""
    query, key, value = cache(1)
    run = torch.compile(attend, backend="aot_eager", fullgraph=True) if compiled else attend
    query.requires_grad_()
    error = Exception if compiled else Unsupported
    with pytest.raises(error, match="page_size is 100 and cache_batch_idx 0 in the backward pass"):
        run(query, key, value, block_table=integers([[0], [1], [2], [3]]))
    with pytest.raises(error, match="page_size is 0 and cache_batch_idx 1 in the backward pass"):
        run(query, key, value, cache_batch_idx=integers([0, 1, 2, 3]))
    with torch.no_grad():
        run(query, key, value, cache_batch_idx=integers([0, 1, 2, 3]))


WRONG = {
    "causal": (
        {"is_causal": True, "seqused_k": integers(USED)},
        ValueError,
        'is_causal is True; with a cache of keys .*"bottom_right"',
    ),
    "int64": ({"seqused_k": torch.tensor(USED)}, TypeError, "seqused_k is int64; it must be int32"),
    "batch": ({"seqused_k": integers([1, 2, 3])}, ValueError, "number of sequences, 4"),
    "too long": ({"seqused_k": integers([1, 2, 101, 4])}, ValueError, r"seqused_k\[2\] is 101; it must be 0 to 100"),
    "negative": ({"seqused_k": integers([1, -2, 3, 4])}, ValueError, r"seqused_k\[1\] is -2"),
    "padding": ({"seqused_k": integers([9] * 4), "leftpad_k": integers([1, 10, 9, 9])}, ValueError, r"leftpad_k\[1\]"),
    "index": ({"cache_batch_idx": integers([0, 1, 2, 4])}, ValueError, r"cache_batch_idx\[3\] is 4; it must be 0 to 3"),
    "page": (
        {"block_table": integers([[0]] * 3 + [[4]])},
        ValueError,
        r"block_table\[3\]\[0\] is 4; there are",
    ),
    "table": ({"block_table": integers([0] * 4)}, ValueError, r"block_table has the shape \(4,\); it must be \(batch,"),
    "both": (
        {"block_table": integers([[0]] * 4), "cache_batch_idx": integers([0] * 4)},
        ValueError,
        "page_size is 100 and cache_batch_idx 1",
    ),
    "mask": ({"attn_mask": torch.ones(1, 99, dtype=torch.bool)}, ValueError, r"broadcastable to .*\(4, 4, 1, 100\)"),
}


READ = ("too long", "negative", "padding", "index", "page")  # found by reading the numbers


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=[pytest.mark.cpu(sequences.CLAMPED)] * (c in READ)) for c in WRONG]
)
def test_wrong_arguments(case):
    options, error, words = WRONG[case]
    with pytest.raises(error, match=words):
        attend(*cache(1), **options)
    if case in ("causal", "int64", "batch", "table", "mask"):  # numbers are read where they are used
        with pytest.raises(error, match=words):
            explain(*cache(1), enable_gqa=True, **options)


def test_sizes_of_caches():
    query, key, value = cache(1, entries=6)
    with pytest.raises(ValueError, match="the batch sizes of query 4, key 6 and value 6 differ"):
        attend(query, key, value, seqused_k=integers(USED))
    with pytest.raises(ValueError, match="the batch sizes of query 6, key 6 and value 5 differ"):
        attend(query, key, value[:5], cache_batch_idx=integers([0, 1, 2, 3]))
    with pytest.raises(ValueError, match="a page must have a key or more"):
        attend(query, key[:, :, :0], value[:, :, :0], block_table=integers([[0]] * 4))
