"""Error messages name the field, what was given and what is accepted."""

import functools
import os

import pytest
import torch

from mps_flash_attn import Unsupported, explain, flash_attention, is_available, library, torch_host


def _arguments(**changes):
    query, key, value = torch.randn(2, 4, 5, 8), torch.randn(2, 4, 7, 8), torch.randn(2, 4, 7, 6)
    return {"query": query, "key": key, "value": value} | changes


RANDOM, META = torch.randn, functools.partial(torch.empty, device="meta")
SENTENCES = [
    # tensors
    (dict(query=[[1.0]]), TypeError, "query is a list; it must be a torch.Tensor"),
    (dict(value=None), TypeError, "value is a NoneType; it must be a torch.Tensor"),
    (dict(key=RANDOM(4, 7, 8)), ValueError, r"key has 3 dimensions; it must have 4: \(batch, heads, length"),
    (dict(key=RANDOM(2, 4, 7, 8).to_sparse()), TypeError, "key has the layout sparse_coo; it must be strided"),
    (dict(query=torch.nested.nested_tensor([RANDOM(2, 3)])), TypeError, "query has the layout nested"),
    (dict(attn_mask=1.5), TypeError, "attn_mask is a float; it must be a torch.Tensor"),
    # dtypes
    (dict(query=torch.ones(2, 4, 5, 8, dtype=torch.int32)), TypeError, "query is int32; it must be float32, float16"),
    (dict(value=torch.ones(2, 4, 7, 6, dtype=torch.complex64)), TypeError, "value is complex64; it must be float32"),
    (dict(key=RANDOM(2, 4, 7, 8).half()), TypeError, "query is float32, key float16 and value float32; .* one dtype"),
    (dict(attn_mask=torch.ones(5, 7, dtype=torch.uint8)), TypeError, "attn_mask is uint8; it must be bool"),
    # devices
    (dict(key=META(2, 4, 7, 8)), ValueError, "query is on cpu, key on meta and value on cpu; they must be on one"),
    (dict(attn_mask=META(5, 7)), ValueError, "attn_mask is on meta and query on cpu; they must be on one device"),
    (
        dict(query=META(2, 4, 5, 8), key=META(2, 4, 7, 8), value=META(2, 4, 7, 8)),
        Unsupported,
        "the tensors are on meta; devices we run on: cpu",
    ),
    # shapes
    (dict(key=RANDOM(3, 4, 7, 8)), ValueError, "batch sizes of query 2, key 3 and value 2 differ; they must be equal"),
    (dict(value=RANDOM(1, 4, 7, 6)), ValueError, "batch sizes of query 2, key 2 and value 1 differ"),
    (dict(key=RANDOM(2, 4, 7, 9)), ValueError, "query has the head_dim 8 and key 9; they must be equal"),
    (dict(value=RANDOM(2, 4, 6, 6)), ValueError, "key has the length 7 and value 6; they must be equal"),
    (dict(value=RANDOM(2, 2, 7, 6)), ValueError, "key has 4 heads and value 2; they must be equal"),
    (
        dict(key=RANDOM(2, 2, 7, 8), value=RANDOM(2, 2, 7, 6)),
        ValueError,
        "query has 4 heads and key has 2; enable_gqa=True allows that",
    ),
    (
        dict(key=RANDOM(2, 3, 7, 8), value=RANDOM(2, 3, 7, 6), enable_gqa=True),
        ValueError,
        "q_heads is 4 and kv_heads is 3; q_heads must be a multiple of kv_heads",
    ),
    (dict(query=RANDOM(2, 4, 5, 0), key=RANDOM(2, 4, 7, 0)), Unsupported, "head_dim is 0; "),
    # masks
    (dict(attn_mask=RANDOM(5, 6)), ValueError, r"shape \(5, 6\); .* broadcastable to .* = \(2, 4, 5, 7\)"),
    (dict(attn_mask=RANDOM(2, 5, 7)), ValueError, r"attn_mask has the shape \(2, 5, 7\)"),
    (dict(attn_mask=RANDOM(1, 2, 4, 5, 7)), ValueError, r"attn_mask has the shape \(1, 2, 4, 5, 7\)"),
    # numbers
    (dict(softcap=-1.0), ValueError, "softcap is -1; "),
    (dict(softcap=float("nan")), ValueError, "softcap is "),
    (dict(scale=float("nan")), ValueError, "scale is "),
    (
        dict(scale=torch.ones((), requires_grad=True)),
        TypeError,
        "scale is a tensor that requires a gradient; it must be",
    ),
    (dict(softcap=torch.ones((), requires_grad=True)), TypeError, "softcap is a tensor that requires a gradient"),
    (dict(softcap=None), TypeError, "softcap is None; it must be a number"),
    (dict(scale="0.5"), TypeError, "scale is '0.5'; it must be a number"),
    (dict(scale=1j), TypeError, "scale is 1j; it must be a number"),
    (dict(scale=10**400), TypeError, "scale is 1000.*; it must be a number"),
    (dict(scale=torch.ones(2)), TypeError, "scale is tensor.*; it must be a number"),
    (dict(is_causal=torch.ones(2)), ValueError, "is_causal is tensor.*; it must be False, True"),
    (dict(window_size=-3), ValueError, r"window_size is -3; it must be 0 \(none\), a positive number of keys"),
    (dict(window_size=2.5), ValueError, "window_size is 2.5; "),
    (dict(window_size=(1, -2)), ValueError, r"window_size is \(1, -2\); "),
    (dict(window_size=(1, 2, 3)), ValueError, r"window_size is \(1, 2, 3\); "),
    (dict(is_causal="left"), ValueError, 'is_causal is \'left\'; it must be False, True, "top_left" or "bottom_right"'),
]


