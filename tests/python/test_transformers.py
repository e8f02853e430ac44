"""attn_implementation="mfa" of transformers: its masks, its arguments, and the calls that are left to transformers'
"sdpa". Models are in test_transformers_generate.py, test_transformers_models.py and test_models.py."""

import copy
import pickle
import random

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from mps_flash_attn import flash_attention, register_transformers, sdpa_stats
from mps_flash_attn.transformers import masks
from mps_flash_attn.transformers.masks import Mask, Pattern, packed_plan
from stand_in import FULL

pytestmark = [pytest.mark.needs("transformers"), pytest.mark.usefixtures("everything", "one_thread", "registered")]
B, H, L, D = 3, 4, 20, 16


@pytest.fixture
def registered():
    with register_transformers():
        yield


class Module(torch.nn.Module):
    """What transformers' attention gets from its layer."""

    is_causal = True
    num_key_value_groups = 2


def attend(name, *given, module=None, **options):
    from transformers import AttentionInterface

    return AttentionInterface()[name](module or Module(), *given, **options)[0]


def layer(length=L, keys=None, batch=B):
    return [torch.randn(batch, heads, n, D) for heads, n in ((H, length), (2, keys or length), (2, keys or length))]


# --- Masks ---------------------------------------------------------------------------------------


def padded(*visible, length=L):
    """A mask of padding whose rows show these ranges of keys."""
    mask = torch.zeros(len(visible), length, dtype=torch.long)
    for row, ranges in zip(mask, visible, strict=True):
        for first, end in ranges:
            row[first:end] = 1
    return mask


def positions(*lengths, batch=1):
    return torch.cat([torch.arange(length) for length in lengths]).expand(batch, -1)


LEFT = padded([(0, L)], [(7, L)], [(19, L)])
RIGHT = padded([(0, L)], [(0, 13)], [(0, 1)])
BOTH = padded([(0, 9)], [(7, L)], [(3, 4)])
HOLES = padded([(0, L)], [(2, 5), (9, L)], [(0, 3), (4, 6)])
EMPTY = padded([(0, L)], [(0, L)], [])
ALL = padded([(0, L)], [(0, L)], [(0, L)])
CASES = {  # (kind of mask, window, padding or positions, batch): how attention sees it
    ("causal", None, None): "None",
    ("causal", None, ALL): "None",
    ("causal", None, LEFT): "leftpad_k",
    ("causal", None, RIGHT): "seqused_k",
    ("causal", None, BOTH): "attn_mask",
    ("causal", None, HOLES): "attn_mask",
    ("causal", None, EMPTY): "attn_mask",
    ("sliding", 6, None): "window_size",
    ("sliding", L, None): "None",
    ("sliding", 6, LEFT): "window_size leftpad_k",
    ("sliding", 6, RIGHT): "window_size seqused_k",
    ("sliding", 6, HOLES): "window_size attn_mask",
    ("bidirectional", None, None): "None",
    ("bidirectional", None, LEFT): "leftpad_k seqused_k",
    ("bidirectional", None, RIGHT): "leftpad_k seqused_k",
    ("bidirectional", None, BOTH): "leftpad_k seqused_k",
    ("bidirectional", None, HOLES): "attn_mask",
    ("bidirectional_sliding", 4, None): "window_size",
    ("bidirectional_sliding", 4, RIGHT): "window_size attn_mask",
    ("causal", None, positions(5, 1, 14)): "starts",
    ("causal", None, positions(8, 12, batch=2)): "starts",
    ("sliding", 4, positions(5, 1, 14)): "window_size starts",
    ("chunked", 6, None): "dense",
    ("chunked", 6, LEFT): "dense",
}
NAMES = {id(one): name for name, one in list(globals().items()) if isinstance(one, torch.Tensor)}


def described(case):
    kind, window, given = case
    what = "" if given is None else NAMES.get(id(given), f"packed {len(given)}")
    return " ".join(filter(None, [kind, str(window or ""), what]))


