"""A network's weights shared out among the processes, by PyTorch's `fully_shard` (FSDP).

Each process holds a part of every tensor, of its gradient, moments and average. The parts of a
block are put together while it computes, and let go again. What is computed stays the same.
"""

from __future__ import annotations

import copy
from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from kdc.processes import this_process
from kdc.training.efficiency import REPEATED


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, whose parts the processes hold; every process calls it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own(tensor: Tensor) -> Tensor:
    """This process's part, a view: what is written into it is written into the tensor."""
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor


def shared_as(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, the same in every process, shared out as `like` is."""
    if not isinstance(like, DTensor) or value.shape != like.shape:
        return value
    return distribute_tensor(
        value.to(like.device), like.device_mesh, like.placements, src_data_rank=None
    )


def part_of(part: Tensor, like: Tensor) -> Tensor:
    """A tensor of which this process holds `part`, as it holds `own(like)`; see `whole`."""
    if not isinstance(like, DTensor):
        return part
    return DTensor.from_local(
        part.to(like.device), like.device_mesh, like.placements, shape=like.shape,
        stride=like.stride(),
    )  # fmt: skip


def share_out(model: nn.Module) -> nn.Module:
    """A twin of `model` whose weights are shared out among the processes.

    Hooks that hang in `model` hang in the twin too. `model` itself stays as it is, with its whole
    weights, which `gather` brings up to date. So of the 20 bytes that training holds a weight
    (float32: itself twice, gradient, two moments; an average makes 24) 4 stay with each process.
    """
    process, shared = this_process(), _twin(model)
    mesh = init_device_mesh(process.device.type, (process.num_processes,))
    for module in shared.modules():
        if type(module).__name__ in REPEATED:
            fully_shard(module, mesh=mesh)
    fully_shard(shared, mesh=mesh)
    return shared


@torch.no_grad()
def gather(shared: nn.Module, model: nn.Module) -> None:
    """Copy the weights of a twin into the network it was made from; every process calls it."""
    for parameter, part in zip(model.parameters(), shared.parameters(), strict=True):
        parameter.copy_(whole(part))


def _twin(module: nn.Module) -> nn.Module:
    """The same network with parameters of its own: PyTorch cannot undo what `fully_shard` does."""
    twin = copy.copy(module)
    for name, value in module.__dict__.items():
        if type(value) in (dict, OrderedDict, set):
            twin.__dict__[name] = copy.copy(value)
    for name, child in module._modules.items():
        twin._modules[name] = None if child is None else _twin(child)
    for name, parameter in module._parameters.items():
        if parameter is not None:
            twin._parameters[name] = nn.Parameter(parameter.detach(), parameter.requires_grad)
    return twin
