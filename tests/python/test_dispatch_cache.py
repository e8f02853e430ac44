"""The dispatch cache: calls that are like an earlier one, and calls that only seem to be.

An entry must not be used where anything differs. The calls are of flash_attention, and at the end of
scaled_dot_product_attention when it is replaced."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

from calls import Seen
from mps_flash_attn import dispatch_cache, flash_attention, replaced_sdpa, sdpa_stats, sdpa_thresholds
from mps_flash_attn.reference import attention
from mps_flash_attn.sdpa import dispatch, original, run
from stand_in import DTYPES


@pytest.fixture(autouse=True)
def _afresh():
    dispatch_cache.clear()


def tensors(*shape, dtype=torch.float32, requires_grad=False):
    shape = shape or (2, 3, 9, 8)
    return [torch.randn(shape, dtype=dtype).requires_grad_(requires_grad) for _ in range(3)]


def cached_calls():
    """The entries of calls, without those of passes and shapes. None stands for a call that came once."""
    entries = dispatch_cache._entries.values()
    return [entry for entry in entries if entry is None or isinstance(entry, dispatch_cache.CacheEntry)]


def warm(*arguments, times=3, **options):
    """Repeats a call until it has an entry, and its gradients have one where there are any. Returns the CachedCall."""
    for _ in range(times):
        out = flash_attention(*arguments, **options)
        out = out[0] if isinstance(out, tuple) else out
        if out.requires_grad:
            torch.autograd.grad(out, [t for t in arguments[:3] if t.requires_grad], torch.ones_like(out))
    (found,) = cached_calls()
    assert found is not None
    return found


def is_right(query, key, value, mask=None, d_out=None, result=None, **options):
    """Whether flash_attention, and its gradients, are what the definition says in float64."""
    if result is None:
        result = flash_attention(query, key, value, attn_mask=mask, **options)
    band = {"upper": 0} if options.get("is_causal") else {}
    exact = [t.detach().double().requires_grad_() for t in (query, key, value)]
    true, _ = attention(*exact, mask if mask is None or mask.dtype is torch.bool else mask.double(), **band)
    close = {"rtol": 2e-2, "atol": 2e-2} if query.dtype in (torch.float16, torch.bfloat16) else {}
    torch.testing.assert_close(result.double(), true, check_dtype=False, **(close or {"rtol": 1e-4, "atol": 1e-5}))
    if result.requires_grad:
        d_out = torch.randn_like(result) if d_out is None else d_out
        inputs = [n for n, t in enumerate((query, key, value)) if t.requires_grad]
        found = torch.autograd.grad(result, [(query, key, value)[n] for n in inputs], d_out)
        expected = torch.autograd.grad(true, [exact[n] for n in inputs], d_out.double())
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one.double(), other, **(close or {"rtol": 1e-4, "atol": 1e-5}))
    return True


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("masked", [None, "bool", "float"])
def test_repeated(dtype, requires_grad, masked):
    """A repeated call with other numbers is right, and so are its gradients."""
    mask = {None: None, "bool": torch.rand(9, 9) < 0.8, "float": torch.randn(9, 9, dtype=dtype)}[masked]
    found = warm(*tensors(dtype=dtype, requires_grad=requires_grad), attn_mask=mask)
    for _ in range(3):
        assert is_right(*tensors(dtype=dtype, requires_grad=requires_grad), mask)
    assert found.misses == 0 and found in cached_calls()


def test_repeated_call_is_not_prepared_again(monkeypatch):
    """A third call prepares no pass, forward and backward."""
    given = tensors(requires_grad=True)
    warm(*given, times=4)
    monkeypatch.setattr("mps_flash_attn.run.prepare_forward", None)
    monkeypatch.setattr("mps_flash_attn.run.prepare_backward", None)
    assert is_right(*given)


@pytest.mark.parametrize("change", ["dtype", "strides", "grad of key only", "parameter", "none requires grad"])
def test_another_kind_of_the_same_shape(change):
    """Another kind of tensors of the same shape, alternating with the first, and then alone."""
    first = tensors(requires_grad=True)
    found = warm(*first)
    other = tensors(requires_grad=change in ("dtype", "strides"))
    if change == "dtype":
        other = [t.detach().to(torch.bfloat16).requires_grad_() for t in other]
    elif change == "strides":
        other = [t.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for t in other]
    elif change == "grad of key only":
        other[1].requires_grad_()
    elif change == "parameter":
        other = [torch.nn.Parameter(t) for t in other]
    for _ in range(3):
        assert is_right(*first) and is_right(*other)
    assert found in cached_calls()  # calls that alternate do not replace each other
    for _ in range(4):
        assert is_right(*other)
    has_key = other[0].requires_grad != first[0].requires_grad  # of its own
    assert (found in cached_calls()) is has_key
    assert is_right(*first)


def test_gradients_off_and_on():
    given = tensors(requires_grad=True)
    for _ in range(4):
        with torch.no_grad():
            assert not flash_attention(*given).requires_grad
        with torch.inference_mode():
            assert flash_attention(*given).is_inference()
        assert flash_attention(*given).requires_grad and is_right(*given)


@pytest.mark.parametrize("option", ["is_causal", "scale", "softcap", "window_size", "return_lse"])
def test_another_option(option):
    given = tensors()
    plain = flash_attention(*given)
    warm(*given)
    other = flash_attention(*given, **{option: True if option == "is_causal" else 2})
    assert isinstance(other, tuple) if option == "return_lse" else not torch.equal(other, plain)
    assert torch.equal(flash_attention(*given), plain)


def test_options_that_are_refused():
    """Options that equal cached ones and yet are wrong raise as without a cache."""
    given = tensors()
    warm(*given, window_size=2)
    with pytest.raises(ValueError, match=r"window_size is 2\.0"):
        flash_attention(*given, window_size=2.0)
    with pytest.raises(TypeError, match="attn_mask is a str"):
        flash_attention(*given, attn_mask="none", window_size=2)
    with pytest.raises(TypeError, match="key is a ndarray"):
        flash_attention(given[0], given[1].numpy(), given[2], window_size=2)
    dispatch_cache.clear()
    warm(*given, window_size=(2, 1))
    with pytest.raises(ValueError, match=r"window_size is \(2.0, 1.0\)"):
        flash_attention(*given, window_size=(2.0, 1.0))


def test_scale_in_a_tensor():
    given, scale = tensors(), torch.tensor(0.5)
    for number in (0.5, 0.5, 0.5, 0.25, 0.125):
        scale.fill_(number)
        assert torch.equal(flash_attention(*given, scale=scale), flash_attention(*given, scale=number))


def test_lists():
    given = tensors()
    for _ in range(3):
        expected = flash_attention(*given, window_size=(2, 1))
        assert torch.equal(flash_attention(*given, window_size=[2, 1]), expected)


def test_one_tensor_given_twice():
    for requires_grad in (True, False):
        for _ in range(4):
            given = tensors(requires_grad=requires_grad)[0]
            expected = flash_attention(given, given.clone(), given.clone())
            assert torch.equal(flash_attention(given, given, given), expected)


@pytest.mark.parametrize("kind", ["neg", "nested", "sparse", "subclass"])
def test_unusual_tensors(kind):
    query, key, value = tensors()
    warm(query, key, value)
    if kind == "neg":
        assert torch.equal(flash_attention(torch._neg_view(-query), key, value), flash_attention(query, key, value))
    elif kind == "subclass":
        odd = value.as_subclass(type("Odd", (torch.Tensor,), {}))
        assert torch.equal(torch.Tensor(flash_attention(query, key, odd)), flash_attention(query, key, value))
    else:
        odd = value.to_sparse() if kind == "sparse" else torch.nested.nested_tensor([value[0], value[1]])
        with pytest.raises(TypeError, match="has the layout"):
            flash_attention(query, key, odd)


def test_transforms_and_modes():
    query, key, value = tensors()
    expected = flash_attention(query, key, value)
    warm(query, key, value)
    batched = torch.vmap(flash_attention, (None, None, 0))(query, key, torch.stack((value, value)))
    torch.testing.assert_close(batched, torch.stack((expected, expected)))
    with Seen() as mode:
        flash_attention(query, key, value)
    assert "mfa::attention_forward" in mode.operators
    with torch.autocast("cpu", torch.bfloat16):
        assert flash_attention(query, key, value).dtype == torch.bfloat16
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(query, torch.ones_like(query))
        with pytest.raises(NotImplementedError, match="jvp"):
            flash_attention(dual, key, value)
    assert torch.equal(flash_attention(query, key, value), expected)


def test_fake_mode_with_real_tensors():
    """A fake mode, which PyTorch's guards do not see, is not skipped."""
    given = tensors(requires_grad=True)
    warm(*given, times=4)
    out = flash_attention(*given)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert isinstance(flash_attention(*given), FakeTensor)
        gradients = torch.autograd.grad(out, given, torch.ones_like(out))
    assert all(isinstance(gradient, FakeTensor) for gradient in gradients)
    assert is_right(*given)