MAKERS = {
    "causal": "create_causal_mask",
    "sliding": "create_sliding_window_causal_mask",
    "chunked": "create_chunked_causal_mask",
    "bidirectional": "create_bidirectional_mask",
    "bidirectional_sliding": "create_bidirectional_sliding_window_mask",
}


def two_masks(kind, window, length=L, batch=B, cache=None, **given):
    """(ours, that of "sdpa")"""
    from transformers import LlamaConfig, masking_utils

    maker = getattr(masking_utils, MAKERS[kind])
    found = []
    for name in ("mfa", "sdpa"):
        config = LlamaConfig(attn_implementation=name)
        config.sliding_window = config.attention_chunk_size = window
        given.setdefault("attention_mask", None)
        found.append(maker(config, torch.zeros(batch, length, 8), past_key_values=cache, **given))
    return found


def plan_name(mask, query, key):
    if mask is None:
        return "None"
    if type(mask) is not Mask:
        return "dense"
    plan = mask.plan(query, key)
    return " ".join([name for name in plan.options if name != "is_causal"] + ["starts"] * (plan.starts is not None))


@pytest.mark.parametrize("case", CASES, ids=described)
def test_masks(case):
    """A mask is seen as it should be, and the results and gradients are those with the mask of "sdpa"."""
    kind, window, given = case
    is_packed = given is not None and given.max() > 1
    batch = len(given) if is_packed else B
    mask, theirs = two_masks(kind, window, batch=batch, **{"position_ids" if is_packed else "attention_mask": given})
    tensors = layer(batch=batch)
    assert plan_name(mask, *tensors[:2]) == CASES[case]
    module = Module()
    module.is_causal = "bidirectional" not in kind
    results = []
    for one in (mask, theirs):
        inputs = [tensor.clone().requires_grad_() for tensor in tensors]
        out = attend("mfa", *inputs, one, module=module)
        out.square().sum().backward()
        results.append([out.detach(), *(tensor.grad for tensor in inputs)])
    assert_close(*results)
    assert mask is None or torch.equal(mask & True, theirs)
    assert sdpa_stats() == {"replaced": 2}


CACHES = [
    (kind, window, past, new, is_padded)
    for kind in ("dynamic", "static")
    for window in (None, 6)
    for past in (0, 4, 9)
    for new in (1, 5)
    for is_padded in (False, True)
]


@pytest.mark.parametrize("kind, window, past, new, is_padded", CACHES)
def test_caches(kind, window, past, new, is_padded):
    """Of a cache only the keys are read that a query of the step sees: the others are NaN."""
    from transformers import DynamicCache, LlamaConfig, StaticCache

    types = ["sliding_attention" if window else "full_attention"]
    config = LlamaConfig(num_hidden_layers=1, sliding_window=window, layer_types=types)
    cache = DynamicCache(config=config) if kind == "dynamic" else StaticCache(config=config, max_cache_len=17)
    if past:
        cache.update(*layer(past)[1:], 0)
    padding = padded([(0, past + new)], [(2 * bool(past), past + new)], [(0, past + new)], length=past + new)
    given = {"attention_mask": padding if is_padded else None, "cache": cache, "length": new}
    mask, theirs = two_masks("sliding" if window else "causal", window, **given)
    query, *added = layer(new)
    key, value = cache.update(*added, 0)
    seen = theirs
    if seen is None:
        seen = torch.ones(new, key.shape[2], dtype=torch.bool)
        seen = seen.tril() if new > 1 else seen
    seen = seen.expand(B, 1, new, key.shape[2])
    expected = attend("mfa", query, key, value, seen)
    unseen = ~seen.any(2).squeeze(1)[:, None, :, None]
    key, value = (tensor.masked_fill(unseen, torch.nan) for tensor in (key, value))
    found = attend("mfa", query, key, value, mask)
    assert_close(found, expected)
    assert "attn_mask" not in plan_name(mask, query, key) and plan_name(mask, query, key) != "dense"
    assert unseen.any() or kind == "dynamic" or past + new >= key.shape[2]