@pytest.mark.parametrize("changes, exception, sentence", SENTENCES, ids=lambda value: None)
def test_sentence(changes, exception, sentence):
    with pytest.raises(exception, match=sentence):
        flash_attention(**_arguments(**changes))
    if exception is Unsupported:
        assert not explain(**_arguments(**changes))
    else:
        with pytest.raises(exception, match=sentence):
            explain(**_arguments(**changes))


@pytest.mark.parametrize("changes", [dict(head_dim=513, value_dim=8), dict(head_dim=8, value_dim=513)], ids=str)
def test_head_dim_too_large(changes):
    query, value = RANDOM(1, 1, 2, changes["head_dim"]), RANDOM(1, 1, 2, changes["value_dim"])
    with pytest.raises(Unsupported, match=r"513.*512"):
        flash_attention(query, query, value)


def test_subclass_with_memory_is_read():
    class Named(torch.Tensor):
        pass

    query = RANDOM(1, 1, 2, 8)
    assert torch.equal(flash_attention(*[query.as_subclass(Named)] * 3), flash_attention(query, query, query))


def test_unknown_option():
    with pytest.raises(TypeError, match="dropout"):
        flash_attention(**_arguments(), dropout=0.1)


@pytest.mark.cpu("MFA_ISA is the CPU's")
@pytest.mark.parametrize(
    "isa, said",
    [
        ("pentium", 'MFA_ISA is "pentium"; it must be scalar, '),
        (os.fsdecode(b"\xff\xfe"), 'MFA_ISA is "\ufffd\ufffd"; it must be scalar, '),
        ("x" + 400 * "\u00e9", 'MFA_ISA is "x' + 249 * "\u00e9"),  # to the last byte that there is room for,
        ("xx" + 400 * "\u00e9", 'MFA_ISA is "xx' + 248 * "\u00e9"),  # and to the one before
    ],
    ids=["unknown", "no UTF-8", "long", "long, by one more"],
)
def test_instruction_set_that_is_none(isa, said, monkeypatch):
    monkeypatch.setenv("MFA_ISA", isa)
    monkeypatch.setattr(library, "_library", None)
    assert not is_available("cpu")
    assert torch_host.unavailable_reason("cpu")[: len(said)] == said
    assert len(isa) < 400 or torch_host.unavailable_reason("cpu") == said
    with pytest.raises(ValueError, match='MFA_ISA is "'):
        flash_attention(**_arguments())


@pytest.mark.parametrize("length", [None, 0, 200])
def test_file_that_is_no_library(length, monkeypatch, tmp_path):
    """The file is text, or empty, or a truncated library."""
    file = tmp_path / "libmfa.so"
    file.write_bytes(b"no library" if length is None else library.library().path.read_bytes()[:length])
    monkeypatch.setenv("MFA_LIBRARY", str(file))
    monkeypatch.setattr(library, "_library", None)
    assert not is_available("cpu")
    with pytest.raises(ImportError, match=r"libmfa\.so cannot be loaded as libmfa: "):
        flash_attention(**_arguments())


def test_error_leaves_no_trace():
    query = RANDOM(1, 1, 2, 8)
    with pytest.raises(ValueError):
        flash_attention(query, query, query, softcap=-1.0)
    assert flash_attention(query, query, query).isfinite().all()
