"""What the workers of the pool need for tests of DTensors."""

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.torch_version import TorchVersion

from mps_flash_attn import sdpa_thresholds

R, B, H, N = Replicate(), Shard(0), Shard(1), Shard(2)  # replicated; sharded along batch, heads, sequence
_meshes = {}


def mesh_of(*shape):
    """The mesh of all workers with this shape."""
    if shape not in _meshes:
        _meshes[shape] = init_device_mesh("cpu", shape)
    return _meshes[shape]


def replace_all_sizes():
    sdpa_thresholds.update(dict.fromkeys(sdpa_thresholds, 0))


def drawn(*shapes, dtype=torch.float64):
    """Tensors that require gradients, the same on all workers."""
    torch.manual_seed(0)
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


def distribute(tensors, mesh, *placements):
    """The tensors as DTensors, as leaves; no messages are exchanged from PyTorch 2.7 on."""
    if len(placements) == 1:
        placements = placements * len(tensors)
    options = {"src_data_rank": None} if TorchVersion(torch.__version__) >= "2.7" else {}
    return [
        distribute_tensor(one.detach(), mesh, place, **options).requires_grad_(one.requires_grad)
        for one, place in zip(tensors, placements, strict=True)
    ]


def largest_difference(pairs):
    """The largest difference of DTensors from plain tensors."""
    pairs = list(pairs)
    assert all(one.shape == whole.shape and one.dtype == whole.dtype for one, whole in pairs)
    return max((one.full_tensor() - whole).abs().max().item() for one, whole in pairs)


def sentence(function, *arguments, **options):
    """ "Class: sentence" of the error that a call raises, or None."""
    try:
        function(*arguments, **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None