def drawn(rng):
    """Arguments of a mask function, of which some go beyond what models give, and whether it is causal."""
    from transformers import masking_utils as masks

    batch, length, window = rng.randint(1, 3), rng.randint(1, 9), rng.randint(1, 8)
    keys = rng.choice([length, length, rng.randint(1, 14)])
    offset = rng.choice([0, 0, max(keys - length, 0), rng.randint(0, 8)])
    first = rng.choice([0, 0, 0, rng.randint(0, 5)])
    function, is_causal, local = rng.choice(
        [
            (masks.causal_mask_function, True, None),
            (masks.sliding_window_causal_mask_function(window), True, window),
            (masks.bidirectional_mask_function, False, None),
            (masks.sliding_window_bidirectional_mask_function(window), False, window),
        ]
    )
    total = max(first + keys + rng.choice([0, 0, -2, 3]), 1)
    padding = torch.ones(batch, total, dtype=torch.bool)
    for row in padding:
        kind = rng.choice(["none", "left", "right", "both", "holes"])
        if kind in ("left", "both"):
            row[: rng.randint(0, total)] = False
        if kind in ("right", "both"):
            row[rng.randint(0, total) :] = False
        if kind == "holes":
            row &= torch.rand(total) < 0.6
    given = {"batch_size": batch, "q_length": length, "kv_length": keys, "kv_offset": first, "local_size": local}
    given |= {"q_offset": rng.choice([offset, torch.tensor(offset)]), "mask_function": function}
    given |= {"attention_mask": rng.choice([padding, None]), "dtype": torch.float32}
    given |= {"allow_is_causal_skip": is_causal, "allow_is_bidirectional_skip": not is_causal}
    return given, is_causal


@pytest.mark.parametrize("seed", range(2000 if FULL else 100))
def test_random_masks(seed):
    """Of what no query may see, padding and the end of the keys are not read: they are NaN."""
    from transformers import AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    rng = random.Random(seed)
    torch.manual_seed(seed)
    given, causal = drawn(rng)
    mask, theirs = AttentionMaskInterface()["mfa"](**given), sdpa_mask(**given)
    if theirs is None:
        if mask is None:
            return
        theirs = sdpa_mask(**given | {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})
    module = Module()
    module.is_causal = causal
    batch, _, length, keys = theirs.shape
    query, key, value = layer(length, keys, batch)
    expected = attend("mfa", query, key, value, theirs, module=module)
    plan = mask.plan(query, key) if type(mask) is Mask else None
    if plan is not None and "attn_mask" not in plan.options:
        unseen = torch.arange(keys) >= plan.keys
        if given["attention_mask"] is not None:
            padding = torch.nn.functional.pad(given["attention_mask"], (0, 9))
            unseen = unseen | ~padding[:, given["kv_offset"] :][:, :keys]
        unseen = unseen.expand(batch, keys)[:, None, :, None]
        key, value = (tensor.masked_fill(unseen, torch.nan) for tensor in (key, value))
    assert_close(attend("mfa", query, key, value, mask, module=module), expected)
    assert mask is None or torch.equal(mask & True, theirs)


def test_what_is_done_to_a_mask():
    """An operation on a mask sees that of "sdpa", and what it changes, also by a view, is seen."""
    mask, theirs = two_masks("causal", None, attention_mask=LEFT)
    tensors = layer()
    assert mask.shape == theirs.shape and mask.dtype is torch.bool and mask.device == theirs.device
    assert repr(mask) == f"Mask(shape={tuple(theirs.shape)}, device='cpu')"
    assert mask.to(torch.bool) is mask and plan_name(mask, *tensors[:2]) == "leftpad_k"
    mask[:, :, :, :].masked_fill_(torch.rand(L) < 0.4, False)
    assert 0 < (mask ^ theirs).sum() < theirs.sum()
    assert_close(attend("mfa", *tensors, mask), attend("sdpa", *tensors, mask & True))


