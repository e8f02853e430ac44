"""DTensors under a replaced scaled_dot_product_attention, in flash_attention and the functions beside it: sharded along
heads, batch entries or the sequence, or replicated, over four processes, beside one process."""

import pytest
import torch
import torch.nn.functional as F
from torch.distributed.tensor import DTensor, Partial, Shard
from torch.distributed.tensor.experimental import implicit_replication
from torch.utils.checkpoint import checkpoint

import pool
from mps_flash_attn import (
    flash_attention,
    flash_attention_kvcache,
    flash_attention_varlen,
    quantize_kv,
    replaced_sdpa,
)
from sharded import B, H, N, R, distribute, drawn, largest_difference, mesh_of, replace_all_sizes, sentence

ALL = range(pool.WORLD)


def sdpa(query, key, value, mask=None, **options):
    replace_all_sizes()
    with replaced_sdpa():
        return F.scaled_dot_product_attention(query, key, value, mask, **options)


def flash(query, key, value, mask=None, **options):
    return flash_attention(query, key, value, attn_mask=mask, **options)


FUNCTIONS = {"sdpa": sdpa, "flash_attention": flash}


def difference(name, shapes, mesh_shape, placements, options):
    """The largest difference of a result or gradient from that of one process."""
    function, mesh = FUNCTIONS[name], mesh_of(*mesh_shape)
    tensors = drawn(*shapes)
    sharded = distribute(tensors, mesh, *placements)
    out, expected = function(*sharded, **options), function(*tensors, **options)
    torch.manual_seed(1)
    d_out = torch.randn_like(expected)
    expected.backward(d_out)
    out.backward(*distribute([d_out], mesh, out.placements))
    return largest_difference(
        [(out, expected), *((one.grad, of.grad) for one, of in zip(sharded, tensors, strict=True))]
    )


