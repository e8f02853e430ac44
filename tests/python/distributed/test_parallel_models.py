"""A model under PyTorch's data and tensor parallelism, with scaled_dot_product_attention replaced, over four processes
beside one."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import pool
from mps_flash_attn import flash_attention, replaced_sdpa
from sharded import mesh_of, replace_all_sizes

ALL = range(pool.WORLD)
BATCH, LENGTH, HEADS, KV_HEADS, WIDTH = 4, 16, 8, 4, 64


class Model(nn.Module):
    """Two layers of self-attention with grouped heads. Heads are counted by the tensors: shards have fewer."""

    def __init__(self, attend):
        super().__init__()
        self.attend = attend
        columns = WIDTH // HEADS
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "q": nn.Linear(WIDTH, WIDTH, bias=False),
                    "k": nn.Linear(WIDTH, KV_HEADS * columns, bias=False),
                    "v": nn.Linear(WIDTH, KV_HEADS * columns, bias=False),
                    "out": nn.Linear(WIDTH, WIDTH, bias=False),
                }
            )
            for _ in range(2)
        )

    def forward(self, x):
        for layer in self.layers:
            query, key, value = (layer[name](x).unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2) for name in "qkv")
            x = x + layer["out"](self.attend(query, key, value).transpose(1, 2).flatten(2))
        return x


def by_sdpa(query, key, value):
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


def by_flash_attention(query, key, value):
    return flash_attention(query, key, value, True, enable_gqa=True)


def parallel(way, model):
    if way == "data":
        return DistributedDataParallel(model)
    if way == "fully sharded":
        return fully_shard(model, mesh=mesh_of(4))
    columns = ColwiseParallel(use_local_output=way == "tensor")
    plan = {f"layers.*.{name}": columns for name in "qkv"} | {"layers.*.out": RowwiseParallel()}
    return parallelize_module(model, mesh_of(4), plan)


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def difference(way, attend):
    """The largest difference of a gradient from that of one process."""
    replace_all_sizes()
    torch.manual_seed(0)
    model, data = Model(attend).double(), torch.randn(BATCH, LENGTH, WIDTH, dtype=torch.float64)
    parallel_model = parallel(way, copy.deepcopy(model))
    rank, is_divided = torch.distributed.get_rank(), "tensor" not in way
    with replaced_sdpa():
        model(data).pow(2).mean().backward()
        parallel_model(data[rank : rank + 1] if is_divided else data).pow(2).mean().backward()
    pairs = zip(parallel_model.parameters(), model.parameters(), strict=True)
    return max((whole(one.grad) - of_one.grad).abs().max().item() for one, of_one in pairs)


@pytest.mark.parametrize("attend", [by_sdpa, by_flash_attention])
@pytest.mark.parametrize("way", ["data", "fully sharded", "tensor", "tensor, with DTensors"])
def test_gradients(way, attend):
    assert max(pool.shared().run(ALL, difference, way, attend)) < 1e-12
