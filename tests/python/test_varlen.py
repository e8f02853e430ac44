"""flash_attention_varlen, of packed sequences, against flash_attention of each sequence and attention written out."""

import functools

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck
from torch.nn.attention.bias import causal_lower_right
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import sequences
from mps_flash_attn import explain, flash_attention, flash_attention_varlen, run
from mps_flash_attn.options import Options
from mps_flash_attn.problem import Inputs
from sequences import cumulative, gradients, integers, one_by_one, problem
from stand_in import DTYPES, FLOAT64

pytestmark = [pytest.mark.usefixtures("one_thread")]
FORWARD = torch.ops.mfa.attention_forward.default
BACKWARD = torch.ops.mfa.attention_backward.default
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
LENGTHS = {
    "alike": ((64, 64), (64, 64)),
    "ragged": ((3, 70, 1, 130), (3, 70, 1, 130)),
    "cross": ((3, 70, 1, 33), (50, 7, 130, 1)),
    "empty": ((0, 5, 0, 7, 0), (3, 0, 0, 9, 0)),
    "one": ((37,), (91,)),
    "decode": ((1, 1, 1), (100, 1, 700)),
}
OPTIONS = {
    "plain": {},
    "causal": {"is_causal": True},
    "bottom right": {"is_causal": "bottom_right"},
    "window": {"window_size": (20, 3)},
    "window of keys": {"window_size": 9, "is_causal": "bottom_right"},
    "softcap": {"softcap": 3.0, "scale": 0.7},
}


def close(found, expected, dtype=torch.float32):
    tolerance = TOLERANCE[dtype]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def attend(*arguments, **options):
    return flash_attention_varlen(*arguments, enable_gqa=True, return_lse=True, **options)


def both(arguments, dtype=torch.float32, with_lse=True, **options):
    """Results and gradients of one call and of a call for each sequence."""
    tensors, others = arguments[:3], arguments[3:]
    d_out = torch.randn(*tensors[0].shape[:2], tensors[2].shape[2]).to(dtype)
    d_lse = torch.randn(tensors[0].shape[1], tensors[0].shape[0]) if with_lse else None
    found = gradients(lambda *t: attend(*t, *others, **options), tensors, d_out, d_lse)
    return found, gradients(lambda *t: one_by_one(*t, *others, enable_gqa=True, **options), tensors, d_out, d_lse)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("options", OPTIONS)
def test_as_one_by_one(options, lengths, dtype):
    arguments = problem(*LENGTHS[lengths], dtype=dtype, first=2, after=5)
    close(*both(arguments, dtype, **OPTIONS[options]), dtype)


@pytest.mark.parametrize("lengths", LENGTHS)
def test_with_masks_sinks_and_slopes(lengths):
    q_lens, kv_lens = LENGTHS[lengths]
    arguments = problem(q_lens, kv_lens)
    shape = len(q_lens), 4, max(q_lens), max(kv_lens)
    for mask in (torch.randn(shape), torch.rand(shape) < 0.7, torch.randn(shape[2:])):
        options = {"attn_mask": mask, "sinks": torch.randn(shape[:2]), "alibi_slopes": torch.rand(4)}
        close(*both(arguments, is_causal="bottom_right", **options))


def test_gradients_of_masks_and_sinks():
    arguments = problem((3, 20, 7), (9, 5, 21))
    for mask, sinks in ((torch.randn(3, 4, 20, 21), torch.randn(3, 4)), (torch.randn(20, 21), torch.randn(4))):

        def run(function, query, mask, sinks, others=tuple(arguments[1:])):
            options = {"attn_mask": mask, "sinks": sinks, "enable_gqa": True, "return_lse": True}
            return function(query, *others, **options)

        d_out = torch.randn_like(arguments[0])
        of_query = arguments[0], mask, sinks
        found = gradients(functools.partial(run, flash_attention_varlen), of_query, d_out)
        close(found, gradients(functools.partial(run, one_by_one), of_query, d_out))


def test_same_bits_as_alone():
    """Sequences that have the same tiles by themselves."""
    arguments = problem((64, 64), (64, 64))
    out, lse = attend(*arguments, is_causal=True)
    for b in range(2):
        alone = [t[64 * b : 64 * b + 64].transpose(0, 1)[None] for t in arguments[:3]]
        expected = flash_attention(*alone, True, enable_gqa=True, return_lse=True)
        assert torch.equal(out[64 * b : 64 * b + 64].transpose(0, 1), expected[0][0])
        assert torch.equal(lse[:, 64 * b : 64 * b + 64], expected[1][0])


