"""SDPA of nested tensors with the jagged layout after replace_sdpa(), against SDPA of each sequence in double."""

import pytest
import torch
import torch.nn.functional as F
from torch.nested._internal import ops
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from calls import calls
from mps_flash_attn import explain, flash_attention_varlen, replace_sdpa, replaced_sdpa, sdpa_stats
from mps_flash_attn.sdpa import jagged
from stand_in import DTYPES

pytestmark = [pytest.mark.usefixtures("everything", "one_thread"), pytest.mark.filterwarnings("ignore")]

LENGTHS = (3, 40, 1, 17)
OFFSETS = torch.tensor([0, 3, 43, 44, 61])
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
SHOWS_HOOKS = hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks")
TRACED = "traced into a compiled graph"


def rows(lengths=LENGTHS, heads=4, columns=16, dtype=torch.float32):
    return torch.randn(sum(lengths), heads, columns).to(dtype)


def nested(values, lengths=LENGTHS, offsets=OFFSETS):
    """(B, H, j, D) of (total, H, D) rows."""
    extremes = {"min_seqlen": min(lengths), "max_seqlen": max(lengths)}
    return torch.nested.nested_tensor_from_jagged(values, offsets, **extremes).transpose(1, 2)


def attend(query, key, value, kv_lengths=LENGTHS, **options):
    """The rows of the result of SDPA."""
    offsets = OFFSETS if kv_lengths == LENGTHS else torch.tensor([0, *kv_lengths]).cumsum(0)
    query, key, value = nested(query), nested(key, kv_lengths, offsets), nested(value, kv_lengths, offsets)
    out = F.scaled_dot_product_attention(query, key, value, **options)
    assert out.shape[:2] == query.shape[:2] and out.shape[3] == value.shape[3] and out.offsets() is query.offsets()
    assert out.stride()[1:] == (value.shape[3], out.shape[1] * value.shape[3], 1)
    return out.transpose(1, 2).values()


def one_by_one(query, key, value, kv_lengths=LENGTHS, **options):
    """The same by a call of SDPA for each sequence."""
    parts = zip(query.split(LENGTHS), key.split(kv_lengths), value.split(kv_lengths), strict=True)
    with sdpa_kernel(SDPBackend.MATH):
        outs = [F.scaled_dot_product_attention(*(t.transpose(0, 1) for t in part), **options) for part in parts]
    return torch.cat([out.transpose(0, 1) for out in outs])


def gradients(function, tensors, d_out, **options):
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = function(*leaves, **options)
    return out.detach(), *torch.autograd.grad(out, leaves, d_out)


def close(found, expected, dtype=torch.float32):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


