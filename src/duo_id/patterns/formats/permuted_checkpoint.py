"""A model's checkpoint with its heads sorted: in each layer the retrieval heads first, then the streaming ones.

Engines that keep two caches a layer, as DuoAttention (github.com/mit-han-lab/duo-attention) and LServe do, cut the
heads at one place. Sorting is a permutation of whole heads: of the rows of the projections to queries, keys and
values, and likewise of the columns of the one that follows. The model computes what it did, up to the order of sums.
"""

import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from duo_id.common.documents import Data, Natural, checked, read_object
from duo_id.common.errors import UserError, check, first_line
from duo_id.common.files import atomic_path
from duo_id.patterns.formats.options import Options
from duo_id.patterns.formats.quantile_tables import evenly_spaced_ranks
from duo_id.patterns.pattern import HeadPattern
from duo_id.patterns.saved import save_pattern
from duo_id.patterns.sources import CONFIG

# A tensor of an attention layer: the layer, the module within it, and which of the module's tensors.
ATTENTION = re.compile(r"(?:.*\.)?layers\.(\d+)\.\w*attn\.(.+?)\.?(weight|bias)?")
OUTPUT, FUSED = "o_proj", "qkv_proj"  # fused: rows of queries, then of keys, then of values
SEPARATE = ("q_proj", "k_proj", "v_proj")
SHARED = "rotary_emb.inv_freq"  # of all heads, in checkpoints of old
# Files of weights; of these only the shards that transformers reads are sorted, so that no others are copied.
WEIGHTS = ("*.safetensors", "*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack", "*.onnx")
OTHERS = "consolidated"  # how the names of shards begin that are in another project's format


class Sizes(Data):
    """The fields of a model's config.json that are used."""

    num_hidden_layers: Natural
    num_attention_heads: Natural
    num_key_value_heads: Natural
    hidden_size: Natural
    head_dim: Natural | None = None


@dataclass(frozen=True)
class Order:
    """The new order of a layer's heads: for each place the head that moves there, int64, and their width."""

    kv_heads: Tensor
    heads: Tensor
    head_dim: int

    def apply(self, name: str, kind: str | None, tensor: Tensor) -> Tensor | None:
        """The tensor `kind` of the module `name` with its heads in this order; None: it is not known how they lie."""
        queries, keys = (len(heads) * self.head_dim for heads in (self.heads, self.kv_heads))
        rows = len(tensor) if kind is not None and tensor.dim() in (1, 2) else None
        if (name == OUTPUT and kind == "bias") or name == SHARED:
            return tensor
        if name == OUTPUT and rows is not None:
            return _moved(tensor, self.heads, 1) if tensor.shape[1:] == (queries,) else None
        if name in ("q_norm", "k_norm") and rows == self.head_dim:
            return tensor  # all heads share it
        if name in ("q_proj", "q_norm") and rows == queries:
            return _moved(tensor, self.heads)
        if name in ("k_proj", "v_proj", "k_norm") and rows == keys:
            return _moved(tensor, self.kv_heads)
        if name == FUSED and rows == queries + 2 * keys:
            orders = (self.heads, self.kv_heads, self.kv_heads)
            return torch.cat([_moved(*part) for part in zip(tensor.split([queries, keys, keys]), orders, strict=True)])
        return None


def write_permuted_checkpoint(pattern: HeadPattern, path: Path, options: Options) -> str:
    """Write a checkpoint with sorted heads, and in `heads/` the pattern with its mask in the new order.

    Raises:
        UserError: an option is missing, the checkpoint cannot be read, is not the pattern's model, or has attention
            layers whose tensors are not known.
    """
    reason = "format=permuted-checkpoint sorts the heads of a checkpoint"
    if options.checkpoint is None:
        raise UserError(f"{reason}: set checkpoint=FOLDER, with its .safetensors")
    if (sparsity := options.sparsity) is None:
        raise UserError(f"{reason} by a mask: set sparsity=...")
    source = Path(options.checkpoint).expanduser()
    shards = [shard for shard in sorted(source.glob("*.safetensors")) if not shard.name.startswith(OTHERS)]
    check(bool(shards), f"checkpoint={source} holds no .safetensors")
    left_out = {file for file in _weights(source) if file not in shards}
    check(source.resolve() != path.resolve(), f"DST is the checkpoint itself, {path}: give another")
    there = next(iter(sorted(_weights(path))), None)
    check(there is None, f"{there} is there, and other weights beside these would be loaded: give another DST")
    sizes = _sizes(source / CONFIG)
    mask = pattern.binarize(sparsity=sparsity)
    mask.check_fits(sizes.num_hidden_layers, sizes.num_key_value_heads, str(source))
    order = (~mask.retrieval).int().argsort(dim=1, stable=True)
    _check_layers(shards, order)
    for shard in shards:
        _write_shard(shard, path / shard.name, order, sizes)
    for file in sorted(source.iterdir()):
        if file.is_file() and file not in shards and file not in left_out:
            with atomic_path(path / file.name) as temporary:
                shutil.copyfile(file, temporary)
    save_pattern(_reordered(pattern, order, sparsity), path / "heads", (sparsity,))
    count, unsorted = int((~mask.retrieval).sum()), ", ".join(sorted(file.name for file in left_out))
    return (
        f"{path}: the first heads of a layer retrieve, {count} of {order.numel()} stream; their mask: {path / 'heads'}"
        + (f"; left out, since they are not sorted: {unsorted}" if unsorted else "")
    )


