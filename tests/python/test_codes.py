"""Keys and values as codes of 8 or 4 bits: what they stand for, what they cost in precision, and how they are made and
appended. test_random_lengths.py crosses them with all options."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from mps_flash_attn import (
    Unsupported,
    append_kv,
    dequantize_kv,
    explain,
    flash_attention,
    flash_attention_kvcache,
    flash_attention_varlen,
    quantize,
    quantize_kv,
    reference,
)
from mps_flash_attn.codes import DTYPES as CODE_DTYPES
from mps_flash_attn.codes import FLOATS, NF4, PACKED
from mps_flash_attn.flash_attn import apply_rotary_emb, flash_attn_with_kvcache
from mps_flash_attn.library import KV_TYPES
from mps_flash_attn.options import Options
from mps_flash_attn.problem import Inputs
from sequences import cumulative, integers
from stand_in import DTYPES, FULL

pytestmark = pytest.mark.usefixtures("one_thread")
FORWARD = torch.ops.mfa.attention_forward.default
TYPES = tuple(KV_TYPES)


def cache(q_len=1, batch=3, kv_len=50, columns=64, dtype=torch.float32):
    """Queries, keys and values."""
    query = torch.randn(batch, 4, q_len, columns).to(dtype)
    return query, *(torch.randn(batch, 2, kv_len, columns).to(dtype) for _ in range(2))


def coded(key, value, kind, group=0):
    """The arguments of flash_attention_kvcache that are keys and values of this type: (positional, keywords)."""
    (k, k_scale), (v, v_scale) = (quantize_kv(one, kind, group) for one in (key, value))
    types = {"k_type": kind, "v_type": kind} if kind in PACKED else {}
    return (k, v), {"k_scale": k_scale, "v_scale": v_scale, **types}


def attend(*tensors, **options):
    return flash_attention_kvcache(*tensors, enable_gqa=True, **options)


def raw(codes):
    """Codes as bytes, which PyTorch can compare."""
    return codes.view(torch.uint8)


# --- What a code stands for ----------------------------------------------------------------------


def stands_for(kind):
    """(every code as a byte, the numbers that they stand for), by PyTorch and by the definitions."""
    if kind in PACKED:
        codes = torch.arange(16, dtype=torch.uint8)
        return codes, torch.tensor(NF4) if kind == "nf4" else torch.arange(-8, 8).float()
    codes = torch.arange(256, dtype=torch.int16).to(torch.uint8)
    return codes, codes.view(CODE_DTYPES[kind]).float()


@pytest.mark.parametrize("q_len", [1, 40], ids=["decode", "tiled"])
@pytest.mark.parametrize("kind", TYPES)
def test_every_code(kind, q_len):
    """Attention to one key is its value: code * scale, NaN and infinities of 8-bit floats included."""
    codes, numbers = stands_for(kind)
    query, key = torch.zeros(len(codes), 1, q_len, 8), torch.zeros(len(codes), 1, 1, 8)
    bytes_of = (codes | codes << 4 if kind in PACKED else codes)[:, None, None, None].expand(-1, 1, 1, 16)
    typed = bytes_of if kind in PACKED else bytes_of.view(CODE_DTYPES[kind])
    for scale in (None, torch.tensor(1.0), torch.tensor(-0.37)):
        found = flash_attention_kvcache(query, key, typed, v_scale=scale, v_type=kind)
        expected = (numbers if scale is None else numbers * scale)[:, None, None, None].expand_as(found)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0, equal_nan=True)
        decoded = dequantize_kv(typed, scale, kind)
        torch.testing.assert_close(decoded, expected[:, :, :1], rtol=0, atol=0, equal_nan=True)
        if kind in FLOATS:
            of_bytes = flash_attention_kvcache(query, key, bytes_of, v_scale=scale, v_type=kind)
            assert torch.equal(raw(found), raw(of_bytes))
            assert torch.equal(raw(found), raw(flash_attention_kvcache(query, key, typed, v_scale=scale)))


@pytest.mark.parametrize("heads", [1, 4, 8, 16])
@pytest.mark.parametrize("exponent", [-110, 122])
def test_scales_of_e4m3_near_the_ends(exponent, heads):
    """What its numbers have in common, 2^8, is a factor of neither too large nor too small a number."""
    numbers = torch.randn(1, 1, 70, 64).mul(0.1).to(torch.float8_e4m3fn)
    value, scale = numbers.double() * 2.0**exponent, torch.tensor(2.0**exponent)
    found = flash_attention_kvcache(
        torch.zeros(1, heads, 1, 64), torch.zeros(1, 1, 70, 64), numbers, v_scale=scale, enable_gqa=True
    )
    expected = value.mean(2, keepdim=True).expand(1, heads, 1, 64) / 2.0**exponent
    torch.testing.assert_close(found.double() / 2.0**exponent, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [0, 32, 64])
@pytest.mark.parametrize("kind", TYPES)
def test_quantize(kind, group, dtype):
    """libmfa and PyTorch's operations give the same codes and scales, 8-bit floats those of PyTorch's conversion."""
    numbers = torch.randn(3, 5, 7, 128).to(dtype)
    numbers[..., 17] *= 30
    numbers[0, 0, 0], numbers[0, 0, 1], numbers[1, 0, 0, ::2] = 0, -0.0, -0.0
    numbers = numbers.transpose(1, 2)
    codes, scale = quantize_kv(numbers, kind, group)
    assert codes.dtype == CODE_DTYPES.get(kind, torch.uint8) and codes.shape[:3] == scale.shape[:3] == (3, 7, 5)
    assert codes.shape[3] == 128 // (2 if kind in PACKED else 1) and scale.shape[3] == (128 // group if group else 1)
    others = quantize.by_torch(numbers, kind, group)
    assert torch.equal(raw(codes), raw(others[0])) and torch.equal(scale, others[1])
    found = dequantize_kv(codes, scale, kind, torch.float64)
    grouped = numbers.double().unflatten(-1, (scale.shape[3], -1))
    unit = {"int8": 0.5, "e4m3": 16, "e5m2": 4096, "int4": 1, "nf4": 0.16}[kind]  # int4's largest may be 8, as 7
    off = (found.unflatten(-1, (scale.shape[3], -1)) - grouped).abs()
    assert (off <= scale.abs().double()[..., None] * unit * (1 + 1e-5)).all()
    assert not off[0, 0, 0].any() and not scale[0, 0, 0].any()
    if kind in FLOATS:
        divided = numbers.float().unflatten(-1, (scale.shape[3], -1)) / scale[..., None]
        expected = divided.nan_to_num(0).flatten(-2).to(CODE_DTYPES[kind])
        assert torch.equal(codes.float(), expected.float())


# The root mean square errors that a type may have where a column is an outlier: of the other columns of keys, and of
# out, as parts of their own.
BOUNDS = {
    ("int8", 0): (0.026, 0.040),
    ("int8", 32): (0.014, 0.021),
    ("e4m3", 0): (0.029, 0.050),
    ("e5m2", 0): (0.058, 0.100),
    ("int4", 32): (0.21, 0.31),
    ("nf4", 32): (0.16, 0.25),
}


@pytest.mark.parametrize("kind, group", BOUNDS)
def test_outliers(kind, group):
    """One column of 128 is 10 times as large as the others, as in the keys of models; -s prints the errors."""
    query, key, value = cache(1, 4, 500, 128)
    query[..., 17] /= 10
    key[..., 17] *= 10
    tensors, options = coded(key, value, kind, group)

    def error(found, expected):
        return ((found - expected).pow(2).mean() / expected.pow(2).mean()).sqrt().item()

    others = torch.arange(128) != 17
    of_keys = error(dequantize_kv(tensors[0], options["k_scale"], kind)[..., others], key[..., others])
    of_result = error(attend(query, *tensors, **options), attend(query, key, value))
    print(f"{kind}, a scale for {group or 128} columns: error of keys {of_keys:.4f}, of out {of_result:.4f}")
    assert of_keys <= BOUNDS[kind, group][0] and of_result <= BOUNDS[kind, group][1]


# --- Attention -----------------------------------------------------------------------------------

SHARED = {  # of (3, 2, 50, 64) codes
    "one": torch.tensor(0.02),
    "heads": torch.rand(1, 2, 1, 1) / 30,
    "entries": torch.rand(3, 1, 1, 1) / 30,
    "tokens": torch.rand(1, 1, 50, 1) / 30,
    "columns": torch.rand(1, 1, 1, 2) / 30,
    "expanded": (torch.rand(1, 2, 1, 2) / 30).expand(3, -1, 50, -1),
    "any strides": (torch.rand(2, 50, 2, 6) / 30)[:, :, :, ::2].permute(3, 0, 1, 2),
}


@pytest.mark.parametrize("scale", SHARED)
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_scales_that_broadcast(kind, scale):
    """They are what the full tensor of scales is, and are not copied."""
    query, key, value = cache(3)
    (k, v), options = coded(key, value, kind)
    options |= {"k_scale": SHARED[scale], "v_scale": SHARED[scale]}
    found = attend(query, k, v, **options)
    full = (
        SHARED[scale].expand(3, 2, 50, -1).contiguous() if scale != "one" else SHARED[scale].expand(3, 2, 50, 1).clone()
    )
    assert torch.equal(found, attend(query, k, v, **(options | {"k_scale": full, "v_scale": full})))
    numbers = [dequantize_kv(one, SHARED[scale], kind) for one in (k, v)]
    torch.testing.assert_close(found, attend(query, *numbers), rtol=1e-4, atol=1e-5)
    assert torch.equal(dequantize_kv(k, SHARED[scale], kind), dequantize_kv(k, full, kind))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", TYPES)
def test_one_of_both(kind, dtype):
    """Keys are codes, and values numbers, or the other way round; no code * scale is rounded to the query's dtype."""
    query, key, value = cache(3, dtype=dtype)
    (k, v), options = coded(key, value, kind)
    of_key = Inputs(query, k, value, k_scale=options["k_scale"]), Options(k_type=kind)
    of_value = Inputs(query, key, v, v_scale=options["v_scale"]), Options(v_type=kind)
    for inputs, given in (of_key, of_value):
        scales = {"k_scale": inputs.k_scale, "v_scale": inputs.v_scale, "k_type": given.k_type, "v_type": given.v_type}
        reference.check(
            lambda *t, scales=scales: attend(*t[:3], return_lse=True, **scales), inputs, False, **given._asdict()
        )