SELF = ((4, 8, 33, 16),) * 3
GROUPED = (4, 8, 33, 16), (4, 4, 33, 16), (4, 4, 33, 8)
UNEVEN = ((5, 7, 20, 16),) * 3  # of 7 heads the last rank of four has one, of 5 batch entries none
SHARED = (4, 8, 33, 16), (4, 1, 33, 16), (4, 1, 33, 16)
FEW = (4, 12, 33, 16), (4, 6, 33, 16), (4, 6, 33, 16)  # heads that cannot be divided as those of the query
GQA = {"enable_gqa": True}
BOTH = {  # name: (shapes of query, key, value and mask, mesh, placements, options)
    "heads": (SELF, (4,), ([H],) * 3, {"is_causal": True}),
    "batch": (SELF, (4,), ([B],) * 3, {}),
    "replicated": (SELF, (4,), ([R],) * 3, {}),
    "batch and heads": (SELF, (2, 2), ([B, H],) * 3, {"is_causal": True}),
    "heads twice": (SELF, (2, 2), ([H, H],) * 3, {"scale": 0.3}),
    "batch and replicated": (SELF, (2, 2), ([R, B],) * 3, {}),
    "uneven heads": (UNEVEN, (4,), ([H],) * 3, {}),
    "uneven batch": (UNEVEN, (4,), ([B],) * 3, {"is_causal": True}),
    "uneven heads twice": (UNEVEN, (2, 2), ([H, H],) * 3, {}),
    "grouped heads": (GROUPED, (4,), ([H],) * 3, GQA | {"is_causal": True}),
    "grouped heads, batch": (GROUPED, (2, 2), ([H, B],) * 3, GQA),
    "grouped heads, key and value replicated": (GROUPED, (4,), ([H], [R], [R]), GQA),
    "one head of key and value": (SHARED, (4,), ([H], [R], [R]), GQA),
    "one head of key and value, sharded": (SHARED, (4,), ([H],) * 3, GQA),
    "fewer heads than ranks": (FEW, (4,), ([H],) * 3, GQA),
    "fewer heads than ranks, replicated": (FEW, (4,), ([H], [R], [R]), GQA),
    "fewer heads than ranks, on two dimensions": (FEW, (2, 2), ([H, H],) * 3, GQA),
    "mixed": (SELF, (4,), ([R], [H], [B]), {}),
    "query replicated": (SELF, (2, 2), ([R, R], [R, H], [R, R]), {}),
    "columns": (SELF, (4,), ([Shard(3)], [H], [H]), {}),
    "mask, replicated": ((*SELF, (4, 8, 33, 33)), (4,), ([H], [H], [H], [R]), {}),
    "mask, sharded": ((*SELF, (4, 8, 33, 33)), (2, 2), ([B, H],) * 4, {}),
    "mask, sharded otherwise": ((*SELF, (4, 8, 33, 33)), (4,), ([H], [H], [H], [N]), {}),
    "mask of all heads": ((*SELF, (4, 1, 33, 33)), (2, 2), ([B, H], [B, H], [B, H], [B, R]), {}),
    "mask of two dimensions": ((*SELF, (33, 33)), (2, 2), ([B, H], [B, H], [B, H], [R, R]), {}),
    "mask of keys": ((*SELF, (4, 1, 1, 33)), (4,), ([B], [B], [B], [R]), {}),
    "mask, grouped heads": ((*GROUPED, (8, 33, 33)), (4,), ([H], [H], [H], [Shard(0)]), GQA),
    "no rows for some ranks": (((1, 3, 9, 8),) * 3, (4,), ([H],) * 3, {}),
    "one batch entry, sharded, mask without a batch": (
        (*(((1, 3, 4, 8),) * 3), (4, 4)),
        (4,),
        ([B], [B], [B], [R]),
        {},
    ),
    "one batch entry, sharded": (((1, 3, 9, 8),) * 3, (4,), ([B],) * 3, {"is_causal": True}),
}
# Shapes that flash_attention does not take.
OF_SDPA = {
    "three dimensions": (((8, 33, 16),) * 3, (4,), ([Shard(0)],) * 3, {}),
    "two dimensions": (((33, 16),) * 3, (4,), ([R],) * 3, {}),
    "five dimensions": (((2, 3, 4, 9, 8),) * 3, (2, 2), ([Shard(2), Shard(1)],) * 3, {}),
    "broadcast batch": (((4, 8, 9, 8), (1, 8, 9, 8), (8, 9, 8)), (4,), ([B], [R], [R]), {}),
    "broadcast query": (((1, 8, 9, 8), (4, 8, 9, 8), (4, 1, 9, 8)), (2, 2), ([R, R], [B, H], [B, R]), {}),
    "heads of key and of value": (((4, 12, 9, 8), (4, 6, 9, 8), (4, 2, 9, 8)), (4,), ([H],) * 3, GQA),
    "long heads": (((2, 4, 5, 520),) * 3, (4,), ([H],) * 3, {}),
}
CAUSAL = {"is_causal": True}
SEQUENCE = {
    "sequence": (SELF, (4,), ([N],) * 3, CAUSAL),
    "sequence, no causal mask": (SELF, (4,), ([N],) * 3, {"scale": 0.2}),
    "short sequence": (((2, 3, 5, 8),) * 3, (4,), ([N],) * 3, CAUSAL),  # the last rank has no rows
    "sequence and batch": (SELF, (2, 2), ([B, N],) * 3, CAUSAL),
    "sequence and heads": (UNEVEN, (2, 2), ([N, H],) * 3, CAUSAL),
    "sequence, grouped heads": (GROUPED, (4,), ([N],) * 3, GQA | CAUSAL),
    "sequence and grouped heads": (((2, 6, 9, 8), (2, 3, 9, 8), (2, 3, 9, 8)), (2, 2), ([N, H],) * 3, GQA),
    "sequence, mask by rows": ((*SELF, (4, 8, 33, 33)), (4,), ([N],) * 4, {}),
    "sequence, mask replicated": ((*SELF, (33, 33)), (4,), ([N], [N], [N], [R]), {}),
    "sequence of one row": ((*(((2, 3, 1, 8),) * 3), (3, 1, 1)), (4,), ([N], [N], [N], [Shard(1)]), {}),
    "sequence, one row of a mask, sharded": ((*SELF, (1, 33)), (4,), ([N], [N], [N], [Shard(0)]), {}),
    "sequence, mask of keys": ((*SELF, (4, 1, 1, 33)), (2, 2), ([N, B], [N, B], [N, B], [R, B]), {}),
}
OF_SDPA |= SEQUENCE
CASES = [("sdpa", case) for case in (BOTH | OF_SDPA).values()] + [("flash_attention", case) for case in BOTH.values()]
IDS = [f"sdpa: {name}" for name in BOTH | OF_SDPA] + [f"flash_attention: {name}" for name in BOTH]


