"""scaled_dot_product_attention with and without replace_sdpa, on calls that hypothesis draws from all there are.

Results agree within the tolerance rule where ours ran, and to the bit where it did not; errors have the same type and
text; results have the same dtype and strides, and the same tensors get gradients. With dropout, whose masks differ,
values are compared where all is dropped (test_dropout.py has the others).
"""

import contextlib
import math
from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, note, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel

from mps_flash_attn import replaced_sdpa, sdpa_stats
from mps_flash_attn.reference import agree
from stand_in import DTYPES, FULL, ON_METAL

pytestmark = pytest.mark.usefixtures("everything", "one_thread")
DRAWS = (600 if ON_METAL else 2200) // (1 if FULL else 4)
REPLACED = "replaced"


# --- A call --------------------------------------------------------------------------------------


@dataclass
class Call:
    shapes: list
    dtypes: list
    layouts: list
    gradients: list  # which of query, key, value and mask require one
    mask: str | None
    mask_shape: tuple
    options: dict
    mode: str
    autocast: torch.dtype | None
    backends: list | None
    seed: int
    operands: list = field(default_factory=list, repr=False)

    def make(self):
        """Fills in the operands; the same ones each time."""
        generator = torch.Generator().manual_seed(self.seed)
        self.operands = [
            _laid_out(torch.randn(shape, generator=generator, dtype=torch.float64), dtype, layout)
            for shape, dtype, layout in zip(self.shapes, self.dtypes, self.layouts, strict=True)
        ]
        mask = None
        if self.mask == "bool":
            mask = torch.rand(self.mask_shape, generator=generator) < 0.7
        elif self.mask is not None:
            mask = torch.randn(self.mask_shape, generator=generator, dtype=torch.float64)
            mask = mask.masked_fill(torch.rand(self.mask_shape, generator=generator) < 0.2, -math.inf)
            mask = mask.to(self.dtypes[0] if self.mask == "like query" else getattr(torch, self.mask))
        self.operands.append(mask)
        for tensor, wanted in zip(self.operands, self.gradients, strict=True):
            if tensor is not None and wanted and tensor.dtype.is_floating_point:
                tensor.requires_grad_()

    def run(self):
        """{name: tensor} of the result and the gradients, or the error as (type, text)."""
        torch.manual_seed(self.seed)  # of the dropout
        query, key, value, mask = self.operands
        modes = {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}
        with contextlib.ExitStack() as stack:
            stack.enter_context(modes[self.mode]())
            if self.autocast:
                stack.enter_context(torch.autocast("cpu", dtype=self.autocast))
            if self.backends:
                stack.enter_context(sdpa_kernel(self.backends))
            try:
                out = F.scaled_dot_product_attention(query, key, value, mask, **self.options)
            except Exception as error:
                return type(error), str(error)
        results = {"out": out}
        if out.requires_grad:
            names = ("dQ", "dK", "dV", "dmask")
            wanted = {n: t for n, t in zip(names, self.operands, strict=True) if t is not None and t.requires_grad}
            d_out = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).reshape(out.shape).to(out.dtype)
            try:
                found = torch.autograd.grad(out, list(wanted.values()), d_out, allow_unused=True)
            except Exception as error:
                return type(error), str(error)
            results |= dict(zip(wanted, found, strict=True))
        return results

    def truth(self):
        """The results in float64 on the unfused path, without autocast."""
        query, *others = self.operands
        exact = Call(**{name: getattr(self, name) for name in self.__dataclass_fields__})
        exact.autocast, exact.backends = None, [SDPBackend.MATH]
        exact.operands = [
            t if t is None or not t.is_floating_point() else t.detach().double().requires_grad_(t.requires_grad)
            for t in (query, *others)
        ]
        return exact.run()