@pytest.mark.parametrize("known", [True, False])
def test_tangent_of_the_incoming_gradient(known):
    """A tangent raises an error, and is not silently dropped; a level without tangents does not raise."""
    given = tensors(requires_grad=True)
    if known:
        warm(*given, times=4)
    out, d_out = flash_attention(*given), torch.randn(2, 3, 9, 8)
    expected = torch.autograd.grad(out, given, d_out, retain_graph=True)
    with torch.autograd.forward_ad.dual_level():
        found = torch.autograd.grad(out, given, d_out, retain_graph=True)
        with pytest.raises(NotImplementedError, match="jvp"):
            torch.autograd.grad(out, given, torch.autograd.forward_ad.make_dual(d_out, d_out))
    assert all(map(torch.equal, found, expected))


def test_second_derivative_raises():
    given = tensors(requires_grad=True)
    warm(*given)
    for d_out in (torch.ones(2, 3, 9, 8), torch.ones(2, 3, 9, 8, requires_grad=True)):
        gradient = torch.autograd.grad(flash_attention(*given), given, d_out, create_graph=True)[0]
        with pytest.raises(NotImplementedError, match="no second derivative"):
            gradient.sum().backward()


@pytest.mark.skipif(not hasattr(torch._dynamo.compiled_autograd, "_enable"), reason="another name of it")
def test_compiled_autograd():
    """Compiled autograd can trace all of the backward pass."""
    given = tensors(requires_grad=True)
    warm(*given)
    expected = torch.autograd.grad(flash_attention(*given).sum(), given)
    out = flash_attention(*given)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager", fullgraph=True)):
        out.sum().backward()
    torch.testing.assert_close([t.grad for t in given], list(expected))


