"""A frozen model whose weights are sharded over processes, with FSDP2 as transformers sets it up."""

from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel
from transformers.distributed import DistributedConfig


def sharding(world: int) -> DistributedConfig:
    """The config with which `from_pretrained` loads only this process's share of a model, out of `world`."""
    return DistributedConfig(fsdp_size=world)


def shard(model: PreTrainedModel, world: int) -> None:
    """Shard a model on the meta device over `world` processes, as `from_pretrained` would.

    Raises:
        ValueError: transformers has no plan for this model.
    """
    config, _, mesh = model.prepare_distribute_model(sharding(world))
    model.maybe_distribute_model(model, config, mesh)


@torch.no_grad()
def materialise(
    model: PreTrainedModel, device: torch.device, finish: Callable[[nn.Module], None] | None = None
) -> None:
    """Give a model on the meta device random weights, which depend on the generator's state but not on the sharding.

    One module at a time is allocated in full, initialised by transformers, and sharded. Weights are tied at the end.

    Args:
        model: the model.
        device: of the weights.
        finish: called with each module once it has its weights, before the next one gets any; not if they are sharded.
    """
    if finish is None:
        model.to_empty(device=device)
    for module, owner in _inner_first(model, model):
        if finish is not None:
            module.to_empty(device=device, recurse=False)
            owner._init_weights(module)
            finish(module)
            continue
        shares = {name: share for name, share in module._parameters.items() if share is not None}
        full_parameters = {
            name: nn.Parameter(torch.empty(x.shape, dtype=x.dtype, device=device)) for name, x in shares.items()
        }
        module._parameters.update(full_parameters)
        owner._init_weights(module)
        module._parameters.update(shares)
        for name, share in shares.items():
            values = full_parameters[name].detach()
            if isinstance(share, DTensor):
                local_values = distribute_tensor(
                    values, share.device_mesh, share.placements, src_data_rank=None
                )  # each cuts its own
                share.to_local().copy_(local_values.to_local())
            else:
                share.copy_(values)
    model.tie_weights()


def _inner_first(module: nn.Module, owner: PreTrainedModel) -> Iterator[tuple[nn.Module, PreTrainedModel]]:
    """Each module after its children, with the innermost model that contains it, which can initialise it."""
    owner = module if isinstance(module, PreTrainedModel) else owner
    for child in module.children():
        yield from _inner_first(child, owner)
    yield module, owner