@pytest.mark.parametrize(("name", "case"), CASES, ids=IDS)
def test_as_one_process(name, case):
    found = pool.shared().run(ALL, difference, name, *case)
    assert max(found) < 1e-12


# --- Other ways to call --------------------------------------------------------------------------


SHAPE = (4, 8, 16, 16)


def in_other_ways(place):
    """The largest difference from one process, of each way to call scaled_dot_product_attention."""
    mesh, tensors = mesh_of(4), drawn(*[SHAPE] * 3)
    expected = sdpa(*tensors, is_causal=True).detach()
    constants = [one.detach() for one in tensors]

    def run(*operands):
        return F.scaled_dot_product_attention(*operands, is_causal=True)

    def no_grad():
        with torch.no_grad():
            return run(*distribute(tensors, mesh, [place]))

    def inference_mode():
        with torch.inference_mode():
            return run(*distribute(constants, mesh, [place]))

    def checkpointed():
        leaves = distribute(tensors, mesh, [place])
        out = checkpoint(run, *leaves, use_reentrant=False)
        out.sum().backward()
        assert all(one.grad.shape == SHAPE for one in leaves)
        return out

    def autocast():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = run(*distribute([one.float() for one in constants], mesh, [place]))
        assert out.dtype is torch.bfloat16
        return out.double()

    def under_way():
        redistributed = [one.redistribute(placements=[R], async_op=True) for one in distribute(tensors, mesh, [place])]
        out = run(*redistributed)
        out.sum().backward()
        return out

    def partial():
        query = DTensor.from_local(constants[0] / 4, mesh, [Partial()], run_check=False).requires_grad_()
        out = run(query, *distribute(constants[1:], mesh, [R]))
        out.sum().backward()
        assert query.grad.placements == (R,)
        return out

    with replaced_sdpa():
        ways = no_grad, inference_mode, checkpointed, autocast, under_way, partial
        return {way.__name__: largest_difference([(way(), expected)]) for way in ways}


@pytest.mark.parametrize("place", [H, N])
def test_other_ways(place):
    for found in pool.shared().run(ALL, in_other_ways, place):
        assert found.pop("autocast") < 5e-2
        assert max(found.values()) < 1e-12, found


def compiled():
    """The largest differences of compiled functions from one process."""
    mesh, tensors = mesh_of(4), drawn(*[SHAPE] * 3)

    def both(*operands):
        return F.scaled_dot_product_attention(*operands, is_causal=True), flash_attention(*operands, True)

    def run(function, operands):
        outs = function(*operands)
        sum(out.sum() for out in outs).backward()
        return *outs, *(one.grad for one in operands)

    replace_all_sizes()
    with replaced_sdpa():
        expected = run(both, tensors)
        found = run(torch.compile(both, backend="aot_eager", fullgraph=True), distribute(tensors, mesh, [H]))
        of_sequence = torch.compile(lambda *operands: F.scaled_dot_product_attention(*operands), fullgraph=True)
        refused = sentence(of_sequence, *distribute(tensors, mesh, [N]))
    return largest_difference(zip(found, expected, strict=True)), refused


def test_compiled():
    for found, refused in pool.shared().run(ALL, compiled):
        assert found < 1e-12
        assert "query is sharded along the sequence in compiled code" in refused