@pytest.mark.parametrize("kind", TYPES)
def test_packed_sequences(kind):
    """Scales have the order of sizes that keys have: (total, heads, groups)."""
    lengths = (7, 0, 30)
    rows, starts = torch.randn(37, 4, 64), cumulative(lengths)
    key, value = torch.randn(2, 37, 2, 64)
    (k, v), options = coded(key, value, kind, 32)
    assert options["k_scale"].shape == (37, 2, 2)
    given = {"is_causal": True, "enable_gqa": True}
    found = flash_attention_varlen(rows, k, v, starts, starts, 30, 30, **given, **options)
    numbers = dequantize_kv(k, options["k_scale"], kind), dequantize_kv(v, options["v_scale"], kind)
    expected = flash_attention_varlen(rows, *numbers, starts, starts, 30, 30, **given)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


# --- Appending -----------------------------------------------------------------------------------


def empty(kind, paged, group, columns=64):
    """A cache of 2 sequences of 16 keys, as append_kv() takes it: (key, value, options)."""
    rows = (9, 2, 4) if paged else (2, 2, 16)
    width = columns // 2 if kind in PACKED else columns
    key, value = (torch.zeros(*rows, width, dtype=CODE_DTYPES.get(kind, torch.uint8)) for _ in range(2))
    groups = columns // group if group else 1
    options = {"k_scale": torch.zeros(*rows, groups), "v_scale": torch.zeros(*rows, groups)}
    options |= {"block_table": torch.randperm(9)[:8].view(2, 4).int()} if paged else {}
    return key, value, options | {"k_type": kind, "v_type": kind}


