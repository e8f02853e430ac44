"""context_parallel_attention beside flash_attention on one process, over 1 to 4 processes, by both methods."""

import pytest
import torch

import cases
import pool
from stand_in import FULL

# make test-full has every combination.
SOME_SIZES, SOME_LAYOUTS = (pool.SIZES, tuple(cases.LAYOUTS)) if FULL else ((2, 4), ("zigzag", "uneven"))


def check(size, **case):
    """Fails unless results are those of one process, in f16 and bf16 as exact as those."""
    cases.check(pool.shared().run(pool.RANKS[size], cases.compare, size, **case), case.get("dtype", torch.float64))


BANDS = {
    "causal": {"is_causal": True},
    "full": {},
    "window": {"window_size": 9},
    "both sides": {"window_size": (3, 7)},
    "causal window": {"is_causal": "bottom_right", "window_size": (5, 2)},
    "own key only": {"window_size": 1},
    "keys after": {"window_size": (0, -1)},
}


@pytest.mark.parametrize("size", pool.SIZES)
@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("band", BANDS)
def test_bands(size, layout, band):
    check(size, layout=layout, **BANDS[band])


DOCUMENTS = {
    "two": (20,),
    "many": (0, 3, 4, 11, 12, 12, 25, 36, 37),
}


@pytest.mark.parametrize("size", pool.SIZES)
@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("band", ["causal", "both sides"])
def test_documents(size, layout, documents, band):
    check(size, layout=layout, documents=DOCUMENTS[documents], **BANDS[band])


MASKS = ("bool", "float", "bfloat16", "of rows", "of columns", "one column of bool")


@pytest.mark.parametrize("size", SOME_SIZES)
@pytest.mark.parametrize("layout", SOME_LAYOUTS)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("band", ["causal", "full"])
def test_masks(size, layout, mask, band):
    if mask == "bfloat16":  # its gradient is rounded
        check(size, layout=layout, mask=mask, dtype=torch.bfloat16, **BANDS[band])
    else:
        check(size, layout=layout, mask=mask, **BANDS[band])


@pytest.mark.parametrize("size", SOME_SIZES)
@pytest.mark.parametrize("layout", SOME_LAYOUTS)
@pytest.mark.parametrize("sinks", [(4,), (2, 4)])
@pytest.mark.parametrize("mask", [None, "bool"])
def test_sinks(size, layout, sinks, mask):
    check(size, layout=layout, sinks=sinks, mask=mask, dtype=torch.float32, **BANDS["causal window"])


NUMBERS = {
    "heads": {"kv_heads": 4},
    "one key head": {"kv_heads": 1},
    "value_dim": {"value_dim": 24, "head_dim": 8},
    "softcap and scale": {"softcap": 3.0, "scale": 0.7},
    "no lse": {"with_lse": False},
    "few rows": {"length": 3},
    "one row": {"length": 1},
    "longer": {"length": 300, "heads": 2, "kv_heads": 1},
}


@pytest.mark.parametrize("size", SOME_SIZES)
@pytest.mark.parametrize("layout", SOME_LAYOUTS)
@pytest.mark.parametrize("numbers", NUMBERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_numbers(size, layout, numbers, dtype):
    check(size, layout=layout, dtype=dtype, **NUMBERS[numbers], **BANDS["causal"])


@pytest.mark.parametrize("size", SOME_SIZES)
@pytest.mark.parametrize("layout", SOME_LAYOUTS)
@pytest.mark.parametrize("heads", [(4, 2), (8, 8), (6, 3), (5, 1), (6, 2), (1, 1)], ids=str)
@pytest.mark.parametrize("options", [{}, {"documents": (20,)}, {"sinks": True}], ids=str)
def test_all_to_all(size, layout, heads, options):
    sinks = (2, heads[0]) if options.get("sinks") else None
    options = options | {"sinks": sinks, "dtype": torch.float32 if sinks else torch.float64}
    check(size, layout=layout, heads=heads[0], kv_heads=heads[1], method="all_to_all", **options, **BANDS["window"])