MEMORY = {
    "numpy": lambda mask: torch.from_numpy(mask.numpy()),
    "array": lambda mask: torch.from_numpy(np.asarray(mask)),
    "list": lambda mask: torch.tensor(mask.tolist()),
    "dlpack": torch.from_dlpack,
    "dlpack of NumPy": lambda mask: torch.from_numpy(np.from_dlpack(mask).copy()),
    "deepcopy": copy.deepcopy,
    "pickle": lambda mask: pickle.loads(pickle.dumps(mask)),
    "shared": lambda mask: mask.share_memory_() & True,
}


@pytest.mark.parametrize("read", MEMORY)
def test_what_reads_the_memory_of_a_mask(read):
    mask, theirs = two_masks("causal", None, attention_mask=LEFT)
    assert torch.equal(MEMORY[read](mask), theirs)


def test_a_mask_for_other_lengths():
    """A layer with other keys than those of the mask gets the error that "sdpa" gives, and no wrong result."""
    mask, _ = two_masks("causal", None, attention_mask=LEFT)
    with pytest.raises(ValueError, match="attn_mask has the shape"):
        attend("mfa", *layer(keys=L + 2), mask)
    mask, theirs = two_masks("causal", None, batch=1, attention_mask=LEFT[1:2])
    tensors = layer()
    assert_close(attend("mfa", *tensors, mask), attend("mfa", *tensors, theirs))


def test_other_functions_of_masks_are_not_known(monkeypatch):
    """With a transformers whose functions mean something else, or with a user's own, masks are those of "sdpa"."""
    from transformers import masking_utils

    own = {"attention_mask": LEFT, "or_mask_function": lambda batch, head, query, key: key == 3}
    mask, theirs = two_masks("causal", None, **own)
    assert type(mask) is torch.Tensor and torch.equal(mask, theirs)

    def sliding_window_overlay(sliding_window):
        return lambda batch, head, query, key: key >= query - sliding_window

    monkeypatch.setattr(masks, "_known", None)
    monkeypatch.setattr(masking_utils, "sliding_window_overlay", sliding_window_overlay)
    mask, theirs = two_masks("sliding", 4)
    assert type(mask) is torch.Tensor and torch.equal(mask, theirs)


def test_positions_that_are_not_consecutive():
    """Tokens are in one sequence while positions rise by one; there are no others that a pattern may have."""
    sequences = torch.tensor([[0, 0, 0, 1, 1]])
    for number, is_known in ((2, True), (3, False)):
        given = Pattern(upper=0, sequences=sequences, positions=torch.tensor([[0, 1, number, 0, 1]]))
        assert (packed_plan(given, 5, 5, 0) is not None) == is_known


RESTARTS = {  # positions of packed sequences, or of something else
    "packed": ([0, 1, 2, 0, 1, 0, 0, 1], [0, 3, 5, 6, 8]),
    "from two": ([2, 3, 4, 2, 3, 2, 3, 4], [0, 3, 5, 8]),
    "one sequence": ([5, 6, 7, 8, 9, 10, 11, 12], None),
    "a gap": ([0, 1, 2, 5, 6, 0, 1, 2], None),
    "an image": ([0, 0, 0, 0, 1, 2, 3, 4], None),
    "padding": ([1, 1, 0, 1, 2, 3, 4, 5], None),
}