def more_inputs(place):
    """The largest differences from one process, with the inputs that scaled_dot_product_attention has not."""
    mesh, (query, key, value, sinks) = mesh_of(4), drawn(*[SHAPE] * 3, (8,))
    slopes, blocks = torch.rand(8), torch.rand(4, 8, 1, 1) > 0.5
    sinks = sinks.detach().float().requires_grad_()
    options = {"window_size": 7, "softcap": 3.0, "return_lse": True}

    def run(query, key, value, sinks, slopes, blocks):
        inputs = {"sinks": sinks, "alibi_slopes": slopes, "block_mask": blocks}
        out, lse = flash_attention(query, key, value, True, **inputs, **options)
        (out.sum() + lse.relu().sum()).backward()
        return out, lse, *(one.grad for one in (query, key, value, sinks))

    found = run(*distribute((query, key, value), mesh, [place]), *distribute((sinks, slopes, blocks), mesh, [R]))
    return largest_difference(zip(found, run(query, key, value, sinks, slopes, blocks), strict=True))


@pytest.mark.parametrize("place", [B, H])
def test_more_inputs(place):
    assert max(pool.shared().run(ALL, more_inputs, place)) < 1e-5  # sinks are float32


def other_functions():
    """The largest differences of the functions for lengths and codes from one process."""
    mesh = mesh_of(4)
    query, key, value = (one.detach() for one in drawn(*[SHAPE] * 3, dtype=torch.float32))
    used, ends = torch.tensor([5, 8, 16, 1], dtype=torch.int32), torch.tensor([0, 10, 16], dtype=torch.int32)
    packed = [one[0].transpose(0, 1).contiguous() for one in (query, key, value)]

    def run(query, key, value, used, packed, ends):
        codes, scale = quantize_kv(key, "int8")
        scales = {"k_scale": scale, "v_scale": scale}
        return (
            flash_attention_kvcache(query, key, value, seqused_k=used),
            flash_attention_kvcache(query, codes, codes, **scales),
            flash_attention_varlen(*packed, ends, ends, 10, 10),
        )

    shards = distribute((query, key, value), mesh, [H])
    used_everywhere, ends_everywhere = distribute((used, ends), mesh, [R])
    found = run(*shards, used_everywhere, distribute(packed, mesh, [Shard(1)]), ends_everywhere)
    return largest_difference(zip(found, run(query, key, value, used, packed, ends), strict=True))


def test_other_functions():
    assert max(pool.shared().run(ALL, other_functions)) == 0


def replicated_dropout():
    """The largest differences with dropout, and of the mask that it drops."""
    mesh, tensors = mesh_of(4), drawn(*[SHAPE] * 3)
    (seed,), seeds = distribute([torch.tensor([5])], mesh, [R]), torch.arange(4)
    found = flash_attention(*distribute(tensors, mesh, [R]), dropout_p=0.5, dropout_seed=seed)
    expected = flash_attention(*tensors, dropout_p=0.5, dropout_seed=5)
    mask = torch.ops.mfa.dropout_mask(distribute([seeds], mesh, [B])[0], 2, 3, 4, 0.5)
    assert torch.equal(mask.full_tensor(), torch.ops.mfa.dropout_mask(seeds, 2, 3, 4, 0.5))
    return largest_difference([(found, expected)])


def test_replicated_dropout():
    assert max(pool.shared().run(ALL, replicated_dropout)) == 0


def plain_beside_dtensors():
    mesh, tensors = mesh_of(4), drawn(*[SHAPE] * 3)
    mask, sharded = torch.ones(16, 16, dtype=torch.bool).tril(), distribute(tensors, mesh, [H])
    with implicit_replication():
        found = [function(*sharded, mask) for function in FUNCTIONS.values()]
    return largest_difference([(out, sdpa(*tensors, mask)) for out in found])


def test_plain_tensors_are_taken_for_replicated_where_pytorch_takes_them():
    assert max(pool.shared().run(ALL, plain_beside_dtensors)) < 1e-12


# --- Errors --------------------------------------------------------------------------------------


