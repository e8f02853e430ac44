"""What is wrong on one rank is an error on all, and a rank that does not answer is a PeerError that names it."""

import os
import time

import pytest
import torch
from torch.func import vmap
from torch.nn.attention.bias import causal_upper_left

import cases
import pool
from mps_flash_attn import Unsupported
from mps_flash_attn.distributed import Layout, PeerError, context_parallel_attention


def call(size, per_rank, common=None, unshard=False):
    """(class, sentence) of the error on this rank, or None. `per_rank`: {rank: what differs on it}."""
    group = pool.groups[size]
    given = {"heads": 4, "kv_heads": 2, "head_dim": 16, "value_dim": 16, "length": 24, "dtype": torch.float32}
    given |= {"layout": "contiguous", "batch": 2, "rows": None, "grad": (), **(common or {})}
    given |= per_rank.get(group.rank(), {})
    layout = cases.LAYOUTS[given.pop("layout")](given.pop("length"), group)
    batch, rows = given.pop("batch"), given.pop("rows") or layout.rows
    of_query, of_key = (batch, given.pop("heads"), rows), (batch, given.pop("kv_heads"), rows)
    head_dim, dtype, grad = given.pop("head_dim"), given.pop("dtype"), given.pop("grad")
    shapes = (*of_query, head_dim), (*of_key, head_dim), (*of_key, given.pop("value_dim"))
    query, key, value = (
        torch.randn(shape).to(dtype).requires_grad_(place in grad) for place, shape in enumerate(shapes)
    )
    if "ones" in given:
        given[given.pop("ones")] = torch.ones(given.pop("shape"))
    try:
        if given.pop("unshard", unshard):
            layout.unshard(query.detach(), 2)
        else:
            context_parallel_attention(query, key, value, layout, **{"enable_gqa": True, **given})
    except Exception as error:
        return type(error), str(error)
    return None


DIFFERENCES = {
    "number of query heads": {"heads": 2},
    "number of key heads": {"kv_heads": 1},
    "head_dim": {"head_dim": 24},
    "head_dim of value": {"value_dim": 8},
    "batch": {"batch": 1},
    "dtype": {"dtype": torch.bfloat16},
    "layout": {"layout": "zigzag"},
    "is_causal and window_size": {"is_causal": True},
    "scale": {"scale": 0.5},
    "softcap": {"softcap": 2.0},
    "documents": {"documents": [7]},
    "sinks is given": {"ones": "sinks", "shape": 4},
    "query requires a gradient": {"grad": (0,)},
    "value requires a gradient": {"grad": (2,)},
    "method": {"method": "all_to_all"},
    "return_lse": {"return_lse": True},
    "function": {"unshard": True},
}


@pytest.mark.parametrize("name", DIFFERENCES)
def test_arguments_that_differ(name):
    found = pool.shared().run(pool.RANKS[3], call, 3, {1: DIFFERENCES[name]})
    for rank, (kind, sentence) in enumerate(found):
        assert kind is ValueError
        there = "ranks 0, 2" if rank == 1 else "rank 1"
        assert f": {name} is " in sentence and f"on rank {rank} and " in sentence, sentence
        assert f"on {there} of the group; it must be the same on all ranks" in sentence, sentence
    assert pool.shared().run(pool.RANKS[3], call, 3, {}) == [None] * 3  # the group is as it was


def test_numbers_that_differ_are_named():
    found = pool.shared().run(pool.RANKS[2], call, 2, {1: {"head_dim": 24}})
    assert found[0][1] == (
        "context_parallel_attention: head_dim is 16 on rank 0 and is 24 on rank 1 of the group; it must be the same on "
        "all ranks"
    )


FAULTS = {
    "query has 5 rows; rank 1 of the layout has 12": (ValueError, {"rows": 5}),
    "window_size is -2; it must be": (ValueError, {"window_size": -2}),
    "softcap is 'x'; it must be a number": (TypeError, {"softcap": "x"}),
    "attn_mask has the shape (12, 12); it must be broadcastable to (batch, heads, L, S) = (2, 4, 12, 24)": (
        ValueError,
        {"ones": "attn_mask", "shape": (12, 12)},
    ),
    "sinks has the shape (3,)": (ValueError, {"ones": "sinks", "shape": 3}),
    "documents is [9, 4]; it must be places in the sequence, whole numbers from 0 to 24 that do not decrease": (
        ValueError,
        {"documents": [9, 4]},
    ),
    "documents is [25]": (ValueError, {"documents": [25]}),
    "documents is 3; it": (ValueError, {"documents": 3}),
    'method is \'star\'; it must be "ring" or "all_to_all"': (ValueError, {"method": "star"}),
    "query is int64; it must be": (TypeError, {"dtype": torch.int64}),
    "query has 4 heads and key has 2; enable_gqa=True allows that": (ValueError, {"enable_gqa": False}),
    "head_dim": (Unsupported, {"head_dim": 640}),
}


