"""libmfa as PyTorch's flash attention: varlen_attn and the operators beneath it, against attention written out."""

import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from torch.nn import attention as torch_attention

import sequences
from mps_flash_attn import flash_attention, flash_attention_varlen, register_flash_attention_impl
from mps_flash_attn.flash_impl import _KERNELS
from sequences import gradients, integers, paged, problem
from stand_in import DTYPES

SINCE_2_11 = pytest.mark.skipif(
    not hasattr(torch_attention, "restore_flash_attention_impl"), reason="PyTorch 2.11 or later"
)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
FORWARD = "_flash_attention_forward"
LENGTHS = (3, 40, 0, 70)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def active():
    with register_flash_attention_impl():
        torch_attention.activate_flash_attention_impl("mfa")
        yield
        assert torch_attention.current_flash_attention_impl() == "mfa"
    assert torch_attention.current_flash_attention_impl() is None


def varlen_attn(*arguments, lse=True, **options):
    from torch.nn.attention.varlen import AuxRequest, varlen_attn

    return varlen_attn(*arguments, return_aux=AuxRequest(lse=lse), **options)


def has(option):
    from torch.nn.attention.varlen import varlen_attn

    return option in inspect.signature(varlen_attn).parameters


def written_out(query, key, value, starts_q, starts_k, *_, scale=None, window_size=(-1, -1)):
    """(out, lse) of packed sequences in double, aligned to the last query and key."""
    scale = query.shape[2] ** -0.5 if scale is None else scale
    left, right = (math.inf if bound < 0 else bound for bound in window_size)
    outs, sums = [], []
    for b in range(len(starts_q) - 1):
        q, k, v = (
            t[starts[b] : starts[b + 1]].double().transpose(0, 1)
            for t, starts in ((query, starts_q), (key, starts_k), (value, starts_k))
        )
        k, v = (t.repeat_interleave(len(q) // len(k), 0) for t in (k, v))
        far = torch.arange(k.shape[1]) - torch.arange(q.shape[1])[:, None] + q.shape[1] - k.shape[1]
        scores = (scale * q @ k.mT).masked_fill((far < -left) | (far > right), -math.inf)
        outs.append((scores.softmax(-1).nan_to_num() @ v).transpose(0, 1))
        sums.append(scores.logsumexp(-1))
    return torch.cat(outs), torch.cat(sums, -1)


def close(found, expected, dtype=torch.float32):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


VARLEN = {
    "plain": {},
    "causal": {"window_size": (-1, 0)},
    "window": {"window_size": (9, 4), "scale": 0.3},
    "causal window": {"window_size": (5, 0)},
}


@SINCE_2_11
@pytest.mark.usefixtures("active")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", VARLEN)
def test_varlen_attn(case, dtype):
    grouped = has("enable_gqa")
    arguments = problem(LENGTHS, (3, 50, 7, 65), kv_heads=2 if grouped else 4, dtype=dtype)
    tensors, others = arguments[:3], arguments[3:]
    options = {"enable_gqa": True} if grouped else {}
    d_out = torch.randn_like(tensors[0])
    found = gradients(lambda *t: varlen_attn(*t, *others, **VARLEN[case], **options), tensors, d_out)
    exact = [t.double() for t in tensors]
    expected = gradients(lambda *t: written_out(*t, *others, **VARLEN[case]), exact, d_out)
    close(found, expected, dtype)
    assert found[0].dtype is dtype and found[1].shape == (4, 113)


@SINCE_2_11
@pytest.mark.skipif(SINCE_2_11.args[0] or not has("block_table"), reason="PyTorch 2.12 or later")
@pytest.mark.usefixtures("active")
def test_used_keys_and_pages():
    used = integers([2, 45, 30])
    key, value = torch.randn(2, 3, 2, 50, 16)
    query, starts, *_ = sequences.packed((1, 9, 3), 4, 16)[0], sequences.cumulative((1, 9, 3))
    rows = [t.transpose(1, 2).flatten(0, 1) for t in (key, value)]
    packed_k = sequences.cumulative((50, 50, 50))
    options = {"enable_gqa": True, "window_size": (-1, 0)}
    expected = flash_attention_varlen(
        query, *rows, starts, packed_k, 9, 50, "bottom_right", seqused_k=used, enable_gqa=True, return_lse=True
    )
    close(varlen_attn(query, *rows, starts, packed_k, 9, 50, seqused_k=used, **options), expected)
    *pages, table = paged(key, value, 7)
    pages = [t.transpose(1, 2) for t in pages]
    for lengths in (None, packed_k):
        found = varlen_attn(query, *pages, starts, lengths, 9, 50, seqused_k=used, block_table=table, **options)
        close(found, expected)
    with pytest.raises((RuntimeError, NotImplementedError), match="seqused_k"):
        varlen_attn(query.requires_grad_(), *rows, starts, packed_k, 9, 50, seqused_k=used, **options)


@SINCE_2_11
@pytest.mark.skipif(not hasattr(torch.ops.aten, f"{FORWARD}_no_dropout_inplace"), reason="PyTorch 2.12 or later")
@pytest.mark.usefixtures("active")
def test_result_in_given_memory():
    from torch.nn.attention.varlen import varlen_attn_out

    arguments = problem(LENGTHS, LENGTHS, kv_heads=4)
    out = torch.empty_like(arguments[0])
    assert varlen_attn_out(out, *arguments) is out
    close([out], varlen_attn(*arguments)[:1])
    for wrong in (out[:, :1], out.double()):
        with pytest.raises(ValueError, match=r"^out is .*; it must be \(113, 4, 16\) in torch.float32"):
            varlen_attn_out(wrong, *arguments)


@SINCE_2_11
@pytest.mark.usefixtures("active")
def test_compiled():
    arguments = problem((3, 40), (3, 40), kv_heads=4)
    tensors, others = arguments[:3], arguments[3:]

    def run(*tensors):
        return varlen_attn(*tensors, *others, window_size=(-1, 0))

    d_out = torch.randn_like(tensors[0])
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    close(gradients(compiled, tensors, d_out), gradients(run, tensors, d_out))


# --- The operators -------------------------------------------------------------------------------


def operator(*tensors, lengths=(None, None, 0, 0), dropout_p=0.0, is_causal=False, **options):
    return getattr(torch.ops.aten, FORWARD)(*tensors, *lengths, dropout_p, is_causal, False, **options)


def dense(q_len=19, kv_len=30, kv_heads=2):
    return [torch.randn(2, rows, heads, 16) for rows, heads in ((q_len, 4), (kv_len, kv_heads), (kv_len, kv_heads))]


def of_dense(query, key, value, **options):
    """(out, lse) of (B, L, H, D) tensors by flash_attention."""
    query, key, value = (t.transpose(1, 2) for t in (query, key, value))
    out, lse = flash_attention(query, key, value, enable_gqa=True, return_lse=True, **options)
    return out.transpose(1, 2), lse


@SINCE_2_11
@pytest.mark.usefixtures("active")
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("is_causal", [False, True])
def test_dense(is_causal, dropout_p):
    tensors, states = dense(), []

    def run(*tensors):
        torch.manual_seed(5)
        out, lse, state, *_ = operator(*tensors, dropout_p=dropout_p, is_causal=is_causal, scale=0.4)
        states.append(state)
        return out, lse

    d_out = torch.randn_like(tensors[0])
    found = gradients(run, tensors, d_out)
    (state,) = states
    assert (
        state.shape == (2,) and state.dtype is torch.uint64 and bool(state.view(torch.int64).any()) == bool(dropout_p)
    )
    seed = state.view(torch.int64)[:1] if dropout_p else None
    options = {"is_causal": "bottom_right" if is_causal else False, "scale": 0.4}
    options |= {"dropout_p": dropout_p, "dropout_seed": seed}
    close(found, gradients(lambda *t: of_dense(*t, **options), tensors, d_out))
    assert torch.equal(operator(*tensors, dropout_p=0.5)[0], operator(*tensors, dropout_p=0.5)[0]) is False


@SINCE_2_11
@pytest.mark.usefixtures("active")
def test_packed_with_dropout():
    arguments = problem(LENGTHS, LENGTHS)
    tensors, others, states = arguments[:3], arguments[3:], []

    def run(*tensors):
        out, lse, state, *_ = operator(*tensors, lengths=others, dropout_p=0.4, window_size_left=30)
        states.append(state)
        return out, lse

    d_out = torch.randn_like(tensors[0])
    found = gradients(run, tensors, d_out)
    options = {"dropout_p": 0.4, "dropout_seed": states[0].view(torch.int64)[:1], "window_size": (30, -1)}
    options |= {"enable_gqa": True, "return_lse": True}
    close(found, gradients(lambda *t: flash_attention_varlen(*t, *others, **options), tensors, d_out))


@SINCE_2_11
@pytest.mark.usefixtures("active")
def test_slopes():
    tensors, slopes = dense(), torch.rand(4)
    found = operator(*tensors, is_causal=True, alibi_slopes=slopes)[:2]
    close(found, of_dense(*tensors, is_causal="bottom_right", alibi_slopes=slopes))


@SINCE_2_11
@pytest.mark.usefixtures("active")
def test_is_not_cast():
    tensors = [t.requires_grad_() for t in dense()]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = operator(*tensors)[0]
        assert out.dtype is torch.float32
        (gradient,) = torch.autograd.grad(out.sum(), tensors[0])
    assert gradient.dtype is torch.float32


@SINCE_2_11
@pytest.mark.usefixtures("active")
@pytest.mark.parametrize("is_causal", [False, True])
def test_of_heads_first(is_causal):
    """_scaled_dot_product_flash_attention, beside the operator that PyTorch has on the CPU."""
    tensors = [torch.randn(2, 4, 25, 16) for _ in range(3)]
    run = torch.ops.aten._scaled_dot_product_flash_attention
    theirs = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    d_out = torch.randn_like(tensors[0])
    found = gradients(lambda *t: run(*t, 0.0, is_causal)[:2], tensors, d_out)
    close(found, gradients(lambda *t: theirs(*t, 0.0, is_causal), tensors, d_out))
    assert run(*tensors, 0.0, is_causal)[2:6] == (None, None, 25, 25)
    out = run(*[t.requires_grad_() for t in tensors], 0.5)[0]
    assert all(g.any() for g in torch.autograd.grad(out.sum(), tensors[1:]))


@SINCE_2_11
@pytest.mark.usefixtures("active")
def test_sdpa_stays_as_it_is():
    query = torch.randn(1, 2, 9, 8)
    with torch.profiler.profile() as profile:
        F.scaled_dot_product_attention(query, query, query)
    names = {event.name for event in profile.events()}
    assert "aten::_scaled_dot_product_flash_attention_for_cpu" in names and "mfa::attention_forward" not in names


WRONG = {
    "debug mask": ({"return_debug_mask": True}, NotImplementedError, "return_debug_mask is True; it must be False"),
    "batch invariance": ({"num_splits": 1}, NotImplementedError, "num_splits is 1, .*; it must be None"),
    "lengths of keys alone": ({"cum_seq_k": integers([0, 60])}, ValueError, "cum_seq_q is None, but cum_seq_k"),
    "used keys without packed": ({"seqused_k": integers([3, 4])}, ValueError, "cum_seq_q is None, but"),
    "three dimensions": ({"query": torch.randn(2, 19, 16)}, ValueError, r"query has 3 dimensions; .* \(batch, length"),
    "int64": ({"cum_seq_q": torch.tensor([0, 19])}, TypeError, "cu_seqlens_q is int64; it must be int32"),
    "window": ({"window_size_left": -3}, ValueError, r"window_size is \(-3, -1\)"),
    "dropout": ({"dropout_p": 1.5}, ValueError, r"dropout_p is 1.5; it must be from 0 to 1"),
    "heads": ({"key": torch.randn(2, 30, 3, 16)}, ValueError, "key has 3 heads and value 2"),
}


@SINCE_2_11
@pytest.mark.usefixtures("active")
@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments(case):
    changes, error, words = WRONG[case]
    arguments = dict(zip(("query", "key", "value"), dense(), strict=True))
    arguments |= {"cum_seq_q": None, "cum_seq_k": None, "max_q": 19, "max_k": 30, "dropout_p": 0.0}
    arguments |= {"is_causal": False, "return_debug_mask": False}
    run = getattr(torch.ops.aten, FORWARD)
    if not {*changes} <= {argument.name for argument in run.default._schema.arguments}:
        pytest.skip("PyTorch 2.12 or later")
    if "cum_seq_q" in changes:
        arguments |= {name: arguments[name].flatten(0, 1) for name in ("query", "key", "value")}
        arguments["cum_seq_k"] = integers([0, 60])
    with pytest.raises(error, match=words):
        run(**arguments | changes)


@SINCE_2_11
@pytest.mark.usefixtures("active")
def test_what_has_no_gradient_in_pytorch():
    tensors = [t.requires_grad_() for t in dense()]
    with pytest.raises(NotImplementedError, match="alibi_slopes is given where a gradient is required"):
        operator(*tensors, alibi_slopes=torch.rand(4))
    sdpa = torch.ops.aten._scaled_dot_product_flash_attention
    query, key, value = (t.detach().transpose(1, 2) for t in tensors)
    with pytest.raises(ValueError, match="is_causal is True, with 19 queries and 30 keys"):
        sdpa(query, key.repeat(1, 2, 1, 1), value.repeat(1, 2, 1, 1), 0.0, True)


@SINCE_2_11
@pytest.mark.usefixtures("active")
@pytest.mark.parametrize("option", ["alibi_slopes", "seqused_k"])
def test_what_has_no_gradient_where_the_forward_pass_does_not_know(option):
    query, key, value = dense()
    options = {"alibi_slopes": torch.rand(4)}
    if option == "seqused_k":
        query, key, value = (t.flatten(0, 1) for t in (query, key, value))
        lengths = integers([0, 19, 38]), integers([0, 30, 60]), 19, 30
        options = {"seqused_k": integers([2, 30]), "lengths": lengths}

    def run(query):
        return operator(query, key, value, **options)[0].square().sum()

    torch.testing.assert_close(torch.compile(run, backend="aot_eager")(query), run(query))
    loss = torch.compile(run, backend="aot_eager")(query.clone().requires_grad_())
    for backward in (loss.backward, lambda: torch.func.grad(run)(query)):
        with pytest.raises(NotImplementedError, match="seqused_k, alibi_slopes or block_table is given where"):
            backward()


# --- On and off ----------------------------------------------------------------------------------


def has_kernels():
    present = [name for name in _KERNELS if hasattr(torch.ops.aten, name)]
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return {has(f"aten::{name}", key) for name in present for key in ("CPU", "MPS")}


@SINCE_2_11
def test_on_and_off():
    before = torch_attention.list_flash_attention_impls()
    with register_flash_attention_impl() as handle, register_flash_attention_impl("another"):
        assert torch_attention.list_flash_attention_impls() == sorted([*before, "another", "mfa"])
        assert has_kernels() == {False}
        for name in ("mfa", "another", "mfa"):
            torch_attention.activate_flash_attention_impl(name)
            assert torch_attention.current_flash_attention_impl() == name and has_kernels() == {True}
        torch_attention.restore_flash_attention_impl()
        assert has_kernels() == {False}
        with pytest.raises(NotImplementedError, match=FORWARD):
            operator(*dense())
        torch_attention.activate_flash_attention_impl("mfa")
        handle.remove()
        handle.remove()
        assert has_kernels() == {False} and torch_attention.current_flash_attention_impl() is None
    assert torch_attention.list_flash_attention_impls() == before


@SINCE_2_11
def test_registered_twice_or_by_another():
    """Only the last registration takes a name out, and what another registers under it stays."""
    before = torch_attention.list_flash_attention_impls()
    first, second = register_flash_attention_impl(), register_flash_attention_impl()
    torch_attention.activate_flash_attention_impl("mfa")
    first.remove()
    assert torch_attention.current_flash_attention_impl() == "mfa" and has_kernels() == {True}
    second.remove()
    assert torch_attention.list_flash_attention_impls() == before and has_kernels() == {False}
    implementations = torch_attention._registry._FLASH_ATTENTION_IMPLS
    try:
        with register_flash_attention_impl():
            torch_attention.register_flash_attention_impl("mfa", register_fn=print)
            with pytest.raises(ValueError, match=r'^name is "mfa"; it must not be that of another'):
                register_flash_attention_impl()
        assert implementations["mfa"] is print
    finally:
        implementations.pop("mfa", None)


@pytest.mark.parametrize(
    "name, error, words", [("", ValueError, 'is ""; it must not'), (3, TypeError, "is 3; .* string")]
)
def test_no_name(name, error, words):
    with pytest.raises(error, match=f"^name {words}"):
        register_flash_attention_impl(name)


@SINCE_2_11
def test_name_of_another():
    with pytest.raises(ValueError, match=r'^name is "FA4"; it must not be that of another'):
        register_flash_attention_impl("FA4")


def test_old_pytorch(monkeypatch):
    monkeypatch.delattr(torch_attention, "restore_flash_attention_impl", raising=False)
    with pytest.raises(ImportError, match=r"has no torch.nn.attention.restore_flash_.*PyTorch 2.11 or later"):
        register_flash_attention_impl()