def _laid_out(tensor, dtype, layout):
    tensor = tensor.to(dtype) if dtype.is_floating_point or dtype.is_complex else (tensor * 4).to(dtype)
    if tensor.dim() < 2:
        return tensor
    if layout == "transposed" and tensor.dim() > 2:  # (B, N, H, D) memory
        return tensor.transpose(-3, -2).contiguous().transpose(-3, -2)
    if layout == "outermost" and tensor.dim() > 2:
        return tensor.movedim(0, -2).contiguous().movedim(-2, 0)
    if layout == "columns first":
        return tensor.mT.contiguous().mT
    if layout == "sliced":
        return F.pad(tensor, (3, 2))[..., 3:-2] if tensor.dtype.is_floating_point else tensor
    if layout == "every second":
        return tensor.repeat_interleave(2, -1)[..., ::2]
    if layout == "expanded":
        return tensor[:1].expand_as(tensor)
    if layout == "negated" and tensor.dtype.is_floating_point:
        return torch._neg_view(tensor.neg())
    return tensor


# --- Drawing -------------------------------------------------------------------------------------

_LAYOUTS = (
    "plain",
    "plain",
    "transposed",
    "outermost",
    "columns first",
    "sliced",
    "every second",
    "expanded",
    "negated",
)
_lengths = st.sampled_from((2, 1, 3, 5, 8, 17, 33, 4, 9, 25, 64, 0))
_widths = st.sampled_from((8, 16, 4, 3, 1, 33))
_few = st.sampled_from((2, 1, 3))
_rarely = st.sampled_from((False,) * 15 + (True,))
_at_times = st.sampled_from((False, False, False, True))


@st.composite
def calls(draw):
    rank = draw(st.sampled_from((4, 4, 4, 4, 3, 3, 2, 5, 6)))
    lead = [draw(_few) for _ in range(rank - 2)]
    q_lead, k_lead, v_lead = lead[:], lead[:], lead[:]
    q_len, kv_len, head_dim = draw(_lengths), draw(_lengths), draw(_widths)
    value_dim = draw(_widths) if draw(_at_times) else head_dim
    options = {}
    if draw(_at_times):
        options["enable_gqa"] = True
        if rank > 2:
            q_lead[-1] = draw(st.sampled_from((6, 4, 2)))
            k_lead[-1] = draw(st.sampled_from((2, 1, 3, 6)))
            v_lead[-1] = draw(st.sampled_from((2, 1, 3))) if draw(_at_times) else k_lead[-1]
    if draw(_at_times):  # some are broadcast
        for some in (q_lead, k_lead, v_lead):
            for place in range(len(some)):
                if draw(_at_times):
                    some[place] = 1
            if draw(_rarely):
                del some[:1]
    shapes = [(*q_lead, q_len, head_dim), (*k_lead, kv_len, head_dim), (*v_lead, kv_len, value_dim)]
    dtype = draw(st.sampled_from(DTYPES))
    dtypes = [dtype] * 3
    if draw(_rarely):  # wrong in one way or another
        which = draw(st.integers(0, 2))
        how = draw(st.sampled_from(("rank", "head_dim", "dtype", "heads", "all dtypes")))
        if how == "rank":
            shapes[which] = shapes[which][-1:]
        elif how == "head_dim":
            shapes[min(which, 1)] = (*shapes[which][:-1], head_dim + 1)
        elif how == "dtype":
            dtypes[which] = draw(st.sampled_from((*DTYPES, torch.int32)))
        elif how == "all dtypes":
            dtypes = [draw(st.sampled_from((torch.int64, torch.complex64, torch.bool)))] * 3
        elif len(shapes[which]) > 2:
            shapes[which] = (*shapes[which][:-3], shapes[which][-3] + 1, *shapes[which][-2:])

    mask, mask_shape = None, ()
    if draw(st.booleans()):
        mask = draw(st.sampled_from(("bool", "like query") * 4 + ("float32", "float64", "int32")))
        full = (*lead[:-1], *q_lead[-1:], q_len, kv_len) if rank > 2 else (q_len, kv_len)
        mask_shape = full[draw(st.integers(0, len(full) - 2)) :]
        mask_shape = tuple(1 if draw(_at_times) else size for size in mask_shape)
        if draw(_rarely):
            mask_shape = draw(st.sampled_from(((), mask_shape[-1:], (2, *full), (*mask_shape[:-1], kv_len + 1))))
    if draw(st.booleans()) and (mask is None or draw(_rarely)):
        options["is_causal"] = True
    if draw(_at_times):
        number = st.sampled_from((0.3, 0.0, -0.2, 1, math.inf, math.nan))
        options["scale"] = torch.tensor(draw(number)) if draw(_rarely) else draw(number)
    if draw(_rarely):
        options["dropout_p"] = draw(st.sampled_from((0.3, 1.0, 1.5, -0.1)))
    backends = (None,) * 13 + ([SDPBackend.MATH], [SDPBackend.FLASH_ATTENTION], [SDPBackend.EFFICIENT_ATTENTION])
    return Call(
        shapes,
        dtypes,
        [draw(st.sampled_from(_LAYOUTS)) for _ in range(3)],
        [draw(st.booleans()) for _ in range(3)] + [mask != "bool" and draw(_at_times)],
        mask,
        mask_shape,
        options,
        draw(st.sampled_from(("grad", "grad", "grad", "no_grad", "inference"))),
        draw(st.sampled_from((None,) * 7 + (torch.bfloat16, torch.float16))),
        draw(st.sampled_from(backends)),
        draw(st.integers(0, 2**31)),
    )


