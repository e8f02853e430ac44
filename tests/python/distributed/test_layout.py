"""The arithmetic of layouts and of the pairs of spans that see each other; no process is needed for most of it."""

import pytest
import torch

import pool
from mps_flash_attn.distributed import Layout, cuda, layout
from mps_flash_attn.distributed.all_to_all import heads_of

BANDS = [(None, None), (None, 0), (-3, 0), (-5, 2), (0, None), (0, 0), (None, 7), (-40, -1), (2, 5)]


def spans_of(kind, length, size):
    if kind == "contiguous":
        return tuple(tuple(span for span in [part] if span[0] < span[1]) for part in layout.split(length, size))
    parts = layout.split(length, 2 * size)
    pairs = ([parts[rank], parts[-1 - rank]] for rank in range(size))
    return tuple(tuple(span for span in pair if span[0] < span[1]) for pair in pairs)


def visible(length, lower, upper, cuts):
    offset = torch.arange(length) - torch.arange(length)[:, None]
    number = torch.bucketize(torch.arange(length), torch.tensor(cuts), right=True)
    seen = number[:, None] == number
    if lower is not None:
        seen &= offset >= lower
    return seen if upper is None else seen & (offset <= upper)


@pytest.mark.parametrize("kind", ["contiguous", "zigzag"])
@pytest.mark.parametrize("length", [0, 1, 5, 29])
@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("cuts", [(), (2, 3, 11, 20)], ids=str)
def test_pairs_are_what_is_visible_once(kind, length, size, cuts):
    """Also: the windows of CUDA's kernels mean the band of the pair, and no key travels that is not seen."""
    cuts = tuple(cut for cut in cuts if cut < length)
    spans = spans_of(kind, length, size)
    for lower, upper in BANDS:
        seen = torch.zeros(length, length, dtype=torch.int)
        for rank in range(size):
            places = [place for span in spans[rank] for place in range(*span)]
            steps = layout.schedule(spans, rank, lower, upper, cuts)
            joined = layout.schedule(spans, rank, lower, upper, cuts, joins=True)
            assert [step.receives_from for step in steps] == [(rank - step) % size for step in range(size)]
            for step, alike in zip(steps, joined, strict=True):
                back = layout.schedule(spans, step.sends_to, lower, upper, cuts)[(step.sends_to - rank) % size]
                assert step.sends == back.receives
                held = spans[rank] if step is steps[0] else step.receives
                assert alike._replace(pairs=()) == step._replace(pairs=()) and len(alike.pairs) <= len(step.pairs)
                assert torch.equal(
                    *(seen_of(pairs, len(places), layout.count(held)) for pairs in (step.pairs, alike.pairs))
                )
                needed = set()
                for pair in step.pairs:
                    start, stop = pair.columns
                    assert stop - start == pair.keys[1] - pair.keys[0] > 0
                    assert layout.Places(held).rows(pair.columns) == pair.keys
                    needed |= set(range(start, stop))
                    band = within(pair)
                    assert band.any(1).all() or lower == 2 or upper == -1
                    assert torch.equal(band, of_windows(pair))
                    seen[places[pair.queries[0]] : places[pair.queries[1] - 1] + 1, start:stop] += band.int()
                if kind == "contiguous" and not cuts:
                    assert layout.count(step.receives) == len(needed)
        assert torch.equal(seen, visible(length, lower, upper, cuts).int()), (lower, upper)


def seen_of(pairs, rows, keys):
    """How often each row of a rank sees each key of those that it has in a step."""
    seen = torch.zeros(rows, keys, dtype=torch.int)
    for pair in pairs:
        assert torch.equal(within(pair), of_windows(pair))
        seen[slice(*pair.queries), slice(*pair.keys)] += within(pair).int()
    return seen


@pytest.mark.parametrize("upper, pairs", [(0, (1, 1, 1)), (None, (1, 1, 1))])
def test_pairs_of_zigzag_are_joined(upper, pairs):
    """A rank has one call of a kernel in each step, causal or not, where its spans alone would be three or four."""
    spans = spans_of("zigzag", 24, 3)
    for rank in range(3):
        steps = layout.schedule(spans, rank, None, upper, joins=True)
        assert tuple(len(step.pairs) for step in steps) == pairs
        assert len(layout.schedule(spans, rank, None, upper)[0].pairs) == (3 if upper == 0 else 4)
    backwards = tuple(tuple(reversed(of_rank)) for of_rank in spans)
    first = layout.schedule(backwards, 0, None, 0, joins=True)[0]
    assert torch.equal(seen_of(first.pairs, 8, 8), torch.ones(8, 8).tril().int().roll((4, 4), (0, 1)))


