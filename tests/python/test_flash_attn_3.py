"""The functions of flash-attn 3 against those of flash-attn 2, which have flash-attention's own tests, and with what
only they have."""

import inspect

import pytest
import torch

from mps_flash_attn import Unsupported, flash_attention, flash_attn
from mps_flash_attn.flash_attn import fa3

BATCH, HEADS, KV_HEADS = 3, 4, 2
OPTIONS = (
    {},
    {"causal": True},
    {"window_size": (9, 4), "softcap": 5.0},
    {"causal": True, "window_size": (20, 0), "softmax_scale": 0.3},
)


def dense(q_len=31, kv_len=45, dtype=torch.float64):
    q = torch.randn(BATCH, q_len, HEADS, 16, dtype=dtype)
    k = torch.randn(BATCH, kv_len, KV_HEADS, 16, dtype=dtype)
    return q, k, torch.randn(BATCH, kv_len, KV_HEADS, 8, dtype=dtype)


def starts_of(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def results(attend, tensors):
    """out, lse and the gradients, of which lse has one, too."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    out, lse = attend(*leaves)[:2]
    loss = out.square().sum() + lse.masked_fill(lse == -torch.inf, 0).sum()
    return out, lse, *torch.autograd.grad(loss, leaves)


def same(found, expected):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7, check_dtype=False)


@pytest.mark.parametrize("options", OPTIONS)
def test_dense(options):
    tensors = dense()
    found = results(lambda *t: fa3.flash_attn_func(*t, **options, return_attn_probs=True), tensors)
    same(found, results(lambda *t: flash_attn.flash_attn_func(*t, **options, return_attn_probs=True), tensors))
    assert torch.equal(fa3.flash_attn_func(*tensors, **options), found[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["s_aux", "learnable_sink"])
def test_sinks(dtype, name):
    """By flash-attention's rule: out is at most twice as far from the truth as attention written out in the dtype, and
    gradients at most three times."""
    q, k, v = (tensor.transpose(1, 2) for tensor in dense(113, 203, dtype))
    leaves = [tensor.requires_grad_() for tensor in (q, k, v, torch.randn(HEADS, dtype=dtype))]
    g = torch.randn(BATCH, 113, HEADS, 8, dtype=dtype)

    def written_out(precision):
        query, key, value, sinks = (tensor.to(precision) for tensor in leaves)
        key, value = (one.repeat_interleave(HEADS // KV_HEADS, 1) for one in (key, value))
        hidden = torch.ones(113, 203, dtype=torch.bool).triu(203 - 113 + 1)
        scores = (query @ key.mT / 4).masked_fill(hidden, -torch.inf)
        logits = torch.cat([scores, sinks[:, None, None].expand(BATCH, -1, 113, 1)], -1)
        return (logits.softmax(-1)[..., :-1] @ value).transpose(1, 2)

    ours = fa3.flash_attn_func(*(one.transpose(1, 2) for one in leaves[:3]), causal=True, **{name: leaves[3]})
    outs = ours, written_out(torch.float64), written_out(dtype)
    found, exact, plain = ((out, *torch.autograd.grad(out, leaves, g.to(out.dtype))) for out in outs)
    for factor, a, b, c in zip((2, 3, 3, 3, 3), found, exact, plain, strict=True):
        assert (a - b).abs().max() <= factor * (c - b).abs().max() + 1e-5


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("uses", ["all", "keys", "queries", "both"])
def test_packed(uses, options):
    """With the first queries and keys of each sequence alone, one of which has none."""
    lengths_q, lengths_k, used_q, used_k = (31, 0, 20), (45, 7, 30), (17, 0, 20), (40, 0, 21)
    starts = starts_of(lengths_q), starts_of(lengths_k), 31, 45
    q, k, v = (
        torch.randn(sum(lengths), heads, columns, dtype=torch.float64)
        for lengths, heads, columns in (
            (lengths_q, HEADS, 16),
            (lengths_k, KV_HEADS, 16),
            (lengths_k, KV_HEADS, 8),
        )
    )
    used_q = used_q if uses in ("queries", "both") else lengths_q
    used_k = used_k if uses in ("keys", "both") else lengths_k
    seqused = {}
    if uses in ("queries", "both"):
        seqused["seqused_q"] = torch.tensor(used_q, dtype=torch.int32)
    if uses in ("keys", "both"):
        seqused["seqused_k"] = torch.tensor(used_k, dtype=torch.int32)

    def one_by_one(q, k, v):
        outs, lses = [], []
        for b in range(3):
            rows = [one[starts[n][b] :][: (used_q, used_k)[n][b]] for n, one in ((0, q), (1, k), (1, v))]
            out, lse = fa3.flash_attn_func(*(one[None] for one in rows), **options, return_attn_probs=True)
            rest = lengths_q[b] - used_q[b]
            outs.append(torch.nn.functional.pad(out[0], (0, 0, 0, 0, 0, rest)))
            lses.append(torch.nn.functional.pad(lse[0], (0, rest), value=-torch.inf))
        return torch.cat(outs), torch.cat(lses, 1)

    def packed(*tensors):
        return fa3.flash_attn_varlen_func(*tensors, *starts, **seqused, **options, return_attn_probs=True)

    found = results(packed, (q, k, v))
    same(found, results(one_by_one, (q, k, v)))
    assert torch.equal(fa3.flash_attn_varlen_func(q, k, v, *starts, **seqused, **options), found[0])


def test_sinks_of_packed_sequences():
    q, k, v = (torch.randn(20, heads, 16) for heads in (HEADS, KV_HEADS, KV_HEADS))
    starts, sinks = starts_of((20,)), torch.randn(HEADS)
    found = fa3.flash_attn_varlen_func(q, k, v, starts, starts, 20, 20, causal=True, s_aux=sinks)
    expected = fa3.flash_attn_func(q[None], k[None], v[None], causal=True, s_aux=sinks)[0]
    same([found], [expected])


@pytest.mark.parametrize("num_heads_q", [None, HEADS])
def test_all_in_one_tensor(num_heads_q):
    if num_heads_q is None:
        qkv = torch.randn(BATCH, 9, 3, HEADS, 16, dtype=torch.float64, requires_grad=True)
        parts = qkv.unbind(2)
    else:
        qkv = torch.randn(BATCH, 9, HEADS + 2 * KV_HEADS, 16, dtype=torch.float64, requires_grad=True)
        parts = qkv[:, :, :HEADS], qkv[:, :, HEADS:-KV_HEADS], qkv[:, :, -KV_HEADS:]
    found = fa3.flash_attn_qkvpacked_func(qkv, 0.3, True, num_heads_q=num_heads_q)
    expected = fa3.flash_attn_func(*parts, 0.3, True)
    gradients = [torch.autograd.grad(out.square().sum(), qkv)[0] for out in (found, expected)]
    assert torch.equal(found, expected) and torch.equal(*gradients)
    with pytest.raises(ValueError, match="qkv has the shape"):
        fa3.flash_attn_qkvpacked_func(qkv, num_heads_q=3 if num_heads_q is None else None)


@pytest.mark.parametrize("where", ["entries", "index", "pages"])
@pytest.mark.parametrize("is_packed", [False, True])
def test_cache(where, is_packed):
    q, sinks, used = torch.randn(BATCH, 2, HEADS, 16), torch.randn(HEADS), torch.tensor([40, 2, 33], dtype=torch.int32)
    keys, values = (torch.randn(BATCH, 45, KV_HEADS, 16) for _ in range(2))
    places = {}
    if where == "index":
        places["cache_batch_idx"] = torch.tensor([2, 0, 1], dtype=torch.int32)
        caches = [one[[1, 2, 0]] for one in (keys, values)]
    elif where == "pages":
        places["page_table"] = torch.tensor([[2, 5, 8], [0, 1, 3], [7, 6, 4]], dtype=torch.int32)
        order = places["page_table"].flatten().argsort()
        caches = [one.unflatten(1, (3, 15)).flatten(0, 1)[order] for one in (keys, values)]
    else:
        caches = [keys, values]
    options = {"cache_seqlens": used, "causal": True, "s_aux": sinks, "return_softmax_lse": True, **places}
    if is_packed:
        starts = starts_of((2, 2, 2))
        out, lse = fa3.flash_attn_with_kvcache(q.flatten(0, 1), *caches, cu_seqlens_q=starts, max_seqlen_q=2, **options)
        found = out.unflatten(0, (BATCH, 2)), lse.unflatten(1, (BATCH, 2)).transpose(0, 1)
    else:
        found = fa3.flash_attn_with_kvcache(q, *caches, **options)
    for b in range(BATCH):
        one = (tensor[b : b + 1, : used[b]].transpose(1, 2) for tensor in (keys, values))
        expected = flash_attention(
            q[b : b + 1].transpose(1, 2), *one, "bottom_right", sinks=sinks, enable_gqa=True, return_lse=True
        )
        same([found[0][b], found[1][b]], [expected[0][0].transpose(0, 1), expected[1][0]])


def test_appended():
    """As by flash-attn 2's function, with the same cache afterwards."""
    q, new = torch.randn(BATCH, 2, HEADS, 16), [torch.randn(BATCH, 2, KV_HEADS, 16) for _ in range(2)]
    caches = [torch.randn(BATCH, 45, KV_HEADS, 16) for _ in range(2)]
    tables = torch.randn(45, 8), torch.randn(45, 8)
    found = []
    for function in (fa3.flash_attn_with_kvcache, flash_attn.flash_attn_with_kvcache):
        own = [one.clone() for one in caches]
        options = {"k": new[0], "v": new[1], "rotary_cos": tables[0], "rotary_sin": tables[1], "cache_seqlens": 40}
        found.append((function(q, *own, **options, causal=True), *own))
    assert all(map(torch.equal, *found))


def test_what_is_refused():
    q, k, v = dense(dtype=torch.float32)
    factor, starts, used = torch.ones(1), starts_of((31, 31, 31)), torch.tensor([31, 32, 0], dtype=torch.int32)
    for sentence, options in (
        ("qv is given", {"qv": q}),
        ("attention_chunk is 4", {"attention_chunk": 4}),
        ("q_descale is given", {"q_descale": factor}),
        ("v_descale is given", {"v_descale": factor}),
    ):
        with pytest.raises(Unsupported, match=sentence):
            fa3.flash_attn_func(q, k, v, **options)
        with pytest.raises(Unsupported, match=sentence):
            fa3.flash_attn_with_kvcache(q, k, v, **options)
    with pytest.raises(ValueError, match="s_aux and learnable_sink are given"):
        fa3.flash_attn_func(q, k, v, s_aux=torch.ones(HEADS), learnable_sink=torch.ones(HEADS))
    packed = [q.flatten(0, 1), *(one[:, :31].flatten(0, 1) for one in (k, v)), starts, starts, 31, 31]
    with pytest.raises(ValueError, match=r"seqused_q\[1\] is 32; it must be 0 to 31"):
        fa3.flash_attn_varlen_func(*packed, used)
    with pytest.raises(ValueError, match=r"seqused_q is int64 of the shape \(3,\)"):
        fa3.flash_attn_varlen_func(*packed, used.long())
    for sentence, options in (
        ("max_seqlen_q None", {}),
        ("only dense batches", {"k": k, "v": v, "max_seqlen_q": 31}),
        ("cu_seqlens_k_new is given", {"cu_seqlens_k_new": starts}),
        ("rotary_seqlens is given", {"rotary_seqlens": starts}),
    ):
        with pytest.raises((ValueError, Unsupported), match=sentence):
            fa3.flash_attn_with_kvcache(packed[0], k, v, cu_seqlens_q=starts, **options)
    tables = {"page_table": torch.zeros(3, 1).int(), "cache_batch_idx": torch.zeros(3).int()}
    with pytest.raises(ValueError, match="cache_batch_idx and page_table are given"):
        fa3.flash_attn_with_kvcache(packed[0], k, v, cu_seqlens_q=starts, max_seqlen_q=31, **tables)
    for options in ({}, {"cu_seqlens_q": starts, "max_seqlen_q": 31}):
        rows = packed[0] if options else q
        with pytest.raises(NotImplementedError, match="has no backward pass"):
            fa3.flash_attn_with_kvcache(rows.clone().requires_grad_(), k, v, **options)


def test_signatures():
    """Names and order of the arguments, by which code passes them."""
    scale, descale = "softmax_scale causal", "q_descale k_descale v_descale"
    tail = "softcap num_splits pack_gqa deterministic sm_margin return_attn_probs s_aux learnable_sink"
    lengths = "cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k seqused_q seqused_k"
    middle, sinks = "window_size attention_chunk softcap", "s_aux learnable_sink"
    of_one, of_cache = "num_heads_q sm_margin", "cu_seqlens_q cu_seqlens_k_new max_seqlen_q rotary_seqlens"
    last = "rotary_interleaved scheduler_metadata num_splits pack_gqa sm_margin return_softmax_lse"
    given = "rotary_cos rotary_sin cache_seqlens cache_batch_idx cache_leftpad page_table"
    for function, names in (
        (fa3.flash_attn_func, f"q k v {scale} qv {descale} window_size attention_chunk {tail}"),
        (fa3.flash_attn_varlen_func, f"q k v {lengths} {scale} qv {descale} window_size attention_chunk {tail}"),
        (
            fa3.flash_attn_qkvpacked_func,
            f"qkv {scale} {descale} window_size attention_chunk softcap deterministic {of_one} return_attn_probs",
        ),
        (
            fa3.flash_attn_with_kvcache,
            f"q k_cache v_cache k v qv {given} {of_cache} {descale} {scale} {middle} {last} {sinks}",
        ),
    ):
        assert [*inspect.signature(function).parameters] == names.split()