# --- Comparing -----------------------------------------------------------------------------------


def _steps(tensor):
    """The strides; None along a dimension of size 1, where nobody goes by them and PyTorch's own are any."""
    return tensor.shape, [
        stride if size > 1 else None for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    ]


def _check(call, name, ours, theirs, truth, replaced):
    if theirs is None:
        assert ours is None, name
        return
    assert ours.requires_grad == theirs.requires_grad and ours.is_inference() == theirs.is_inference(), name
    if name == "out":
        assert _steps(ours) == _steps(theirs), f"strides {ours.stride()}, PyTorch's {theirs.stride()}"
    if not replaced:
        torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=0, atol=0, equal_nan=True)
        return
    if 0 < call.options.get("dropout_p", 0) < 1:
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape and ours.isfinite().all(), name
        return
    coarsest = max((*call.dtypes, call.autocast or call.dtypes[0]), key=lambda dtype: torch.finfo(dtype).eps)
    terms = 8 * max(call.shapes[0][-2], call.shapes[1][-2], call.shapes[0][-1])
    agree(name, ours, theirs, truth, coarsest, terms)


@pytest.mark.filterwarnings("ignore")  # PyTorch says why it has no backend, on both sides
def test_calls(capsys, request):
    outcomes = {"replaced": 0, "left": 0, "wrong": 0}

    @settings(max_examples=DRAWS)
    @given(calls())
    def compare(call):
        call.make()
        theirs = call.run()
        sdpa_stats(reset=True)
        with replaced_sdpa():
            ours = call.run()
        stats = sdpa_stats(reset=True)
        note(f"{call} {stats}")
        if isinstance(theirs, tuple):
            outcomes["wrong"] += 1
            assert ours == theirs
            return
        assert isinstance(ours, dict), ours
        assert ours.keys() == theirs.keys()
        replaced = REPLACED in stats
        outcomes[REPLACED if replaced else "left"] += 1
        truth = call.truth() if replaced else dict.fromkeys(theirs)
        for name in theirs:
            _check(call, name, ours[name], theirs[name], truth[name], replaced)

    compare()
    with capsys.disabled():
        print(f" [{outcomes}, --seed {request.config.mfa_seed}]", end="")
    assert sum(outcomes.values()) >= 0.9 * DRAWS, outcomes
    assert outcomes[REPLACED] >= 0.27 * DRAWS and outcomes["wrong"] >= 0.04 * DRAWS, outcomes