@pytest.mark.parametrize("group", [0, 32])
@pytest.mark.parametrize("paged", [False, True], ids=["dense", "pages"])
@pytest.mark.parametrize("kind", TYPES)
def test_append(kind, paged, group):
    """A prompt and then one token at a time, by append_kv and by flash_attn_with_kvcache: the cache has the codes that
    the rows have by themselves, and attention is that of their numbers."""
    key, value, options = empty(kind, paged, group)
    theirs = [one.transpose(1, 2).contiguous() for one in (key, value, options["k_scale"], options["v_scale"])]
    their_options = options | {"k_scale": theirs[2], "v_scale": theirs[3]}
    used, rows = integers([0, 3]), []
    for n, length in enumerate((5, 1, 1)):
        new = torch.randn(2, 2, 2, length, 64).bfloat16()
        query = torch.randn(2, 4, length, 64).bfloat16()
        before = used.clone()
        used = append_kv(key, value, *new, used, **options)
        assert used.tolist() == [sum((5, 1, 1)[: n + 1]), 3 + sum((5, 1, 1)[: n + 1])]
        rows.append([dequantize_kv(*quantize_kv(one, kind, group), kind) for one in new])
        found = attend(query.float(), key, value, "bottom_right", seqused_k=used, **options)
        own = [torch.cat(parts, 2) for parts in zip(*rows, strict=True)]
        for b in range(2):
            first = torch.zeros(1, 2, 3 * b, 64)
            tensors = [torch.cat([first, one[b : b + 1]], 2) for one in own]
            expected = flash_attention(query[b : b + 1].float(), *tensors, "bottom_right", enable_gqa=True)
            torch.testing.assert_close(found[b : b + 1], expected, rtol=1e-4, atol=1e-5)
        q, k, v = (one.transpose(1, 2) for one in (query, *new))
        out = flash_attn_with_kvcache(q, *theirs[:2], k, v, cache_seqlens=before, causal=True, **their_options)
        torch.testing.assert_close(
            out.transpose(1, 2), attend(query, key, value, "bottom_right", seqused_k=used, **options)
        )
    for one, other in zip(theirs, (key, value, options["k_scale"], options["v_scale"]), strict=True):
        assert torch.equal(raw(one.transpose(1, 2).contiguous()), raw(other.contiguous()))


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_flash_attn_with_kvcache(kind):
    """New keys are rotated, quantised and written to entries of a larger cache, whose sequences have padding."""
    q, k, v = (torch.randn(2, 1, heads, 64) for heads in (4, 2, 2))
    (k_cache, k_scale), (v_cache, v_scale) = (quantize_kv(torch.randn(5, 16, 2, 64), kind, 32) for _ in range(2))
    options = {"k_scale": k_scale, "v_scale": v_scale, "k_type": kind, "v_type": kind}
    where = {"cache_batch_idx": integers([4, 0]), "cache_leftpad": integers([2, 0]), "causal": True}
    lengths, (cos, sin) = integers([9, 15]), torch.rand(2, 16, 8)
    rotary = {"rotary_cos": cos, "rotary_sin": sin}
    found = flash_attn_with_kvcache(q, k_cache, v_cache, k, v, **rotary, cache_seqlens=lengths, **where, **options)
    turned, rotated = (apply_rotary_emb(one, cos, sin, True, seqlen_offsets=lengths) for one in (q, k))
    numbers = [dequantize_kv(*one, kind) for one in ((k_cache, k_scale), (v_cache, v_scale))]
    for cache_of, rows in zip(numbers, (rotated, v), strict=True):
        own = dequantize_kv(*quantize_kv(rows, kind, 32), kind)
        assert torch.equal(cache_of[4, 9], own[0, 0]) and torch.equal(cache_of[0, 15], own[1, 0])
    expected = flash_attn_with_kvcache(turned, *numbers, cache_seqlens=lengths + 1, **where)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    part = k_cache[:2], v_cache[:2], {**options, "k_scale": k_scale[:2], "v_scale": v_scale[:2]}
    own = flash_attn_with_kvcache(q, *part[:2], cache_seqlens=lengths, **part[2])
    assert torch.equal(flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=lengths, **options), own)