def test_same_bits_for_any_number_of_threads():
    arguments = problem((3, 170, 1, 130), (3, 170, 900, 130))
    d_out = torch.randn_like(arguments[0])
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(gradients(lambda *t: attend(*t, *arguments[3:]), arguments[:3], d_out))
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, found[0], found[1])) and all(map(torch.equal, found[0], found[2]))


@pytest.mark.parametrize("used", [None, (2, 0, 40)], ids=["all", "some"])
@pytest.mark.parametrize("padding", [None, (1, 0, 17)], ids=["no padding", "padding"])
def test_keys_that_do_not_count(used, padding):
    arguments = problem((5, 9, 30), (7, 11, 50))
    options = {name: integers(n) for name, n in (("seqused_k", used), ("leftpad_k", padding)) if n is not None}
    found, expected = both(arguments, is_causal="bottom_right", **options)
    close(found, expected)
    starts = arguments[4]
    for b in range(3):
        end = int(starts[b + 1]) if used is None else int(starts[b]) + used[b]
        first = int(starts[b]) + (padding[b] if padding else 0)
        for gradient in found[3:]:
            assert not gradient[int(starts[b]) : first].any() and not gradient[end : int(starts[b + 1])].any()


def test_rows_of_no_sequence():
    """They are NaN here, and are not read."""
    arguments = problem((3, 9), (5, 9), first=4, after=6)
    d_out = torch.randn_like(arguments[0])
    out, lse, *found = gradients(lambda *t: attend(*t, *arguments[3:]), arguments[:3], d_out)
    for rows in (out, found[0]):
        assert not rows[:4].any() and not rows[16:].any() and rows[4:16].isfinite().all()
    assert lse[:, :4].eq(-torch.inf).all() and lse[:, 16:].eq(-torch.inf).all()
    for rows in found[1:]:
        assert not rows[:4].any() and not rows[18:].any() and rows[4:18].isfinite().all()


def test_nothing_at_all():
    for q_lens in ((), (0, 0)):
        arguments = problem(q_lens, q_lens)
        leaves = [t.requires_grad_() for t in arguments[:3]]
        out, lse = attend(*leaves, *arguments[3:])
        assert out.shape == (0, 4, 16) and lse.shape == (4, 0)
        assert all(not t.numel() for t in torch.autograd.grad(out.sum(), leaves))


def test_largest_lengths_may_be_larger():
    *arguments, q_len, kv_len = problem((3, 20, 7), (9, 5, 21))
    close(attend(*arguments, 1000, 5000), attend(*arguments, q_len, kv_len))


def test_any_strides():
    arguments = problem((3, 20, 7), (9, 5, 21))
    expected = attend(*arguments)
    heads_first = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in arguments[:3]]
    apart = [integers([[n, -7] for n in t.tolist()])[:, 0] for t in arguments[3:5]]
    assert all(map(torch.equal, attend(*heads_first, *apart, *arguments[5:]), expected))
    out = flash_attention_varlen(*arguments, enable_gqa=True)
    assert out.stride() == arguments[0].stride()


