"""Every run says which library it tests and from which seed; --seed N, or MFA_SEED, gives the seed back."""

import os
import random

import hypothesis
import pytest
import torch

from mps_flash_attn import restore_sdpa
from mps_flash_attn.attention import Explanation
from mps_flash_attn.library import library

hypothesis.settings.register_profile("mfa", deadline=None, print_blob=True, database=None)
hypothesis.settings.load_profile("mfa")


def pytest_addoption(parser):
    parser.addoption("--seed", type=int, default=None, help="seed of all random inputs (default: MFA_SEED, else new)")


@pytest.hookimpl(tryfirst=True)  # before hypothesis reads its own option
def pytest_configure(config):
    seed = config.getoption("--seed")
    if seed is None:
        seed = int(os.environ.get("MFA_SEED") or random.SystemRandom().randrange(2**31))
    config.option.hypothesis_seed = str(seed)
    config.mfa_seed = seed


def pytest_report_header(config):
    found = library()
    machine = Explanation.of(found.parse("forward f32 b1 h1 q1 kv1 d64")).machine
    return (
        f"libmfa {found.version} {machine} at {found.path}, threads {found.threads}, "
        f"pool {'of PyTorch' if found.host else 'its own'}, PyTorch {torch.__version__}, --seed {config.mfa_seed}"
    )


@pytest.fixture(autouse=True)
def _seed(request):
    torch.manual_seed(request.config.mfa_seed)


@pytest.fixture(autouse=True)
def _original_sdpa():
    yield
    restore_sdpa()