def test_append_by_index():
    """Into a larger cache, and of numbers that stay as they are."""
    key, value = torch.zeros(2, 5, 2, 16, 32)
    new, index = torch.randn(2, 2, 2, 3, 32), integers([4, 1])
    used = append_kv(key, value, *new, integers([0, 13]), cache_batch_idx=index)
    assert used.tolist() == [3, 16]
    assert torch.equal(key[4, :, :3], new[0, 0]) and torch.equal(value[1, :, 13:], new[1, 1])
    assert not key[[0, 2, 3]].any() and not key[4, :, 3:].any() and not value[1, :, :13].any()


@pytest.mark.parametrize("kind", TYPES)
def test_append_by_a_scale_that_is_given(kind):
    """Scales that rows share stay as they are; what is beyond the largest code gets that."""
    key, value, options = empty(kind, True, 0)
    largest = {"int8": 127, "e4m3": 448, "e5m2": 57344, "int4": 7, "nf4": 1}[kind]
    k_scale, v_scale = torch.tensor([2.0, 3.0]).view(1, 2, 1, 1) / largest, torch.tensor(2.5 / largest)
    options |= {"k_scale": k_scale, "v_scale": v_scale}
    new = torch.randn(2, 2, 2, 5, 64)
    new[0, 0, 1, 2, 7], new[1, 0, 0, 0, 1] = 100, -100
    used = append_kv(key, value, *new, integers([0, 3]), **options)
    assert k_scale.flatten().tolist() == [torch.tensor(2.0) / largest, torch.tensor(3.0) / largest]
    table, steps = options["block_table"].long(), {"int8": 1, "e4m3": 32, "e5m2": 8192, "int4": 1, "nf4": 0.31}[kind]
    for cache_of, rows, scale in ((key, new[0], k_scale), (value, new[1], v_scale)):
        numbers = (
            dequantize_kv(cache_of, scale, kind)[table].transpose(2, 3).flatten(1, 2)
        )  # (batch, rows, heads, columns)
        found = torch.stack([numbers[0, :5], numbers[1, 3:8]]).transpose(1, 2)
        limit = scale.expand(1, 2, 1, 1) * largest
        lowest = -limit * (8 / 7 if kind == "int4" else 1)
        off = (found - rows.clamp(lowest, limit)).abs()
        assert (off <= scale * steps / 2 * (1 + 1e-5)).all()
    torch.testing.assert_close(
        attend(new[0].repeat(1, 2, 1, 1), key, value, seqused_k=used, **options),
        attend(
            new[0].repeat(1, 2, 1, 1),
            *(dequantize_kv(one, scale, kind) for one, scale in ((key, k_scale), (value, v_scale))),
            seqused_k=used,
            block_table=options["block_table"],
        ),
        rtol=1e-4,
        atol=1e-5,
    )