@FLOAT64
def test_gradcheck():
    arguments = problem((3, 0, 5), (4, 2, 7), head_dim=4, value_dim=3, dtype=torch.float64)
    step = 2**-10
    sinks = (torch.randn(4) / step).round().double() * step  # read as float32, which holds these exactly
    leaves = [*arguments[:3], torch.randn(5, 7, dtype=torch.float64), sinks]

    def run(query, key, value, mask, sinks):
        options = {"attn_mask": mask, "sinks": sinks, "softcap": 3.0, "is_causal": "bottom_right"}
        out, lse = attend(query, key, value, *arguments[3:], seqused_k=integers([4, 1, 6]), **options)
        return out, lse.masked_fill(lse.isinf(), 0)

    leaves = [t.requires_grad_() for t in leaves]
    assert torch.autograd.gradcheck(run, leaves, eps=step, atol=2e-5, rtol=1e-4, fast_mode=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.autograd.gradgradcheck(run, leaves, fast_mode=True)


def test_dropout():
    """Sequence b of a seed has the mask that batch entry b has."""
    arguments = problem((33, 33), (20, 20))
    dropped = {"dropout_p": 0.4, "dropout_seed": 5}
    query, key, value = (t.unflatten(0, (2, -1)).transpose(1, 2) for t in arguments[:3])
    expected = flash_attention(query, key, value, enable_gqa=True, **dropped)
    out, _ = attend(*arguments, **dropped)
    torch.testing.assert_close(out, expected.transpose(1, 2).flatten(0, 1))
    assert not torch.equal(attend(*arguments, dropout_p=0.4)[0], attend(*arguments, dropout_p=0.4)[0])


def test_block_mask():
    arguments = problem((33, 64), (70, 64))
    blocks = torch.rand(2, 4, 4, 5) < 0.6
    mask = blocks.repeat_interleave(16, -2).repeat_interleave(16, -1)[..., :64, :70]
    close(attend(*arguments, block_mask=blocks, block_size=16), attend(*arguments, attn_mask=mask))


def test_lengths_changed_before_backward():
    arguments = problem((3, 20, 7), (9, 5, 21))
    out, _ = attend(arguments[0].requires_grad_(), *arguments[1:])
    arguments[3].add_(0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_memory_grows_with_the_rows():
    """Not with the padded batch, which would have 64 times as many."""
    lengths = (4096, *(1,) * 63)
    arguments = problem(lengths, lengths, heads=1, kv_heads=1)
    found = explain(*arguments[:3], **dict(zip(sequences.NAMES, arguments[3:], strict=True)))
    padded = torch.empty(64, 1, 4096, 16)
    assert found.workspace_bytes < explain(padded, padded, padded).workspace_bytes + 4 * arguments[0].nbytes


# --- Through PyTorch -----------------------------------------------------------------------------


def operator_inputs(arguments, **others):
    query, key, value, cu_q, cu_k, q_len, kv_len = arguments
    tensors = [t.detach()[None].transpose(1, 2) for t in (query, key, value)]
    return Inputs(*tensors, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, **others), {"max_q": q_len, "max_kv": kv_len}


def test_opcheck():
    inputs, most = operator_inputs(problem((3, 0, 20), (9, 5, 21)), seqused_k=integers([9, 2, 20]))
    inputs = inputs._replace(sinks=torch.randn(3, 4), attn_mask=torch.randn(20, 21))
    options = Options(upper=0, bottom_right=True, **most)
    opcheck(FORWARD, (*inputs._replace(query=inputs.query.clone().requires_grad_()), *options))
    out, lse = FORWARD(*inputs, *options)
    opcheck(BACKWARD, (torch.randn_like(out), torch.randn_like(lse), *inputs, out, lse, *options, [True] * 5))


@pytest.mark.parametrize("route", ["compile", "checkpoint", "func.grad", "subclass"])
def test_routes(route):
    arguments = problem((3, 20, 7), (9, 5, 21))
    tensors, others = arguments[:3], arguments[3:]
    d_out = torch.randn_like(tensors[0])

    def run(*tensors):
        return attend(*tensors, *others, is_causal="bottom_right")

    expected = gradients(run, tensors, d_out)
    if route == "func.grad":
        found = torch.func.grad(lambda *t: (run(*t)[0] * d_out).sum(), (0, 1, 2))(*tensors)
        return close(found, expected[2:])
    if route == "subclass":

        class Subclass(torch.Tensor):
            pass

        out = flash_attention_varlen(tensors[0].as_subclass(Subclass), *arguments[1:], "bottom_right", enable_gqa=True)
        assert type(out) is Subclass
        return close([out.as_subclass(torch.Tensor)], expected[:1])
    routes = {
        "compile": torch.compile(run, fullgraph=True, backend="aot_eager"),
        "checkpoint": lambda *tensors: checkpoint(run, *tensors, use_reentrant=False),
    }
    close(gradients(routes[route], tensors, d_out), expected)


def test_compiled_once_for_all_lengths():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attend, backend=counter, fullgraph=True, dynamic=True)
    for q_lens, kv_lens in (((3, 20, 7, 2), (9, 5, 21, 1)), ((8, 9, 10, 11, 6), (12, 3, 4, 5, 6)), ((40, 2), (30, 33))):
        arguments = problem(q_lens, kv_lens)
        close(compiled(*arguments, is_causal=True), attend(*arguments, is_causal=True))
    assert counter.frame_count == 1


def test_exported(tmp_path):
    class Model(torch.nn.Module):
        def forward(self, query, key, value, cu_q, cu_k):
            return flash_attention_varlen(query, key, value, cu_q, cu_k, 20, 21, enable_gqa=True)

    arguments = problem((3, 20, 7), (9, 5, 21))
    program = torch.export.export(Model(), tuple(arguments[:5]))
    torch.export.save(program, tmp_path / "varlen.pt2")
    found = torch.export.load(tmp_path / "varlen.pt2").module()(*arguments[:5])
    assert torch.equal(found, Model()(*arguments[:5]))


@pytest.mark.parametrize("places", [(0, 0, 0), (0, None, None), (2, 1, 0)], ids=str)
def test_vmap(places):
    arguments = problem((3, 20, 7), (9, 5, 21))
    mapped = [
        t if place is None else torch.stack([t, t.flip(2)], place)
        for t, place in zip(arguments[:3], places, strict=True)
    ]

    def run(*tensors):
        return attend(*tensors, *arguments[3:])[0]

    found = torch.vmap(run, places)(*mapped)
    derived = torch.vmap(torch.func.grad(lambda *t: run(*t).square().sum()), places)(*mapped)
    for n in range(2):
        sample = [t if place is None else t.select(place, n) for t, place in zip(mapped, places, strict=True)]
        close([found[n]], [run(*sample)])
        close([derived[n]], [torch.func.grad(lambda *t: run(*t).square().sum())(*sample)])


def test_vmap_of_lengths():
    arguments = problem((3, 20, 7), (9, 5, 21))
    lengths = torch.stack([arguments[3], cumulative((10, 10, 10))])
    found = torch.vmap(lambda cu: attend(*arguments[:3], cu, *arguments[4:])[0])(lengths)
    for n in range(2):
        close([found[n]], [attend(*arguments[:3], lengths[n], *arguments[4:])[0]])


def test_autocast():
    arguments = problem((3, 20, 7), (9, 5, 21))
    cast = [t.bfloat16() for t in arguments[:3]]
    expected = attend(*cast, *arguments[3:])
    with torch.autocast("cpu", torch.bfloat16):
        found = attend(*arguments)
        compiled = torch.compile(attend, backend="aot_eager")(*arguments)
    assert found[0].dtype == torch.bfloat16 and torch.equal(found[0], expected[0])
    assert torch.equal(compiled[0], expected[0])


def test_flops():
    arguments = problem((3, 20, 0, 7), (9, 5, 4, 21))
    tensors = [t.requires_grad_() for t in arguments[:3]]
    work = 2 * 4 * (3 * 9 + 20 * 5 + 7 * 21) * 16
    with FlopCounterMode(display=False) as forward:
        out, _ = attend(*tensors, *arguments[3:])
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    assert forward.get_total_flops() == 2 * work and backward.get_total_flops() == 5 * work


def test_meta():
    arguments = [t.to("meta") if isinstance(t, torch.Tensor) else t for t in problem((3, 20), (9, 21))]
    inputs, most = operator_inputs(arguments)
    out, lse = FORWARD(*inputs, *Options(**most))
    assert out.shape == (1, 4, 23, 16) and lse.shape == (1, 4, 23) and out.is_meta


def test_explain():
    arguments = problem((3, 20), (9, 21))
    lengths = dict(zip(sequences.NAMES, arguments[3:], strict=True))
    assert "_varlen_" in explain(*arguments[:3], enable_gqa=True, **lengths).kernel
    assert explain(*arguments[:3], enable_gqa=True, backward=True, **lengths).kernel.startswith("backward")


# --- Errors --------------------------------------------------------------------------------------


def changed(place, change):
    def spoil(arguments):
        arguments[place] = change(arguments[place])

    return spoil


WRONG = {
    "int64": (
        changed(3, torch.Tensor.long),
        TypeError,
        r"cu_seqlens_q is int64; it must be int32: .*to\(torch",
    ),
    "float": (changed(4, torch.Tensor.float), TypeError, "cu_seqlens_k is float32; it must be int32"),
    "list": (changed(3, torch.Tensor.tolist), TypeError, "cu_seqlens_q is a list; it must be a torch.Tensor"),
    "two dimensions": (changed(3, lambda t: t[None]), ValueError, r"cu_seqlens_q has the shape \(1, 4\); it must be"),
    "no numbers": (changed(3, lambda t: t[:0]), ValueError, r"cu_seqlens_q has the shape \(0,\); it must be"),
    "numbers": (changed(4, lambda t: t[:-1]), ValueError, "cu_seqlens_q has 4 numbers and cu_seqlens_k has 3"),
    "none": (changed(4, lambda t: None), ValueError, "cu_seqlens_k is None; without a block_table"),
    "device": (changed(3, lambda t: t.to("meta")), ValueError, "cu_seqlens_q is on meta and query on cpu"),
    "dimensions": (changed(0, lambda t: t[None]), ValueError, r"query has 4 dimensions; it must have 3: \(total"),
    "value": (changed(2, lambda t: t[0]), ValueError, "value has 2 dimensions; it must have 3"),
    "rows": (changed(2, lambda t: t[:-1]), ValueError, "key has the length 35 and value 34; they must be equal"),
    "heads": (changed(2, lambda t: t[:, :1]), ValueError, "key has 2 heads and value 1; they must be equal"),
    "max": (changed(5, lambda n: -1), ValueError, "max_seqlen_q is -1; it must be a whole number"),
    "fraction": (changed(6, lambda n: 21.5), ValueError, "max_seqlen_k is 21.5; it must be a whole number"),
    "falls": (changed(3, lambda t: integers([0, 20, 3, 30])), ValueError, "they must not fall"),
    "negative": (changed(3, lambda t: t - 1), ValueError, r"cu_seqlens_q\[0\] is -1 and .* within the 30 rows"),
    "beyond": (changed(4, lambda t: t + 1), ValueError, r"cu_seqlens_k\[2\] is .* within the 35 rows of total_kv"),
    "longer": (changed(5, lambda n: 19), ValueError, "that is more than q_len, 19"),
}
READ = ("falls", "negative", "beyond", "longer")  # found by reading the numbers


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=[pytest.mark.cpu(sequences.CLAMPED)] * (c in READ)) for c in WRONG]
)
def test_wrong_arguments(case):
    spoil, error, words = WRONG[case]
    arguments = problem((3, 20, 7), (9, 5, 21))
    spoil(arguments)
    with pytest.raises(error, match=words):
        attend(*arguments)


