"""Devices whose memory the group's backend does not read, as mps with gloo: messages go through the host's memory. With
MFA_BACKEND=metal it is libmfa's Metal backend that runs here."""

import pytest
import torch

import cases
import pool
from mps_flash_attn.distributed import transfer
from stand_in import ON_METAL


def staged(size, case):
    layout, direct = cases.layout_of(size, "zigzag", 37), transfer.Peers.is_direct
    copies = []
    transfer.Peers.is_direct = lambda _, device: copies.append(device)
    try:
        found = cases.compare(size, "zigzag", **case)
        whole = torch.arange(37.0)
        assert torch.equal(layout.unshard(layout.shard(whole, 0), 0), whole)
    finally:
        transfer.Peers.is_direct = direct
    assert copies
    return found


CASES = {
    "causal": {"is_causal": True, "dtype": torch.float32},
    "window": {"window_size": (5, 2), "dtype": torch.bfloat16, "sinks": (4,)},
    "all_to_all": {"is_causal": True, "dtype": torch.float32, "method": "all_to_all"},
}


@pytest.mark.parametrize("size", [2] if ON_METAL else [1, 2, 3])
@pytest.mark.parametrize("name", CASES)
def test_staged(size, name):
    cases.check(pool.shared().run(pool.RANKS[size], staged, size, CASES[name]), CASES[name]["dtype"])