def test_append_8_bit_floats_without_scales():
    key, value, _ = empty("e4m3", False, 0)
    new = torch.randn(2, 2, 2, 1, 64)
    append_kv(key, value, *new, integers([0, 15]))
    assert torch.equal(key[1, :, 15:].float(), new[0, 1].to(torch.float8_e4m3fn).float())


WRONG_APPENDS = {
    "full": ({"seqused_k": integers([0, 16])}, r"seqused_k\[1\] is 16, and 1 keys are appended; .* 16"),
    "lengths": ({"seqused_k": torch.tensor([0, 1])}, "seqused_k is int64 of the shape"),
    "rows": (
        {"new_key": torch.zeros(2, 2, 1, 32)},
        r"new_key has the shape \(2, 2, 1, 32\); it must be \(2, 2, 1, 64\)",
    ),
    "dimensions": ({"new_value": torch.zeros(2, 1, 64)}, "new_value has 3 dimensions; it must have 4"),
    "NaN": ({"new_value": torch.full((2, 2, 1, 64), torch.nan)}, "number 0 of row 0 is not finite"),
    "NaN of one scale": (
        {"new_value": torch.full((2, 2, 1, 64), torch.nan), "v_scale": torch.tensor(1.0)},
        "new_value has numbers that are NaN or infinite; as int8 they must be finite",
    ),
    "scale of 0": ({"v_scale": torch.zeros(1, 2, 1, 1)}, "v_scale is 0, NaN or infinite where new rows are"),
    "scale of heads": ({"v_scale": torch.zeros(2, 1, 16, 1)}, "v_scale has a scale for each row that entries,"),
    "scale of groups": ({"v_scale": torch.zeros(2, 2, 16, 1).expand(-1, -1, -1, 2)}, "that entries, heads or groups"),
    "number": ({"v_scale": 0.5}, "v_scale is a float; it must be a torch.Tensor"),
    "groups": ({"v_scale": torch.zeros(2, 2, 16, 3)}, "v_scale has 3 scales for a row of 64 columns"),
    "dtype": ({"new_key": torch.zeros(2, 2, 1, 64, dtype=torch.int32)}, "numbers is int32; it must be float32"),
    "numbers": ({"key": torch.zeros(2, 2, 16, 64)}, "k_scale is given and key is float32; only codes have scales"),
    "values": (
        {"value": torch.zeros(2, 2, 15, 64).to(torch.int8), "v_scale": None},
        "they must agree in all sizes but",
    ),
    "entries": (
        {name: torch.zeros(3, 2, 16, 64) for name in ("key", "value")} | {"k_scale": None, "v_scale": None},
        "key has 3 entries and new_key 2",
    ),
}


