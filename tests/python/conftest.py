"""Every run says which library it tests and from which seed: 1, so that no run depends on luck; --seed N or MFA_SEED
sets another, and MFA_RANDOM=1 draws a new one.

A test whose library is missing fails. On a machine that does not have it, --without NAME leaves its tests out, and the
run says so. The rest needs PyTorch, pytest, hypothesis and matplotlib. What fails with an old PyTorch by its own fault
is listed in versions.py, and expected.

With MFA_BACKEND=metal the same tests run on the Metal backend (stand_in.py); what it cannot do is left out, and said.
Of the cases of a test one in 17 runs there, and the first, since each compiles kernels for the simulated Metal; all
run with MFA_TEST_FULL, and those of the files of Metal's own always. Some files run there with MFA_TEST_FULL alone.
"""

import os
import random
import zlib
from collections import Counter
from pathlib import Path

import hypothesis
import pytest
import torch

import stand_in
from mps_flash_attn import restore_sdpa, sdpa_stats, sdpa_thresholds
from mps_flash_attn.explanation import Explanation
from mps_flash_attn.library import DEVICES, changed, library
from stand_in import BACKEND, FULL, ON_METAL
from versions import expect_failures

LIBRARIES = ("diffusers", "expecttest", "rich", "transformers")
# What these files test lies above the backends, in code that does not know which it has: once, on the CPU, is enough.
ABOVE_BACKENDS = (
    *("checkpointing", "diffusers", "dropout_torch", "flash_attn", "flash_attn_3", "flash_attn_cache", "flash_impl"),
    *("flex_replacement", "frameworks", "func", "jagged", "jax", "migration", "models", "modes", "numpy"),
    *("sdpa_compiled", "sdpa_flags", "transformers", "transformers_generate"),
)
# So does nearly all of these, whose cases compile kernels that other files run, too: on Metal in test-full alone.
MOSTLY_ABOVE_BACKENDS = ("flex_attention", "operators", "opinfo", "score_mod", "subclasses")
OF_CPU_ALONE = ABOVE_BACKENDS if FULL else ABOVE_BACKENDS + MOSTLY_ABOVE_BACKENDS
collect_ignore = [f"test_{name}.py" for name in (OF_CPU_ALONE if ON_METAL else ("metal",))]
HERE = Path(__file__).parent
if ON_METAL:  # of the files of ranks one
    collect_ignore += [f"distributed/{path.name}" for path in HERE.glob("distributed/test_*.py")]
    collect_ignore.remove("distributed/test_staged.py")
OF_METAL = ("test_metal.py", "test_mps.py", "test_torch_mps.py")

settled = "MFA_RANDOM" not in os.environ
hypothesis.settings.register_profile("mfa", deadline=None, print_blob=True, database=None, derandomize=settled)
hypothesis.settings.load_profile("mfa")


def pytest_addoption(parser):
    seeds = "seed of all random inputs (default: MFA_SEED, else 1; with MFA_RANDOM, a new one)"
    parser.addoption("--seed", type=int, default=None, help=seeds)
    parser.addoption(
        "--without",
        action="append",
        choices=LIBRARIES,
        default=[],
        help="leave out the tests that need this library; may be given more than once",
    )


@pytest.hookimpl(tryfirst=True)  # before hypothesis reads its own option
def pytest_configure(config):
    seed = config.getoption("--seed")
    if seed is None:
        seed = int(os.environ.get("MFA_SEED") or (1 if settled else random.SystemRandom().randrange(2**31)))
    config.option.hypothesis_seed = str(seed)
    config.mfa_seed = seed
    config.addinivalue_line("markers", "needs(library): fails without this library; see --without")
    config.addinivalue_line("markers", "cpu(reason): of the CPU alone, and why; left out with MFA_BACKEND=metal")
    config.metal = stand_in.install() if ON_METAL else None


def some_cases(items):
    """The items to run on Metal, and those to leave out. By a hash: dtypes and the like alternate in the list.
    Checks of operators are left out, as test_operators.py is."""
    begun, kept, left = set(), [], []
    for item in items:
        here = item.path.parent == HERE and item.path.name not in OF_METAL
        test = item.path, getattr(item, "originalname", item.name)
        first = test not in begun and "opcheck" not in item.name
        begun.add(test)
        (kept if first or not here or zlib.crc32(item.nodeid.encode()) % 17 == 0 else left).append(item)
    return kept, left


def pytest_collection_modifyitems(config, items):
    if ON_METAL and not FULL:
        items[:], left = some_cases(items)
        config.hook.pytest_deselected(items=left)
    expect_failures(items)
    for item in items:
        for mark in item.iter_markers("needs"):
            if mark.args[0] in config.getoption("--without"):
                item.add_marker(pytest.mark.skip(reason=f"--without {mark.args[0]}"))
        for mark in item.iter_markers("cpu"):
            if ON_METAL:
                item.add_marker(pytest.mark.skip(reason=f"MFA_BACKEND=metal: {mark.args[0]}"))


def pytest_terminal_summary(terminalreporter):
    left_out = Counter(
        report.longrepr[2].removeprefix("Skipped: ") for report in terminalreporter.getreports("skipped")
    )
    for reason, number in left_out.items():
        terminalreporter.write_line(f"{number} tests were left out: {reason}", yellow=True)


def pytest_report_header(config):
    found = library()
    small = found.parse("forward f32 b1 h1 q1 kv1 d64")
    machine = Explanation.of(changed(small, device=DEVICES["cpu"])).machine
    left_out = ", without float64, which the GPU has not" if ON_METAL else ""
    return (
        f"libmfa {found.version} {BACKEND} {machine}{left_out} at {found.path}, threads {found.threads}, "
        f"pool {'of PyTorch' if found.host else 'its own'}, PyTorch {torch.__version__}, --seed {config.mfa_seed}"
    )


@pytest.fixture(autouse=True)
def _seed(request):
    torch.manual_seed(request.config.mfa_seed)


@pytest.fixture(autouse=True)
def _metal(request):
    """Fails on findings of the simulated Metal, for which a Mac would have ended the process."""
    yield
    metal = request.config.metal
    if metal:
        found = metal.found()
        metal.clear()
        assert not found


@pytest.fixture(autouse=True)
def _original_sdpa():
    yield
    restore_sdpa()


@pytest.fixture
def everything(monkeypatch):
    """Sets all thresholds to 0, so that calls of any size are replaced, and resets the counts."""
    for dtype in sdpa_thresholds:
        monkeypatch.setitem(sdpa_thresholds, dtype, 0)
    sdpa_stats(reset=True)


@pytest.fixture
def one_thread():
    """Runs small problems on one thread: on a busy machine a pool would mostly wait."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