@pytest.mark.parametrize("d_out", ["expanded", "transposed", "negated", "batched"])
def test_another_incoming_gradient(d_out):
    given = tensors(requires_grad=True)
    warm(*given)
    dense = torch.randn(2, 3, 9, 8)
    if d_out == "batched":
        out = flash_attention(*given)
        found = torch.autograd.grad(out, given, torch.stack((dense, 2 * dense)), is_grads_batched=True)
        expected = torch.autograd.grad(flash_attention(*given), given, dense)
        torch.testing.assert_close([f[1] / 2 for f in found], list(expected))
        return
    for _ in range(4):
        other = {
            "expanded": torch.randn(()).expand(2, 3, 9, 8),
            "transposed": torch.randn(2, 9, 3, 8).transpose(1, 2),
            "negated": torch._neg_view(torch.randn(2, 3, 9, 8)),
        }[d_out]
        assert is_right(*given, d_out=other) and is_right(*given, d_out=dense)


def test_other_gradients_wanted():
    given = tensors(requires_grad=True)
    warm(*given)
    d_out = torch.randn(2, 3, 9, 8)
    expected = torch.autograd.grad(flash_attention(*given), given, d_out)
    for n in range(3):
        assert torch.equal(torch.autograd.grad(flash_attention(*given), given[n], d_out)[0], expected[n])


def test_saved_tensors_of_another_layout():
    """Hooks may return saved tensors with other strides."""
    layout = [t.transpose(1, 2).contiguous().transpose(1, 2).detach().requires_grad_() for t in tensors()]
    warm(*layout)
    plain = torch.contiguous_format
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t.clone(memory_format=plain)):
        out = flash_attention(*layout)
    assert is_right(*layout, result=out)
    with torch.autograd.graph.save_on_cpu():
        out = flash_attention(*layout)
    assert is_right(*layout, result=out)