@pytest.mark.parametrize("case", WRONG_APPENDS)
def test_wrong_appends(case):
    """Refused before anything is written."""
    changed, words = WRONG_APPENDS[case]
    key, value, options = empty("int8", False, 0)
    arguments = {"key": key, "value": value, "new_key": torch.ones(2, 2, 1, 64), "new_value": torch.ones(2, 2, 1, 64)}
    arguments |= {"seqused_k": integers([0, 3]), "k_scale": options["k_scale"], "v_scale": options["v_scale"]}
    with pytest.raises((TypeError, ValueError), match=words):
        append_kv(**(arguments | changed))
    assert not key.any() and not value.any() and not options["k_scale"].any() and not options["v_scale"].any()


# --- Through PyTorch -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TYPES if FULL else ("int8", "e4m3", "nf4"))
def test_opcheck(kind):
    query, key, value = cache(3)
    tensors, options = coded(key, value, kind, 32)
    if kind in FLOATS:  # opcheck cannot compare these
        tensors = map(raw, tensors)
    scales = {"k_scale": options["k_scale"], "v_scale": torch.tensor(2.0).expand(3, 2, 50, 1)}
    inputs = Inputs(query, *tensors, **scales, seqused_k=integers([3, 50, 0]))
    opcheck(FORWARD, (*inputs, *Options(upper=0, bottom_right=True, k_type=kind, v_type=kind)))
    tests = ("test_faketensor", "test_autograd_registration") if kind in FLOATS else None  # it cannot compare these
    opcheck(torch.ops.mfa.quantize_kv.default, (key, kind, 32), **({"test_utils": tests} if tests else {}))