@pytest.mark.parametrize("case", RESTARTS)
@pytest.mark.parametrize("window", [None, 2])
def test_positions_that_begin_anew(case, window):
    """They are heeded where transformers makes no mask of them, because there is a cache; in the tensor that all layers
    get, also after it is changed in place."""
    from transformers import DynamicCache

    given, starts = RESTARTS[case]
    tensors, numbers = layer(8, batch=1), torch.tensor([given])
    ids = numbers[0].new_zeros(8)
    ids[(starts or [0])[:-1]] = 1
    seen = (ids.cumsum(0)[:, None] == ids.cumsum(0)).tril()
    seen = seen.triu(1 - window) if window else seen
    mask, _ = two_masks("sliding" if window else "causal", window, 8, 1, DynamicCache(), position_ids=numbers)
    expected = attend("sdpa", *tensors, seen[None, None])
    for _ in range(2):
        assert_close(attend("mfa", *tensors, mask, position_ids=numbers), expected)
    numbers.copy_(torch.arange(8))
    causal = torch.ones(8, 8, dtype=torch.bool).tril()
    expected = attend("sdpa", *tensors, (causal.triu(1 - window) if window else causal)[None, None])
    assert_close(attend("mfa", *tensors, mask, position_ids=numbers), expected)
    with torch.inference_mode():
        numbers = torch.arange(8)[None]
        assert_close(attend("mfa", *tensors, mask, position_ids=numbers), expected)


def test_positions_without_a_version():
    """They are seen where NumPy or .data changes them, and with them the window of a layer that has no mask."""
    tensors, numbers = layer(8, batch=1), positions(8).clone()
    causal = attend("mfa", *tensors, None, position_ids=numbers)
    for change in (numbers.numpy(), numbers.data):
        for lengths in ((3, 5), (4, 4)):
            change[:] = positions(*lengths)
            for window in (None, 2):
                seen = torch.block_diag(*(torch.ones(n, n) for n in lengths)).bool().tril()
                seen = seen if window is None else seen.triu(1 - window)
                found = attend("mfa", *tensors, None, position_ids=numbers, sliding_window=window)
                assert_close(found, attend("sdpa", *tensors, seen[None, None]))
        change[:] = positions(8)
        assert_close(attend("mfa", *tensors, None, position_ids=numbers), causal)


def test_positions_of_a_gpu_go_by_their_version():
    """There they are not read in each layer; without a version they are."""
    numbers = torch.arange(8, device="meta")[None]
    state = masks._state(numbers)
    assert masks._is_in(state, numbers)
    numbers.zero_()
    assert not masks._is_in(state, numbers)
    with torch.inference_mode():
        numbers = torch.arange(8, device="meta")[None]
        assert not masks._is_in(masks._state(numbers), numbers)


# --- The attention function ----------------------------------------------------------------------

OPTIONS = {
    "causal": {"is_causal": None},
    "not causal": {"is_causal": False},
    "scaling": {"scaling": 0.4},
    "mask": {"mask": torch.arange(L) < torch.tensor([[[[L]]], [[[7]]], [[[1]]]])},
    "bias": {"position_bias": (1, H, L, L)},
    "bias and mask": {
        "position_bias": (1, H, L, L),
        "mask": torch.arange(L) < torch.tensor([[[[L]]], [[[7]]], [[[1]]]]),
    },
}


@pytest.mark.parametrize("case", OPTIONS)
def test_options(case):
    options = dict(OPTIONS[case])
    mask = options.pop("mask", None)
    if "position_bias" in options:
        options["position_bias"] = torch.randn(options["position_bias"])
    tensors = layer()
    ours = attend("mfa", *tensors, mask, **options)
    assert sdpa_stats() == {"replaced": 1}
    assert ours.shape == (B, L, H, D) and ours.is_contiguous()
    assert_close(ours, attend("sdpa", *tensors, mask, **options))


@pytest.mark.parametrize("given", [ALL, RIGHT, LEFT, HOLES], ids=["full", "right", "left", "holes"])
@pytest.mark.parametrize("kind", ["causal", "bidirectional"])
def test_bias_and_padding(kind, given):
    """T5: the bias is given beside lengths; its gradient is that with the mask of "sdpa"."""
    module = Module()
    module.is_causal = kind == "causal"
    tensors, bias = layer(), torch.randn(1, H, L, L)
    masks = two_masks(kind, None, attention_mask=given)
    results = []
    for mask in masks:
        own = bias.clone().requires_grad_()
        out = attend("mfa", *tensors, mask, position_bias=own, module=module) * given[:, :, None, None]
        out.square().sum().backward()
        results.append([out.detach(), own.grad])
    assert_close(*results)