def test_rows_in_turn():
    """A row for each span and rank: not causal, what travels is one pair all the same."""
    spans = tuple(tuple((row, row + 1) for row in range(rank, 256, 4)) for rank in range(4))
    step = layout.schedule(spans, 0, None, None, joins=True)[1]
    assert [pair[:2] for pair in step.pairs] == [((0, 64), (0, 64))] and len(step.receives) == 64
    causal = layout.schedule(spans, 0, None, 0, joins=True)
    assert torch.equal(seen_of(causal[0].pairs, 64, 64), torch.ones(64, 64, dtype=torch.int).tril())


def within(pair):
    """Which query of a pair sees which key."""
    offset = torch.arange(pair.keys[1] - pair.keys[0]) - torch.arange(pair.queries[1] - pair.queries[0])[:, None]
    seen = torch.ones_like(offset, dtype=torch.bool)
    seen = seen if pair.lower is None else seen & (offset >= pair.lower)
    return seen if pair.upper is None else seen & (offset <= pair.upper)


def of_windows(pair):
    """The same as flash-attn defines its windows: from the last query and key, -1 being no limit."""
    q_len, kv_len = pair.queries[1] - pair.queries[0], pair.keys[1] - pair.keys[0]
    left, right = cuda.windows(q_len, kv_len, pair.lower, pair.upper)
    assert left >= -1 and right >= -1
    offset = torch.arange(kv_len) - torch.arange(q_len)[:, None] - (kv_len - q_len)
    seen = torch.ones_like(offset, dtype=torch.bool)
    seen = seen if left == -1 else seen & (offset >= -left)
    return seen if right == -1 else seen & (offset <= right)


def test_work_is_balanced():
    """The scores of the rank with the most, beside the mean: zigzag for causal masks, contiguous for windows."""
    length, size = 1 << 10, 4

    def scores(kind, lower, upper):
        spans, works = spans_of(kind, length, size), []
        for rank in range(size):
            steps = layout.schedule(spans, rank, lower, upper)
            works.append(sum(int(within(pair).sum()) for step in steps for pair in step.pairs))
        return max(works) * size / sum(works)

    assert scores("contiguous", None, 0) == pytest.approx(1.75, abs=0.01)
    assert scores("zigzag", None, 0) == pytest.approx(1, abs=0.002)
    assert scores("contiguous", -63, 0) < 1.05


def test_keys_that_travel():
    """A causal window needs a few keys of the rank before; a causal zigzag half of the keys of the ranks before."""
    spans = spans_of("contiguous", 4096, 4)
    for rank in range(4):
        steps = layout.schedule(spans, rank, -255, 0)
        first = spans[rank][0][0]
        assert [step.receives for step in steps[1:]] == [((first - 255, first),) if rank else (), (), ()]
    spans = spans_of("zigzag", 4096, 4)
    for rank in range(4):
        for step in layout.schedule(spans, rank, None, 0)[1:]:
            assert layout.count(step.receives) == (512 if step.receives_from < rank else 1024)