@pytest.mark.cpu(sequences.CLAMPED)
def test_wrong_numbers_write_nothing(monkeypatch):
    """The result that the call would have returned, which is not made anew here, is as it was."""
    arguments = problem((3, 20, 7), (9, 5, 21))
    made = []

    def empty(shape, strides, dtype):
        made.append(torch.full(shape, 7.0, dtype=dtype))
        return made[-1]

    monkeypatch.setattr(run, "_empty_on_cpu", empty)
    arguments[3] = integers([0, 3, 23, 31])
    with pytest.raises(ValueError, match="rows of total_q"):
        attend(*arguments)
    assert len(made) == 2 and all(one.eq(7).all() for one in made)


@pytest.mark.cpu(sequences.CLAMPED)
def test_wrong_options():
    arguments = problem((3, 20, 7), (9, 5, 21))
    bias = causal_lower_right(20, 21)
    for options, error, words in (
        ({"attn_mask": bias}, ValueError, "attn_mask is a CausalBias, which is of one length"),
        ({"attn_mask": torch.randn(19, 21)}, ValueError, r"broadcastable to .* \(3, 4, 20, 21\)"),
        ({"sinks": torch.randn(2, 4)}, ValueError, r"sinks has the shape \(2, 4\); .* \(4,\) or \(3, 4\)"),
        ({"seqused_k": integers([1, 2])}, ValueError, "seqused_k has .* number of sequences, 3"),
        ({"seqused_k": integers([1, 6, 2])}, ValueError, r"seqused_k\[1\] is 6; it must be 0 to 5"),
        ({"leftpad_k": integers([1, 6, 2])}, ValueError, r"leftpad_k\[1\] is 6; it must be 0 to 5"),
        ({"seqused_k": [1, 2, 3]}, TypeError, "seqused_k is a list"),
        ({"is_causal": "left"}, ValueError, "is_causal is 'left'"),
        ({"block_mask": torch.ones(2, 2).bool()}, ValueError, "block_mask has the shape"),
    ):
        with pytest.raises(error, match=words):
            attend(*arguments, **options)


def test_wrong_calls_of_the_operator():
    inputs, most = operator_inputs(problem((3, 20, 7), (9, 5, 21)))
    for wrong, options, words in (
        (inputs, {}, "max_q is None and cu_seqlens_q given"),
        (Inputs(*inputs[:3]), most, "max_q is 20 and cu_seqlens_q not given"),
        (inputs._replace(query=inputs.query.expand(2, -1, -1, -1)), most, r"query has the shape \(2, .*\(1, heads"),
        (inputs._replace(cache_batch_idx=integers([0, 0, 0])), most, "varlen_kv is 1, .*cache_batch_idx"),
    ):
        with pytest.raises(ValueError, match=words):
            FORWARD(*wrong, *Options(**options))


def test_short_storage():
    arguments = problem((3, 20, 7), (9, 5, 21))
    arguments[3].untyped_storage().resize_(8)
    with pytest.raises(RuntimeError, match="cu_seqlens_q: sizes"):
        attend(*arguments)