def test_data_replaced_before_backward():
    """`.data` may be set to memory of other strides, or to less."""
    given = tensors(requires_grad=True)
    warm(*given)
    out = flash_attention(*given)
    given[1].data = given[1].data.transpose(1, 2).contiguous().transpose(1, 2)
    assert is_right(*given, result=out)
    out = flash_attention(*given)
    given[1].data = torch.randn(2, 3, 4, 8)
    with pytest.raises((ValueError, RuntimeError)):
        torch.autograd.grad(out, given[0], torch.ones_like(out))


def test_lse_differentiated():
    given = tensors(requires_grad=True)
    warm(*given, return_lse=True)
    out, lse = flash_attention(*given, return_lse=True)
    found = torch.autograd.grad(out.sum() + lse.sum(), given)
    exact = [t.detach().double().requires_grad_() for t in given]
    out, lse = attention(*exact, None)
    for one, other in zip(found, torch.autograd.grad(out.sum() + lse.sum(), exact), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-5)


def test_many_kinds():
    for length in range(1, 40):
        for _ in range(3):
            assert is_right(*tensors(1, 1, length, 4))
    dispatch_cache._entries.update(dict.fromkeys(range(dispatch_cache._MAX_ENTRIES)))
    flash_attention(*tensors(1, 1, 41, 4))
    assert len(dispatch_cache._entries) == 2  # the call, and its pass


def test_full_cache_keeps_what_it_has():
    """Replacing an entry, as the second call of a kind does, drops nothing at the limit."""
    flash_attention(*tensors())
    count = dispatch_cache._MAX_ENTRIES - len(dispatch_cache._entries)
    dispatch_cache._entries.update(dict.fromkeys(range(count)))
    flash_attention(*tensors())
    assert len(dispatch_cache._entries) == dispatch_cache._MAX_ENTRIES


def test_entry_dropped_by_another_thread(monkeypatch):
    """The cache may be cleared by another thread at any time, here right after insert() has found the key in it."""

    class Cleared(dict):
        def __contains__(self, key):
            found = super().__contains__(key)
            self.clear()
            return found

    entries = Cleared()
    monkeypatch.setattr(dispatch_cache, "_entries", entries)
    monkeypatch.setattr(dispatch_cache, "get", entries.get)
    for _ in range(4):
        assert is_right(*tensors(requires_grad=True))


def test_without_guards(monkeypatch):
    monkeypatch.setattr(dispatch_cache, "_guards_work", False)
    given = tensors(requires_grad=True)
    for _ in range(4):
        assert is_right(*given)
    assert set(cached_calls()) == {None}


# --- scaled_dot_product_attention ----------------------------------------------------------------


@pytest.fixture
def replaced(monkeypatch, everything):
    with replaced_sdpa():
        yield


def repeated_sdpa(monkeypatch, *given, **options):
    """Its result, which run_eager has not computed, and how it was counted."""
    for _ in range(3):
        F.scaled_dot_product_attention(*given, **options)
    sdpa_stats(reset=True)
    with monkeypatch.context() as only_again:
        only_again.setattr(run, "run_eager", None)
        return F.scaled_dot_product_attention(*given, **options), sdpa_stats()


@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"scale": 0.3}], ids=str)
def test_sdpa_repeated(monkeypatch, replaced, requires_grad, options):
    given = tensors(requires_grad=requires_grad)
    result, counted = repeated_sdpa(monkeypatch, *given, **options)
    assert counted == {"replaced": 1} and torch.equal(result, flash_attention(*given, **options))