@pytest.mark.parametrize("heads, kv_heads", [(8, 8), (8, 2), (6, 3), (5, 1), (6, 2), (1, 1), (12, 3)])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
def test_heads_of_ranks(heads, kv_heads, size):
    queries, keys = heads_of(heads, kv_heads, size)
    assert [head for span in queries for head in range(*span)] == list(range(heads))
    for of_queries, of_keys in zip(queries, keys, strict=True):
        assert {head // (heads // kv_heads) for head in range(*of_queries)} == set(range(*of_keys))


# --- On a group ----------------------------------------------------------------------------------


def shards(kind, length, size):
    group = pool.groups[size]
    own = Layout.of_lengths(kind, group) if isinstance(kind, tuple) else getattr(Layout, kind)(length, group)
    whole = torch.arange(length * 6.0).view(2, length, 3)
    part = own.shard(whole, 1)
    assert part.shape == (2, own.rows, 3) and own.length == length
    assert torch.equal(own.positions(), whole[0, :, 0][own.positions()].long() // 3)
    assert torch.equal(part, whole[:, own.positions()])
    for dtype in (torch.float32, torch.bool, torch.int64):
        assert torch.equal(own.unshard(part.to(dtype), 1), whole.to(dtype))
        assert torch.equal(own.unshard(part.to(dtype).mT, -1), whole.to(dtype).mT)
    part = whole.clone().requires_grad_()
    own.shard(part, -2).sum().backward()
    assert part.grad.sum() == 6 * own.rows
    return own.own, own.rows, repr(own)


@pytest.mark.parametrize(
    "kind, length, size, expected",
    [
        ("contiguous", 10, 3, [((0, 4),), ((4, 7),), ((7, 10),)]),
        ("contiguous", 2, 3, [((0, 1),), ((1, 2),), ()]),
        ("zigzag", 12, 3, [((0, 2), (10, 12)), ((2, 4), (8, 10)), ((4, 6), (6, 8))]),
        ("zigzag", 15, 2, [((0, 4), (12, 15)), ((4, 8), (8, 12))]),
        ("zigzag", 3, 4, [((0, 1),), ((1, 2),), ((2, 3),), ()]),
        ((3, 0, 4), 7, 3, [((0, 3),), (), ((3, 7),)]),
        ("zigzag", 5, 1, [((0, 3), (3, 5))]),
    ],
    ids=str,
)
def test_spans(kind, length, size, expected):
    found = pool.shared().run(pool.RANKS[size], shards, kind, length, size)
    assert [spans for spans, _, _ in found] == expected
    assert [rows for _, rows, _ in found] == [layout.count(spans) for spans in expected]
    assert found[0][2] == f"Layout({tuple(expected)}, rank 0)"


def test_without_a_process_group():
    with pytest.raises(RuntimeError, match=r"no process group yet; call torch.distributed.init_process_group\(\)"):
        Layout.contiguous(8)


def wrong_layouts():
    group, sentences = pool.groups[2], []
    for make in (
        lambda: Layout.contiguous(-1, group),
        lambda: Layout.zigzag(2.5, group),
        lambda: Layout.of_lengths([3], group),
        lambda: Layout([[(0, 3)], [(4, 6)]], group),
        lambda: Layout([[(0, 3)], [(2, 6)]], group),
        lambda: Layout([[(0, 5.7)], [(5, 10)]], group),
        lambda: Layout([[(0, 5), (9, 5)], []], group),
        lambda: Layout([(0, 5), (5, 10)], group),
        lambda: Layout.contiguous(8, group).shard(torch.zeros(2, 8), 2),
        lambda: Layout.contiguous(8, group).shard(torch.zeros(2, 9), 1),
        lambda: Layout.contiguous(8, group).unshard(torch.zeros(2, 9), 1),
        lambda: Layout.contiguous(8, group).unshard(torch.zeros(2, 4, requires_grad=True), 1),
    ):
        with pytest.raises(ValueError) as caught:
            make()
        sentences.append(str(caught.value))
    return sentences


def test_wrong_layouts():
    sentences = pool.shared().run(pool.RANKS[2], wrong_layouts)[0]
    for sentence, part in zip(
        sentences,
        (
            "a length is -1; it must be a whole number, 0 or more",
            "a length is 2.5; it must be",
            "spans are of 1 ranks; the group has 2",
            "together they must be all rows of the sequence, each once",
            "together they must be all rows of the sequence, each once",
            "the spans of a rank are [(0, 5.7)]; they must be pairs (start, stop) of whole numbers",
            "the spans of a rank are [(0, 5), (9, 5)]; they must be pairs",
            "the spans of a rank are (0, 5); they must be pairs",
            "dim is 2; the tensor has 2 dimensions",
            "the tensor has 9 rows in dimension 1; the layout has 8",
            "the tensor has 9 rows in dimension 1; rank 0 of the layout has 4",
            "requires a gradient, which unshard does not pass on",
        ),
        strict=True,
    ):
        assert part in sentence