def _weights(folder: Path) -> set[Path]:
    """The files of weights in a folder, in any format."""
    return {file for pattern in WEIGHTS for file in folder.glob(pattern) if file.is_file()}


def _sizes(path: Path) -> Sizes:
    """The sizes of a model, or of the language model in it, from its config.json."""
    read = read_object(path)
    text = read.get("text_config")
    sizes = checked(Sizes, read | text if isinstance(text, dict) else read, path)
    check(
        0 < sizes.num_key_value_heads <= sizes.num_attention_heads
        and sizes.num_attention_heads % sizes.num_key_value_heads == 0,
        f"{path}: {sizes.num_attention_heads} query heads do not share {sizes.num_key_value_heads} KV heads evenly",
    )
    return sizes


def _check_layers(shards: list[Path], order: Tensor) -> None:
    """Raise a `UserError` unless each layer has projections of its own, once; or none, if its heads stay."""
    found: dict[int, list[str]] = {layer: [] for layer in range(len(order))}
    for shard in shards:
        for key, _ in _tensors(shard):
            if (match := ATTENTION.fullmatch(key)) and match[3] == "weight" and int(match[1]) in found:
                found[int(match[1])].append(match[2])
    for layer, names in found.items():
        projections = sorted(name for name in names if name in (*SEPARATE, OUTPUT, FUSED))
        stays = not names and bool((order[layer].diff() == 1).all())
        if not stays and projections not in (sorted((*SEPARATE, OUTPUT)), sorted((FUSED, OUTPUT))):
            raise UserError(
                f"{shards[0].parent}: layer {layer} has {', '.join(names) or 'no attention'}, where q_proj, k_proj, "
                "v_proj (or qkv_proj) and o_proj were expected, once each"
            )


def _write_shard(shard: Path, target: Path, order: Tensor, sizes: Sizes) -> None:
    written = {}
    for key, tensor in _tensors(shard):
        written[key] = tensor
        match = ATTENTION.fullmatch(key)
        if match and int(match[1]) < len(order):  # beyond are layers that predict further tokens, which no mask covers
            moved = _order(order[int(match[1])], sizes).apply(match[2], match[3], tensor)
            if moved is None:
                shape = " x ".join(map(str, tensor.shape)) or "a number"
                raise UserError(
                    f"{shard}: {key} ({shape}) is a tensor whose heads are not known: this model is not sorted"
                )
            written[key] = moved.contiguous()
    with atomic_path(target) as temporary:
        save_file(written, temporary, metadata={"format": "pt"})


def _order(kv_heads: Tensor, sizes: Sizes) -> Order:
    group = sizes.num_attention_heads // sizes.num_key_value_heads
    heads = (kv_heads[:, None] * group + torch.arange(group)).flatten()
    return Order(kv_heads, heads, sizes.head_dim or sizes.hidden_size // len(heads))


def _tensors(shard: Path) -> Iterator[tuple[str, Tensor]]:
    try:
        with safe_open(shard, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118  it is no dictionary
                yield key, file.get_tensor(key)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{shard} cannot be read: {first_line(error)}") from error


def _moved(tensor: Tensor, heads: Tensor, dim: int = 0) -> Tensor:
    """A tensor whose heads lie one after the other along `dim`, in the order `heads`."""
    return tensor.unflatten(dim, (len(heads), -1)).index_select(dim, heads).flatten(dim, dim + 1)


def _reordered(pattern: HeadPattern, order: Tensor, sparsity: float) -> HeadPattern:
    """The pattern of the sorted model, with the same heads in its mask.

    Of equal scores on both sides of the cut, other heads would stream in the new order: then scores become ranks.
    """
    needs = pattern.needs
    if needs is not None:
        needs = replace(needs, costs=needs.costs.gather(1, order[..., None].expand(-1, -1, needs.costs.shape[2])))
    provenance = pattern.provenance | {"head_order": order.tolist()}
    moved = replace(pattern, scores=pattern.scores.gather(1, order), provenance=provenance, needs=needs)
    wanted = pattern.binarize(sparsity=sparsity).retrieval.gather(1, order)
    if moved.binarize(sparsity=sparsity).retrieval.equal(wanted):
        return moved
    return replace(moved, scores=evenly_spaced_ranks(pattern).gather(1, order))