CASES = {
    "plain": {},
    "causal": {"is_causal": True},
    "scale": {"scale": 0.3},
    "grouped": {"enable_gqa": True, "is_causal": True},
    "other keys": {"kv_lengths": (20, 5, 7, 31)},
    "other keys, causal": {"kv_lengths": (20, 5, 7, 31), "is_causal": True},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_results_and_gradients(case, dtype):
    options = CASES[case]
    of_keys = options.get("kv_lengths", LENGTHS), 2 if case == "grouped" else 4
    tensors = [rows(dtype=dtype), rows(*of_keys, dtype=dtype), rows(*of_keys, columns=24, dtype=dtype)]
    d_out = rows(columns=24, dtype=dtype)
    found, counts = calls(gradients, attend, tensors, d_out, **options)
    assert counts == {"replaced": 1} and all(one.dtype is dtype for one in found)
    exact = [t.double() for t in tensors]
    close(found, gradients(one_by_one, exact, d_out.double(), **options), dtype)


def test_rows_of_one_tensor():
    """Queries, keys and values are parts of one tensor, and are read where they lie."""
    whole = torch.randn(sum(LENGTHS), 3, 4, 16, requires_grad=True)
    found, counts = calls(attend, *whole.unbind(1))
    assert counts == {"replaced": 1}
    expected = one_by_one(*whole.unbind(1))
    d_out = rows()
    close(torch.autograd.grad(found, whole, d_out), torch.autograd.grad(expected, whole, d_out))


def test_offsets_of_their_own():
    """Key and value have equal offsets in two tensors; other ones are left to PyTorch."""
    tensors = [nested(rows(), offsets=OFFSETS.clone()) for _ in range(3)]
    out, counts = calls(F.scaled_dot_product_attention, *tensors)
    close([out.values()], [one_by_one(*(t.values().transpose(0, 1) for t in tensors)).transpose(0, 1)])
    assert counts == {"replaced": 1}
    tensors[2] = nested(rows(), (4, 39, 1, 17), torch.tensor([0, 4, 43, 44, 61]))
    assert explain(*tensors).reason == "nested tensors: lengths of key and value"


def test_gaps_between_keys():
    """A cache that is used in part, as torch.nested.narrow makes it: its gaps are NaN here, and are not read."""
    used, first = torch.tensor([3, 50, 0, 44]), torch.tensor([0, 7, 2, 6])
    caches = [torch.full((4, 60, 4, 16), torch.nan) for _ in range(2)]
    places = [slice(int(n), int(n + m)) for n, m in zip(first, used, strict=True)]
    for cache in caches:
        for b, place in enumerate(places):
            cache[b, place] = torch.randn(place.stop - place.start, 4, 16)
        cache.requires_grad_()
    query, d_out = rows().requires_grad_(), rows()

    def narrowed(cache):
        return torch.nested.narrow(cache, 1, first, used, layout=torch.jagged).transpose(1, 2)

    def attention():
        out = F.scaled_dot_product_attention(nested(query), *map(narrowed, caches)).transpose(1, 2).values()
        return out.detach(), *torch.autograd.grad(out, (query, *caches), d_out)

    found, counts = calls(attention)
    assert counts == {"replaced": 1} and explain(nested(query), *map(narrowed, caches), backward=True)
    parts = [[cache[b, place].detach() for b, place in enumerate(places)] for cache in caches]
    kv_lengths = tuple(used.tolist())
    tensors = [query, *map(torch.cat, parts)]
    out, of_query, *of_rows = gradients(one_by_one, tensors, d_out, kv_lengths=kv_lengths)
    expected = [torch.zeros(4, 60, 4, 16) for _ in range(2)]
    for gradient, each in zip(expected, of_rows, strict=True):
        for b, (place, part) in enumerate(zip(places, each.split(kv_lengths), strict=True)):
            gradient[b, place] = part
    close(found, (out, of_query, *expected))
    other = narrowed(caches[1].detach().roll(1, 0))
    assert explain(nested(query), narrowed(caches[0]), other)
    shorter = torch.nested.narrow(caches[1], 1, first, used.clamp(max=40), layout=torch.jagged).transpose(1, 2)
    dense = nested(torch.randn(97, 4, 16), (3, 50, 0, 44), torch.tensor([0, 3, 53, 53, 97]))
    for value in (shorter, dense):
        reason = explain(nested(query), narrowed(caches[0]), value).reason
        assert reason == "nested tensors: lengths of key and value"


def test_dropout():
    tensors, starts = [rows() for _ in range(3)], OFFSETS.int()
    d_out = rows()

    def seeded(function, *arguments, **options):
        torch.manual_seed(7)
        return gradients(lambda *t: function(*t, *arguments, dropout_p=0.3, **options), tensors, d_out)

    found, counts = calls(seeded, attend, is_causal=True)
    assert counts == {"replaced": 1}
    close(found, seeded(flash_attention_varlen, starts, starts, 40, 40, True))


def gaps():
    whole, starts, lengths = torch.randn(4, 9, 4, 16), torch.tensor([0, 1, 2, 3]), torch.tensor([3, 8, 1, 5])
    return torch.nested.narrow(whole, 1, starts, lengths, layout=torch.jagged).transpose(1, 2)


def unaligned():
    memory = torch.zeros(sum(LENGTHS) * 64 * 4 + 1, dtype=torch.uint8)
    values = torch.frombuffer(memory.numpy(), dtype=torch.float32, count=sum(LENGTHS) * 64, offset=1)
    return nested(values.copy_(torch.randn(values.shape)).view(-1, 4, 16))


LEFT = {
    "mask": (lambda: nested(rows()), {"attn_mask": torch.ones(4, 1, 40, 40).bool()}, "nested tensors: attn_mask"),
    "gaps": (gaps, {}, "nested tensors: gaps between the queries"),
    "three dimensions": (lambda: nested(rows()).transpose(1, 2).flatten(2), {}, "nested tensors: not (B, H, j, D)"),
    "memory": (unaligned, {}, "memory that is not aligned to its elements"),
    "dropout": (lambda: nested(rows()), {"dropout_p": 1.5}, "dropout_p"),
    "scale": (lambda: nested(rows()), {"scale": -1.0}, "scale is not a positive number"),
}


@pytest.mark.parametrize("case", LEFT)
def test_what_pytorch_keeps(case):
    """It has the results and errors of PyTorch, and explain() says why."""
    make, options, reason = LEFT[case]
    tensor = make()

    def outcome():
        try:
            return F.scaled_dot_product_attention(tensor, tensor, tensor, **options).values()
        except (ValueError, RuntimeError) as error:
            return type(error), str(error)

    expected = outcome()
    found, counts = calls(outcome)
    assert counts == {reason: 1}
    assert found == expected if isinstance(expected, tuple) else torch.equal(found, expected)
    with replaced_sdpa():
        mask = options.get("attn_mask")
        given = {name: one for name, one in options.items() if name != "attn_mask"}
        found = explain(tensor, tensor, tensor, attn_mask=mask, **given)
    assert not found and found.reason == reason


def test_unfused_is_requested():
    with sdpa_kernel(SDPBackend.MATH):
        _, counts = calls(attend, *(rows() for _ in range(3)))
    assert counts == {"flash attention is disabled": 1}


def test_heads_differ_without_enable_gqa():
    query, key = nested(rows()), nested(rows(heads=2))
    assert explain(query, key, key).reason == "nested tensors: head counts"
    assert explain(query, key, key, enable_gqa=True, is_causal=True, backward=True).kernel.startswith("backward_")
    plain = torch.randn(4, 4, 9, 16)
    assert explain(query, plain, plain).reason == "nested tensors together with others"


def test_ragged_batch():
    """Where the ragged dimension is a part of the batch PyTorch calls SDPA of the plain tensors."""
    tensor = torch.nested.nested_tensor([torch.randn(n, 7, 16) for n in (3, 5)], layout=torch.jagged)
    out, counts = calls(F.scaled_dot_product_attention, tensor, tensor, tensor)
    assert counts == {"replaced": 1} and out.values().shape == (8, 7, 16)


@pytest.mark.parametrize("mode", ["autocast", "inference_mode", "compile", "checkpoint"])
def test_modes(mode):
    tensors, d_out = [rows() for _ in range(3)], rows()
    if mode == "checkpoint" and not SHOWS_HOOKS:
        pytest.skip("this PyTorch does not show its hooks for saved tensors")
    if mode == "checkpoint":  # forward alone is replaced, and recomputed as it ran
        leaves = [t.requires_grad_() for t in tensors]
        out, counts = calls(checkpoint, attend, *leaves, use_reentrant=False)
        found = torch.autograd.grad(out, leaves, d_out)
        assert counts == {"replaced": 1} and sdpa_stats() == {"replaced": 2}
        close(found, gradients(one_by_one, tensors, d_out)[1:])
    elif mode == "compile":
        torch._dynamo.reset()
        tensors = [nested(t) for t in tensors]
        compiled = torch.compile(F.scaled_dot_product_attention, backend="aot_eager", fullgraph=True)
        out, counts = calls(compiled, tensors[0], tensors[1], tensors[1], is_causal=True)
        assert set(counts) == {TRACED}
        expected, _ = calls(F.scaled_dot_product_attention, tensors[0], tensors[1], tensors[1], is_causal=True)
        close([out.values()], [expected.values()])
    else:
        context = torch.autocast("cpu", torch.bfloat16) if mode == "autocast" else torch.inference_mode()
        with context:
            tensors = [rows() for _ in range(3)]
            out, counts = calls(attend, *tensors)
        assert counts == {"replaced": 1} and out.dtype is (torch.bfloat16 if mode == "autocast" else torch.float32)
        dtype = torch.bfloat16 if mode == "autocast" else torch.float32
        close([out.detach()], [one_by_one(*tensors)], dtype)


def test_on_and_off():
    before = ops.jagged_scaled_dot_product_attention
    first, second = replace_sdpa(), replace_sdpa()
    assert ops.jagged_scaled_dot_product_attention is jagged.attention
    first.remove()
    assert ops.jagged_scaled_dot_product_attention is jagged.attention
    second.remove()
    assert ops.jagged_scaled_dot_product_attention is before is not jagged.attention


def test_another_replacement_is_kept():
    """Who took the place after us keeps it, and its calls of ours reach PyTorch's function. Ours, when it is restored
    late, neither runs calls nor takes itself for PyTorch's."""
    before, tensors = ops.jagged_scaled_dot_product_attention, [rows() for _ in range(3)]
    handle = replace_sdpa()
    ops.jagged_scaled_dot_product_attention = lambda *args, **options: jagged.attention(*args, **options)
    attend(*tensors)
    assert sdpa_stats() == {"replaced": 1}
    handle.remove()
    attend(*tensors)
    ops.jagged_scaled_dot_product_attention = jagged.attention
    attend(*tensors)
    assert sdpa_stats() == {"replaced": 1}
    with replaced_sdpa():
        attend(*tensors)
        F.scaled_dot_product_attention(*(nested(t, LENGTHS) for t in tensors), attn_mask=None, dropout_p=0.0)
    assert sdpa_stats() == {"replaced": 3}
    assert ops.jagged_scaled_dot_product_attention is before
