"""The tests that fail with some versions of PyTorch by its own fault.

conftest.py expects these failures strictly: a test of this list that passes fails the run. Tests of something that an
old version does not have at all have a skipif of their own.
"""

import re
from typing import NamedTuple

import pytest
import torch
from torch.torch_version import TorchVersion


class Failing(NamedTuple):
    tests: str  # a regular expression, for the whole of file::test[parameters]
    why: str
    since: str = "0"  # the first version that fails
    before: str = "1000"  # the first version that does not


FAILING = (
    Failing(
        r"test_models.py::test_evaluation\[encoder( norm first)?-replaced-.*\]"
        r"|test_not_counted.py::test_nested_tensors_of_padded_rows",
        "without torch.library.get_kernel the operator of nn.MultiheadAttention in evaluation is not replaced",
        before="2.9",
    ),
    Failing(
        r"test_models.py::test_compiled\[.*\]|test_transformers_models.py::test_changed_by_assignment",
        "torch.compile does not trace the decorators of transformers 5.23",
        before="2.9",
    ),
    Failing(
        r"test_operators.py::test_exported\[bool mask-.*\]",
        "torch.export takes the slice [:] of a dynamic length for a constraint on that length",
        before="2.8",
    ),
    Failing(
        r"test_sdpa.py::test_silent\[.*\]",
        "torch.distributed leaves a temporary directory to the end of the interpreter, which warns of it",
        before="2.7",
    ),
    Failing(
        r"test_sdpa_compiled.py::test_compiled\[.*-inference_mode\]",
        "torch.compile under inference_mode decomposes SDPA before it calls any kernel of it",
        before="2.8",
    ),
    Failing(
        r"test_sdpa_compiled.py::test_exported\[.*\]",
        "run_decompositions() of an exported program decomposes SDPA, replaced or not",
        before="2.10",
    ),
    Failing(
        r"test_sdpa_compiled.py::test_compiled_code_on_disk_is_kept_apart",
        "torch.compile does not keep its graphs on disk by default",
        before="2.7",
    ),
    Failing(
        r"test_context_parallel.py::(test_which_rows_a_rank_has\[36-True-contiguous\]|test_uneven_lengths\[.*\])",
        "context_parallel refuses lengths that are no multiple of twice the number of ranks, on all of them",
        before="2.11",
    ),
    Failing(
        r"test_context_parallel.py::test_modules\[.*\]",
        "context_parallel has no plan for modules",
        before="2.10",
    ),
    Failing(
        r"test_context_parallel.py::test_modules\[True\]",
        "with load balancing context_parallel permutes the rows of the tensors that it is given in place",
        since="2.10",
        before="2.11",
    ),
    Failing(
        r"test_subclasses.py::test_causal_bias_(refused\[(part|sum|moved)\]|that_is_no_mask)",
        "a CausalBias refuses every function but SDPA itself, also those that make another of it",
        before="2.8",
    ),
)


def expect_failures(items, version=torch.__version__):
    """Marks those of pytest's `items` that fail with this version of PyTorch."""
    version = TorchVersion(version.split("+")[0])
    rows = [row for row in FAILING if row.since <= version < row.before]
    for item in items:
        name = f"{item.path.name}::{item.name}"
        for row in rows:
            if re.fullmatch(row.tests, name):
                item.add_marker(pytest.mark.xfail(strict=True, reason=f"PyTorch {version}: {row.why}"))