@pytest.mark.parametrize("kind", TYPES if FULL else ("e4m3",))
def test_compiled_decoding(kind):
    """Quantised, appended and attended to, in one graph for all steps."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    key, value, options = empty(kind, True, 32)

    def step(query, key, value, k_scale, v_scale, new_key, new_value, used):
        given = {**options, "k_scale": k_scale, "v_scale": v_scale}
        used = append_kv(key, value, new_key, new_value, used, **given)
        return attend(query, key, value, "bottom_right", seqused_k=used, **given), used

    compiled = torch.compile(step, backend=counter, fullgraph=True)
    caches = [[one.clone() for one in (key, value, options["k_scale"], options["v_scale"])] for _ in range(2)]
    lengths = [integers([0, 5])] * 2
    for _ in range(3):
        query, *new = torch.randn(2, 4, 1, 64), torch.randn(2, 2, 1, 64), torch.randn(2, 2, 1, 64)
        outs = []
        for n, function in enumerate((compiled, step)):
            out, lengths[n] = function(query, *caches[n], *new, lengths[n])
            outs.append(out)
        assert torch.equal(*outs) and torch.equal(*lengths)
    for one, other in zip(*caches, strict=True):
        assert torch.equal(raw(one), raw(other))
    assert counter.frame_count == 1


def test_vmap():
    query, key, value = cache(3)
    (k, v), options = coded(key, value, "int8")
    queries = torch.stack([query, -query])
    found = torch.vmap(lambda q: attend(q, k, v, **options))(queries)
    assert torch.equal(found, torch.stack([attend(q, k, v, **options) for q in queries]))
    codes = torch.stack([k, -k])
    found = torch.vmap(lambda c: attend(query, c, v, **options))(codes)
    assert torch.equal(found, torch.stack([attend(query, c, v, **options) for c in codes]))
    by_sample = torch.vmap(lambda x: quantize_kv(x, "int4", 32), in_dims=1, out_dims=1)(key)
    assert all(map(torch.equal, by_sample, quantize_kv(key, "int4", 32)))


def test_autocast():
    """Codes stay as they are, 8-bit floats too."""
    query, key, value = cache(3)
    for kind in ("e4m3", "int8"):
        tensors, options = coded(key, value, kind)
        with torch.autocast("cpu", torch.bfloat16):
            found = attend(query, *tensors, **options)
        assert torch.equal(found, attend(query.bfloat16(), *tensors, **options))


def test_modes():
    query, key, value = cache(3)
    with FlopCounterMode(display=False) as plain:
        attend(query, key, value)
    tensors, options = coded(key, value, "nf4")
    with FlopCounterMode(display=False) as counter:
        attend(query, *tensors, **options)
    assert counter.get_total_flops() == plain.get_total_flops() > 0


@pytest.mark.cpu("the name of a kernel of the CPU")
def test_explain():
    query, key, value = cache(1)
    tensors, options = coded(key, value, "nf4", 32)
    found = explain(query, *tensors, enable_gqa=True, seqused_k=integers([1, 2, 3]), **options)
    assert "_k_nf4_v_nf4_" in found.kernel
    refused = explain(query, *tensors, enable_gqa=True, backward=True, **options)
    assert not refused and "k_type is nf4 in the backward pass" in refused.reason


# --- Errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("by_operator", [False, True], ids=["eager", "operator"])
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_no_backward(kind, by_operator):
    """Refused before anything is computed, whichever input requires a gradient."""
    query, key, value = cache(1)
    (k, v), options = coded(key, value, kind)
    sinks = torch.zeros(4)
    for one in (query, sinks):
        one.requires_grad_()
        with pytest.raises(Unsupported, match=f"k_type is {kind} in the backward pass"):
            if by_operator:
                inputs = Inputs(
                    query, k, v, None, sinks.expand(3, 4), k_scale=options["k_scale"], v_scale=options["v_scale"]
                )
                FORWARD(*inputs, *Options(k_type=kind, v_type=kind))
            else:
                attend(query, k, v, sinks=sinks, **options)
        with torch.no_grad():
            attend(query, k, v, sinks=sinks, **options)
        one.requires_grad_(False)
    with pytest.raises(NotImplementedError, match="quantize_kv has no backward pass"):
        quantize_kv(key.requires_grad_(), kind)
    with pytest.raises(NotImplementedError, match="append_kv has no backward pass"):
        append_kv(k, v, key, value, integers([0] * 3), **options)
    with pytest.raises(TypeError, match="k_scale requires a gradient; it gets none"):
        attend(query, k, v, **(options | {"k_scale": options["k_scale"].requires_grad_()}))


WRONG = {
    "shape": (
        {"k_scale": torch.rand(3, 2, 49, 1)},
        ValueError,
        r"k_scale has the shape \(3, 2, 49, 1\); .*3, 2, 50, groups",
    ),
    "heads": ({"v_scale": torch.rand(3, 2)}, ValueError, r"of a scale for each head it is v_scale\[:, :, None, None\]"),
    "groups": ({"k_scale": torch.rand(1, 1, 1, 3)}, ValueError, "k_scale has 3 scales for a row of 64 columns"),
    "groups of 16": (
        {"key": "int4", "k_type": "int4", "k_scale": torch.rand(1, 1, 1, 4)},
        ValueError,
        "groups of int4 are multiples of 32 columns",
    ),
    "float64": ({"k_scale": torch.rand(1, 1, 1, 1).double()}, TypeError, "k_scale is float64; it must be float32"),
    "number": ({"k_scale": 0.5}, TypeError, "k_scale is a float; it must be a torch.Tensor"),
    "unnamed": (
        {"value": "nf4"},
        TypeError,
        "value is uint8 and v_type None; v_type must say what its bytes are: 'e4m3'",
    ),
    "name": ({"k_type": "int5"}, ValueError, "k_type is 'int5'; it must be 'int8', 'e4m3', 'e5m2', 'int4' or 'nf4'"),
    "another": ({"k_type": "e4m3"}, TypeError, "key is int8 and k_type 'e4m3'; it must be float8_e4m3fn or uint8"),
    "numbers": ({"key": None}, ValueError, "k_scale is given and key is float32; only codes have scales"),
    "named numbers": ({"key": None, "k_type": "int8"}, TypeError, "key is float32 and k_type 'int8'; it must be int8"),
    "int32": (
        {"key": torch.zeros(3, 2, 50, 64).int()},
        TypeError,
        "key is int32; it must be float32, float16, bfloat16 or",
    ),
    "columns": (
        {"key": "int4", "k_type": "e4m3"},
        ValueError,
        "query has the head_dim 64 and key 32; they must be equal",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments(case):
    changed, error, words = WRONG[case]
    query, key, value = cache(1)
    (k, v), options = coded(key, value, "int8")
    arguments = {"key": k, "value": v, **options} | changed
    for name, numbers in (("key", key), ("value", value)):
        given = arguments[name]
        if not isinstance(given, torch.Tensor):
            arguments[name] = numbers if given is None else quantize_kv(numbers, given)[0]
    for function in (attend, lambda query, **o: explain(query, enable_gqa=True, **o)):
        with pytest.raises(error, match=words):
            function(query, **arguments)


@pytest.mark.parametrize("arguments, error, words", [
    ((torch.zeros(2, 48), "int4"), ValueError, "numbers has 48 columns; of int4 they must be a multiple of 32"),
    ((torch.zeros(2, 64), "nf4", 16), ValueError, "group is 16; .* or a multiple of 32"),
    ((torch.zeros(2, 64), "int8", 48), ValueError, "group is 48; .* a number that divides the 64 columns"),
    ((torch.zeros(2, 64), "int8", -1), ValueError, "group is -1"),
    ((torch.zeros(2, 64).int(), "int8"), TypeError, "numbers is int32; it must be float32"),
    ((torch.tensor(1.0), "int8"), ValueError, "numbers has no dimensions"),
    ((torch.zeros(2, 64), "int2"), ValueError, "kv_type is 'int2'; it must be"),
    ((torch.full((2, 64), torch.inf), "e5m2"), ValueError, "number 0 of row 0 is not finite"),
    (([1.0], "int8"), TypeError, "numbers is a list; it must be a torch.Tensor"),
])  # fmt: skip
def test_wrong_numbers(arguments, error, words):
    with pytest.raises(error, match=words):
        quantize_kv(*arguments)


def test_wrong_codes():
    codes, scale = quantize_kv(torch.ones(2, 64), "int4")
    with pytest.raises(TypeError, match="dtype is int8; it must be float32"):
        dequantize_kv(codes, scale, "int4", torch.int8)
    with pytest.raises(ValueError, match=r"codes_of has the shape \(2, 24\); .* a multiple of 16 bytes"):
        dequantize_kv(codes[:, :24], None, "int4")


def test_nothing_to_quantize():
    for shape in ((0, 64), (3, 0), (2, 0, 32)):
        codes, scale = quantize_kv(torch.zeros(shape), "int8")
        assert codes.shape == shape and scale.shape == (*shape[:-1], 1) and not scale.any()


def test_flash_attention_names_the_functions_that_take_codes():
    query, key, value = cache(1)
    tensors, _ = coded(key, value, "int8")
    with pytest.raises(TypeError, match=r"key is int8; .* or codes in flash_attention_kvcache and flash_attention_"):
        flash_attention(query, *tensors, enable_gqa=True)


def test_storage_that_is_too_short():
    query, key, value = cache(1)
    (k, v), options = coded(key, value, "int8")
    for tensor, name in ((v, "value"), (options["k_scale"], "k_scale")):
        tensor.untyped_storage().resize_(100)
        with pytest.raises(RuntimeError, match=f"{name}: .* out of bounds for storage of size 100"):
            attend(query, k, v, **options)
        tensor.untyped_storage().resize_(3 * 2 * 50 * 64 * 4)