def test_one_query_sees_all():
    """A step of generation: transformers calls it causal, though its query is the last of the keys."""
    query, key, value = layer()
    given = query[:, :, -1:], key, value, None
    assert_close(attend("mfa", *given), attend("sdpa", *given))


def test_dropout():
    given = layer()
    outs = [attend("mfa", *given, None, dropout=0.5) for _ in range(2)]
    assert outs[0].shape == (B, L, H, D) and not torch.equal(*outs)
    assert sdpa_stats() == {"replaced": 2}


def packed(*lengths):
    starts = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    names = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
    return dict(zip(names, (starts, starts, max(lengths), max(lengths)), strict=True))


@pytest.mark.parametrize("kind", ["causal", "not causal", "window", "sliding_window", "dense", "float", "positions"])
def test_packed_by_numbers(kind):
    """cu_seq_lens_q and the others are heeded with and without a mask, which may know nothing of them."""
    query, key, value = layer(batch=1)
    mask, options = None, {}
    seen = torch.block_diag(*(torch.ones(n, n) for n in (5, 1, 14))).bool()
    if kind != "not causal":
        seen = seen.tril()
    options["is_causal"] = kind != "not causal"
    if "window" in kind:
        seen = seen.triu(-3)
    if kind == "window":
        mask, _ = two_masks("sliding", 4, batch=1)
    if kind == "sliding_window":
        options["sliding_window"] = 4
    if kind == "dense":
        mask = torch.ones(1, 1, L, L, dtype=torch.bool).tril()
    if kind == "float":
        mask = torch.randn(1, 1, L, L).masked_fill(~torch.ones(L, L, dtype=torch.bool).tril(), -torch.inf)
        seen = torch.where(seen, mask, -torch.inf)
    if kind == "positions":
        mask, _ = two_masks("causal", None, batch=1, position_ids=positions(5, 1, 14))
    found = attend("mfa", query, key, value, mask, **packed(5, 1, 14), **options)
    assert_close(found, attend("sdpa", query, key, value, seen[None, None] if seen.dim() == 2 else seen))
    assert sdpa_stats() == {"replaced": 1}


@pytest.mark.parametrize("kind", ["mask", "no mask", "ones", "window"])
def test_packed_by_numbers_and_positions(kind):
    """Where these say something else, the numbers are heeded, and a mask of the positions hides what it hides."""
    tensors, ids = layer(batch=1), positions(5, 15)
    seen = torch.block_diag(*(torch.ones(n, n) for n in (8, 12))).bool().tril()
    mask = None
    if kind == "mask":
        mask, theirs = two_masks("causal", None, batch=1, position_ids=ids)
        seen &= theirs[0, 0]
    if kind == "ones":
        mask, _ = two_masks("causal", None, batch=1, attention_mask=ALL[:1], position_ids=ids)
    if kind == "window":
        mask, theirs = two_masks("sliding", 4, batch=1, attention_mask=ALL[:1], position_ids=ids)
        seen &= theirs[0, 0]
    found = attend("mfa", *tensors, mask, position_ids=ids, **packed(8, 12))
    assert_close(found, attend("sdpa", *tensors, seen[None, None]))
    assert sdpa_stats() == {"replaced": 1}


def test_packed_by_tensors():
    """int64 and largest lengths in tensors are taken, too."""
    query, key, value = layer(batch=1)
    given = {name: torch.as_tensor(one).long() for name, one in packed(8, 12).items()}
    assert_close(
        attend("mfa", query, key, value, None, **given), attend("mfa", query, key, value, None, **packed(8, 12))
    )