def test_sdpa_after_flash_attention(monkeypatch, replaced):
    """Second derivatives of SDPA are left to PyTorch's own operator; flash_attention has none."""
    given = tensors(requires_grad=True)
    warm(*given, times=4)
    repeated_sdpa(monkeypatch, *given)
    out = F.scaled_dot_product_attention(*given)
    (first,) = torch.autograd.grad(out, given[0], torch.ones_like(out), create_graph=True)
    assert "a second derivative" not in sdpa_stats()
    with pytest.raises(RuntimeError, match="derivative for aten::_scaled_dot_product_flash_attention_for_cpu"):
        first.sum().backward()
    assert sdpa_stats()["a second derivative"] == 1
    out = flash_attention(*given)
    (first,) = torch.autograd.grad(out, given[0], torch.ones_like(out), create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        first.sum().backward()


def test_sdpa_settings_change(monkeypatch, replaced):
    """Settings of PyTorch and of the package that change between calls."""
    given = [t.transpose(1, 2) for t in tensors(2, 9, 3, 8)]
    result, _ = repeated_sdpa(monkeypatch, *given)
    sdpa_stats(reset=True)
    with sdpa_kernel(SDPBackend.MATH):
        F.scaled_dot_product_attention(*given)
    assert sdpa_stats(reset=True) == {"flash attention is disabled": 1}
    assert F.scaled_dot_product_attention(*given).stride() == result.stride()
    monkeypatch.setattr(run, "torch_backend", lambda *_: run.MATH)  # as it would be for other kernels of PyTorch's
    assert F.scaled_dot_product_attention(*given).is_contiguous()
    assert sdpa_stats(reset=True) == {"replaced": 2}


NO_THRESHOLDS = pytest.mark.cpu("on MPS there are no thresholds")


@NO_THRESHOLDS
@pytest.mark.parametrize("option", ["none", "is_causal", "scale", "attn_mask"])
def test_sdpa_that_is_small(monkeypatch, replaced, option):
    """The support of a small call is not checked again until the threshold changes."""
    given = tensors()
    options = {"is_causal": True, "scale": 0.3, "attn_mask": torch.rand(9, 9)}
    options = {name: value for name, value in options.items() if name == option}
    expected = original.original(*given, **options)
    monkeypatch.setitem(sdpa_thresholds, torch.float32, float("inf"))
    for _ in range(3):
        assert torch.equal(F.scaled_dot_product_attention(*given, **options), expected)
    sdpa_stats(reset=True)
    with monkeypatch.context() as only_again:
        only_again.setattr(dispatch, "fallback_reason", None)
        assert torch.equal(F.scaled_dot_product_attention(*given, **options), expected)
    with sdpa_kernel(SDPBackend.MATH):
        F.scaled_dot_product_attention(*given, **options)
    assert sdpa_stats(reset=True) == {"small": 1, "flash attention is disabled": 1}
    monkeypatch.setitem(sdpa_thresholds, torch.float32, 0)
    result, counted = repeated_sdpa(monkeypatch, *given, **options)
    torch.testing.assert_close(result, expected)
    assert counted == {"replaced": 1}


@NO_THRESHOLDS
def test_sdpa_threshold_changes(monkeypatch, replaced):
    given = tensors()
    repeated_sdpa(monkeypatch, *given)
    monkeypatch.setitem(sdpa_thresholds, torch.float32, float("inf"))
    sdpa_stats(reset=True)
    F.scaled_dot_product_attention(*given)
    assert sdpa_stats() == {"small": 1}


@pytest.mark.cpu("the storage of a tensor of mps is aligned")
def test_sdpa_memory_that_is_not_aligned(monkeypatch, replaced):
    """Misaligned memory, which PyTorch accepts, is left to its own operator."""
    query, key, value = tensors()
    expected, _ = repeated_sdpa(monkeypatch, query, key, value)
    memory = torch.frombuffer(bytearray(query.nbytes + 1), dtype=query.dtype, offset=1)
    sdpa_stats(reset=True)
    result = F.scaled_dot_product_attention(memory.view(query.shape).copy_(query), key, value)
    torch.testing.assert_close(result, expected)
    assert sdpa_stats() == {"memory that is not aligned to its elements": 1}


def test_sdpa_dropout(monkeypatch, replaced):
    given = tensors()
    repeated_sdpa(monkeypatch, *given)
    sdpa_stats(reset=True)
    outs = [F.scaled_dot_product_attention(*given, dropout_p=0.5) for _ in range(3)]
    assert sdpa_stats() == {"replaced": 3}
    assert not torch.equal(outs[1], outs[2])