def sentences():
    """The error of each wrong call."""
    mesh, two = mesh_of(4), mesh_of(2, 2)
    tensors = drawn(*[SHAPE] * 3)
    sharded = {place: distribute(tensors, mesh, [place]) for place in (R, B, H, N)}
    few = distribute([one[:, :4] for one in tensors], mesh, [H])
    short = distribute([one[:, :, :8] for one in tensors], mesh, [N])
    mask, used, seed = distribute(
        [torch.ones(16, 16), torch.full((4,), 3, dtype=torch.int32), torch.tensor([5])], mesh, [R]
    )
    calls = {
        "plain mask": (sdpa, sharded[H], {"mask": torch.ones(16, 16)}),
        "plain key": (flash, [sharded[H][0], *tensors[1:]], {}),
        "dropout": (sdpa, sharded[H], {"dropout_p": 0.1}),
        "dropout of shards": (flash, sharded[B], {"dropout_p": 0.5, "dropout_seed": seed}),
        "sequence of query": (sdpa, [sharded[N][0], *sharded[R][1:]], {}),
        "sequence of key": (sdpa, [sharded[R][0], *sharded[N][1:]], {}),
        "sequence of the operator": (flash, sharded[N], {}),
        "sequence twice": (sdpa, distribute(tensors, two, [N, N]), {}),
        "heads": (sdpa, [sharded[H][0], *few[1:]], {}),
        "lengths": (sdpa, [sharded[N][0], *short[1:]], {}),
        "mask and is_causal": (sdpa, sharded[N], {"mask": mask, "is_causal": True}),
        "meshes": (sdpa, [sharded[H][0], *distribute(tensors[1:], two, [H, R])], {}),
        "lengths of the batch": (flash_attention_kvcache, sharded[B], {"seqused_k": used}),
    }
    found = {name: sentence(function, *operands, **options) for name, (function, operands, options) in calls.items()}
    one = drawn((1, 3, 9, 8), (1, 3, 9, 8))
    mixed = distribute([one[0], one[1].float(), one[0]], mesh_of(4), [B])
    found["dtypes, where some ranks have no elements"] = sentence(sdpa, *mixed)
    if torch.distributed.get_rank() == 1:
        sharded[N][2] = short[2]
    found["on one rank"] = sentence(sdpa, *sharded[N])
    if torch.distributed.get_rank() == 1:
        sharded[N][2] = tensors[2][:, :, :4]
    return found | {"plain on one rank": sentence(sdpa, *sharded[N])}


SENTENCES = {
    "plain mask": "TypeError: attn_mask is a plain tensor beside DTensors",
    "plain key": "TypeError: key is a plain tensor beside DTensors",
    "dropout": "NotImplementedError: dropout_p is 0.1; for DTensors it must be 0",
    "dropout of shards": "ValueError: dropout_p is 0.5 and query has the placements",
    "sequence of query": "query S(2), key R, value R; if one of query, key and value is sharded along the sequence",
    "sequence of key": "query R, key S(2), value S(2); if one of query, key and value is sharded along the sequence",
    "sequence of the operator": "mps_flash_attn.distributed.context_parallel_attention",
    "sequence twice": "the sequence may be sharded on one dimension of the mesh",
    "heads": "(shapes): query (4, 8, 16, 16), key (4, 4, 16, 16), value (4, 4, 16, 16)",
    "lengths": "they must have four dimensions, one batch, one length",
    "mask and is_causal": "attn_mask is given and is_causal is True",
    "meshes": "they must be on one mesh",
    "dtypes, where some ranks have no elements": "dtype",
    "lengths of the batch": "query is sharded along the batch and seqused_k is given",
}


def test_sentences():
    for rank, found in enumerate(pool.shared().run(ALL, sentences)):
        on_one_rank, plain = found.pop("on one rank"), found.pop("plain on one rank")
        assert found.keys() == SENTENCES.keys()
        for name, part in SENTENCES.items():
            assert found[name] is not None and part in found[name], (name, found[name])
        assert ("lengths of key and value" if rank == 1 else "raised an error on rank 1 of the group") in on_one_rank
        assert ("value is a plain tensor" if rank == 1 else "raised an error on rank 1 of the group") in plain