def refused(match, *given, **options):
    with pytest.raises(ValueError, match=match):
        attend("mfa", *given, **options)


def test_wrong_arguments():
    tensors, numbers = layer(), packed(8, 12)
    refused('^output_attentions is True, but .* "eager"$', *tensors, None, output_attentions=True)
    refused("^cache is a object; it must be .*", *tensors, None, cache=object())
    del numbers["max_length_k"]
    refused("^cu_seq_lens_q, .* given and max_length_k not; all", *tensors, None, **numbers)
    numbers = packed(8, 12)
    for wrong, words in ((numbers["cu_seq_lens_k"].float(), r"torch\.float32"), ([0, 8, 20], "list")):
        with pytest.raises(TypeError, match=f"^cu_seq_lens_k is {words}; it must be a tensor of int32 or int64"):
            attend("mfa", *tensors, None, **numbers | {"cu_seq_lens_k": wrong})
    bias = torch.zeros(1, H, L, L)
    refused("^position_bias is given with cu_seq_lens_q", *tensors, None, **packed(8, 12), position_bias=bias)
    mask = torch.ones(1, 1, L, L, dtype=torch.bool)
    refused("^a mask is given with cu_seq_lens_q for a batch of 3;", *tensors, mask, **packed(8, 12))
    with pytest.raises(ValueError, match='may not have "flash" in it'):
        register_transformers("mps_flash")


def wide():
    return [torch.randn(1, 1, 9, 520) for _ in range(3)]


def test_what_is_left_to_its_own():
    mask, theirs = two_masks("causal", None, batch=1, length=9, attention_mask=padded([(2, 9)], length=9))
    tensors = wide()
    module = Module()
    module.num_key_value_groups = 1
    assert_close(attend("mfa", *tensors, mask, module=module), attend("sdpa", *tensors, theirs, module=module))
    (reason,) = sdpa_stats()
    assert "520" in reason and "512" in reason


def test_what_is_never_left_out():
    refused("^s_aux is given by Module: attention sinks, .* 512.*; choose", *wide(), None, s_aux=torch.zeros(1))
    refused("^cu_seq_lens_q is given by Module: packed .* 512.*; give position_ids", *wide(), None, **packed(4, 5))
    anew = {"position_ids": positions(4, 5)}
    refused("^position_ids is given by Module: packed .* 512.*; choose use_cache=False", *wide(), None, **anew)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_sinks(dtype):
    inputs, sinks = [one.to(dtype) for one in layer()], torch.randn(H)
    out = attend("mfa", *inputs, None, s_aux=sinks.double())
    expected = flash_attention(*inputs, is_causal=True, enable_gqa=True, sinks=sinks.to(dtype))
    assert_close(out, expected.transpose(1, 2))
    assert sdpa_stats() == {"replaced": 1}


def test_registration_ends():
    """The last registration that ends restores what was extended; one that was registered anew stays."""
    from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
    from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager

    def extended():
        methods = PreTrainedModel.get_correct_attn_implementation, ContinuousBatchingManager.switch_to_cb_friendly_attn
        return [hasattr(method, "of_transformers") for method in methods]

    def names():
        return {"ours", "mfa"} & set(AttentionInterface()) & set(AttentionMaskInterface())

    first, second = register_transformers("ours"), register_transformers("ours")
    first.remove()
    assert names() == {"ours", "mfa"}
    second.remove()
    second.remove()
    assert names() == {"mfa"} and extended() == [True, True]
    theirs = AttentionInterface()["sdpa"], AttentionMaskInterface()["eager"]
    for name in ("sdpa", "eager"):
        with pytest.raises(ValueError, match=f'^name is "{name}"; it must not be that of another'):
            register_transformers(name)
    assert theirs == (AttentionInterface()["sdpa"], AttentionMaskInterface()["eager"])
    register_transformers().remove()
    assert names() == set() and extended() == [False, False]
