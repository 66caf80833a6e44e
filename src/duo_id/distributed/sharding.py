"""A frozen model of which each process keeps a share, on FSDP2 as transformers sets it up."""

from collections.abc import Iterator

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel
from transformers.distributed import DistributedConfig


def sharding(world: int) -> DistributedConfig:
    """What lets `from_pretrained` build a model on the meta device and read the share of one of `world` processes."""
    return DistributedConfig(fsdp_size=world)


def shard(model: PreTrainedModel, world: int) -> None:
    """Let each of `world` processes keep a share of a model on the meta device, as `from_pretrained` would.

    Raises:
        ValueError: transformers has no plan for this model.
    """
    config, _, mesh = model.prepare_distribute_model(sharding(world))
    model.maybe_distribute_model(model, config, mesh)


@torch.no_grad()
def materialise(model: PreTrainedModel, device: torch.device) -> None:
    """Give a model on the meta device random weights: from a state of the generator the same, however it is sharded.

    One module at a time is made whole, initialised as transformers does, and cut. Tied weights are tied at the end.
    """
    model.to_empty(device=device)
    for module, owner in _inner_first(model, model):
        shares = {name: share for name, share in module._parameters.items() if share is not None}
        whole = {name: nn.Parameter(torch.empty(x.shape, dtype=x.dtype, device=device)) for name, x in shares.items()}
        module._parameters.update(whole)
        owner._init_weights(module)
        module._parameters.update(shares)
        for name, share in shares.items():
            full = whole[name].detach()
            if isinstance(share, DTensor):
                cut = distribute_tensor(
                    full, share.device_mesh, share.placements, src_data_rank=None
                )  # each cuts its own
                share.to_local().copy_(cut.to_local())
            else:
                share.copy_(full)
    model.tie_weights()


def _inner_first(module: nn.Module, owner: PreTrainedModel) -> Iterator[tuple[nn.Module, PreTrainedModel]]:
    """Each module after its children, and the innermost model that it is part of, which knows how it begins."""
    owner = module if isinstance(module, PreTrainedModel) else owner
    for child in module.children():
        yield from _inner_first(child, owner)
    yield module, owner