@pytest.mark.parametrize("sentence", FAULTS)
def test_a_fault_on_one_rank(sentence):
    kind, difference = FAULTS[sentence]
    first, second = pool.shared().run(pool.RANKS[2], call, 2, {1: difference})
    assert second[0] is kind and sentence in second[1]
    assert first[0] is ValueError
    there = "raised an error on rank 1 of the group, where its sentence is; so it is not run on rank 0 either"
    assert first[1] == f"context_parallel_attention {there}"


def test_a_mask_with_all_to_all():
    found = pool.shared().run(
        pool.RANKS[2], call, 2, {}, {"method": "all_to_all", "ones": "attn_mask", "shape": (12, 24)}
    )
    assert found == [(ValueError, 'attn_mask is given; method "all_to_all" takes none, but method "ring" does')] * 2


def without_check(size):
    return call(size, {0: {"rows": 5}}, {"check": False}) if pool.groups[size].rank() == 0 else None


def test_a_fault_without_check():
    found = pool.shared().run(pool.RANKS[2], without_check, 2)
    assert found[0] == (ValueError, "query has 5 rows; rank 0 of the layout has 12")


# --- Derivatives that there are not --------------------------------------------------------------


def derivatives(size):
    layout = cases.layout_of(size, "contiguous", 8)
    operands = [torch.randn(1, 1, layout.rows, 4, requires_grad=True) for _ in range(3)]
    out = context_parallel_attention(*operands, layout)
    (gradient,) = torch.autograd.grad(out.sum(), operands[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="context_parallel_attention has no second derivative"):
        gradient.sum().backward()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(operands[0].detach(), torch.ones_like(operands[0]))
        with pytest.raises(NotImplementedError, match="no forward-mode differentiation"):
            context_parallel_attention(dual, *operands[1:], layout)
    with pytest.raises(TypeError, match=r"query is a tensor of torch\.func; it must be a plain tensor"):
        vmap(lambda one: context_parallel_attention(one, *operands[1:], layout))(operands[0][None])
    with pytest.raises(TypeError, match="layout is a int; it must be a Layout"):
        context_parallel_attention(*operands, 8)
    with pytest.raises(TypeError, match=r"attn_mask is a CausalBias; with a divided sequence is_causal=True"):
        context_parallel_attention(*operands, layout, attn_mask=causal_upper_left(4, 8))


@pytest.mark.parametrize("size", [1, 2])
def test_derivatives_that_there_are_not(size):
    pool.shared().run(pool.RANKS[size], derivatives, size)


# --- Ranks that do not answer --------------------------------------------------------------------

TIMEOUT = 6


def attend(hangs=None, dies=None, between=False):
    """(sentence, ranks, timeout, seconds) of the error of a training step in which one rank takes no part, or with
    `between` none in backward."""
    layout = Layout.contiguous(24)
    rank = layout.peers.rank
    operands = [torch.randn(1, 2, layout.rows, 8, requires_grad=True) for _ in range(3)]

    def stop():
        if rank == dies:
            os._exit(3)
        if rank == hangs:
            time.sleep(100)

    if not between:
        stop()
    began = time.monotonic()
    try:
        out = context_parallel_attention(*operands, layout)
        if between:
            stop()
        began = time.monotonic()
        out.sum().backward()
    except PeerError as error:
        return str(error), error.ranks, error.timeout, time.monotonic() - began
    return None


@pytest.mark.parametrize("between", [False, True])
@pytest.mark.parametrize("fault", ["dies", "hangs"])
def test_a_rank_that_does_not_answer(fault, between):
    with pool.Pool(3, timeout=TIMEOUT, subgroups=False) as three:
        for rank in range(3):
            three.start(rank, attend, between=between, **{fault: 1})
        for rank in (0, 2):
            (sentence, ranks, timeout, seconds), error = three.outcome(rank, 4 * TIMEOUT)
            assert error is None
            assert timeout == TIMEOUT and f"within the group's timeout of {TIMEOUT} s" in sentence
            assert seconds < TIMEOUT + 4
            assert 1 in ranks, sentence  # beside it one that has ended for the same reason
            assert f"did not exchange {'keys and values' if between else 'agreement'} with rank {rank}" in sentence
