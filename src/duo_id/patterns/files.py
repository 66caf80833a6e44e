"""The export folder `heads/`, written and read: our own format, plus the files that DuoAttention's loaders read.

heads/
  full_attention_heads.tsv   scores, a row per layer, a column per KV head   } read by DuoAttention's loaders
  config.json                sink_size, recent_size, checksums of the TSVs   } (github.com/mit-han-lab/duo-attention)
  mask_sparsity_50.tsv       0/1 rows (1 = retrieval), a file per sparsity
  heads.json                 all of it plus provenance and needs, written last; the file that `load_pattern` trusts

heads.schema.json, next to this module, is the schema of heads.json. Other tools' files: see `duo_id.patterns.formats`.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Protocol, TypeVar

import torch
from torch import Tensor

from duo_id.common.documents import FIRST, Data, Line, Natural, Tokens, checked, excerpt, read_object, read_text
from duo_id.common.errors import UserError
from duo_id.common.files import write_text
from duo_id.common.integrity import DIFFERS, SEAL, digest_of, sealed
from duo_id.patterns import hub
from duo_id.patterns.needs import PatternFields, SpanNeeds
from duo_id.patterns.sources import CONFIG, HEADS, SCORES, SPANS, file_in, local_file, repo_of
from duo_id.patterns.tables import exact_rows, json_text, number_rows, read_tsv, tsv

SCHEMA = "duo_id/heads"
VERSION = 2
# Functions that convert the contents of a version to the next one; adding or renaming a field needs an entry.
MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {
    1: lambda contents: contents | {"version": 2},  # needs, which a pattern may lack, came with version 2
}
TABLES = "tables_sha256"  # in a config.json: checksums of the TSVs in its folder, by name


Made = TypeVar("Made")
# The fields of a pattern, in this order.
Make = Callable[[Tensor, int, int, tuple[int, ...], dict[str, Any], SpanNeeds | None], Made]


class Fields(PatternFields, Protocol):
    """What is written of a pattern."""

    @property
    def provenance(self) -> dict[str, Any]: ...  # noqa: D102


class Sizes(Data):
    """The fields of a config.json (next to a table of scores) that are used."""

    sink_size: Tokens
    recent_size: Tokens
    model_name: Line | None = None
    gated_layers: Annotated[list[Natural], FIRST] | None = None


class Needs(Data):
    """The needs in a heads.json: spans in tokens, and costs by layer, KV head and span."""

    levels: Annotated[list[int], FIRST]
    costs: Annotated[list[Annotated[list[Annotated[list[float], FIRST]], FIRST]], FIRST]


class Heads(Sizes):
    """The contents of a heads.json, besides its schema and version."""

    gated_layers: Annotated[list[Natural], FIRST]
    layers: Natural
    kv_heads: Natural
    provenance: dict[str, Any]
    scores: Annotated[list[Annotated[list[float], FIRST]], FIRST]
    needs: Needs | None = None


def write_heads(pattern: Fields, masks: Mapping[float, Tensor], folder: str | Path) -> None:
    """Write a pattern and masks to `folder`, each file atomically, `heads.json` last.

    Masks of an earlier export at other sparsities are removed, and its spans.

    Args:
        pattern: what is written.
        masks: by sparsity, (layers, KV heads) bool, True = retrieval.
        folder: made if there is none.
    """
    folder = Path(folder)
    files = {_mask_name(sparsity): tsv(retrieval.int()) for sparsity, retrieval in masks.items()}
    stale = [path for path in folder.glob("mask_sparsity_*.tsv") if path.name not in files]
    files[SCORES] = tsv(pattern.scores)
    files[CONFIG] = json_text(duo_config(pattern, files))
    files[HEADS] = json_text(sealed(_contents(pattern, masks)))
    for name, text in files.items():
        write_text(folder / name, text)
    for path in (*stale, folder / SPANS):
        path.unlink(missing_ok=True)


def read_heads(source: str | Path, make: Make[Made]) -> Made:
    """Read a pattern.

    Args:
        source: a shipped name (see `list_patterns`; it takes precedence over a folder of that name, which is
            `./NAME`), a run folder, its `heads/` folder, a DuoAttention folder, a scores TSV next to its
            `config.json`, or a `heads.json`; if there is no such file, a repo on the hub, `user/repo` or
            `user/repo@revision`. A folder's `heads.json` takes precedence over its other files. Scores are not
            clipped: published gates range from -0.0015 to 1.
        make: called with what a pattern holds.

    Raises:
        UserError: one line that names the file (and the row of a table), or says why the hub could not be used.
    """
    path = local_file(source)
    if path is None:
        path = _fetched(str(source))
    if path.suffix == ".json":
        return heads_from_json(read_object(path), path, make)
    return _read_duo(path, make)


def _fetched(source: str) -> Path:
    """The file of a repo of the hub."""
    names = [folder + name for folder in ("", "heads/") for name in (HEADS, SCORES, CONFIG)]
    repo = repo_of(source)
    assert repo is not None
    file = file_in(hub.fetch(*repo, names))
    if file is None:
        raise UserError(f"the hub's repo {source} has no head pattern ({HEADS} or {SCORES})")
    return file


def contents_of(pattern: Fields) -> dict[str, Any]:
    """The contents of `heads.json` for a pattern, without masks."""
    return _contents(pattern, {})


def heads_from_json(contents: dict[str, Any], path: str | Path, make: Make[Made]) -> Made:
    """The pattern in the parsed contents of a `heads.json`.

    Args:
        contents: the parsed file.
        path: of the file, for messages.
        make: see `read_heads`.

    Raises:
        UserError: see `read_heads`.
    """
    if contents.get("schema") != SCHEMA:
        raise UserError(
            f"{path} is not a head pattern: its schema is {excerpt(contents.get('schema'))}, not {SCHEMA!r} "
            "(python -m duo_id.convert reads other tools' files)"
        )
    while isinstance(version := contents.get("version"), int) and version < VERSION and version in MIGRATIONS:
        contents = MIGRATIONS[version](contents)
    if version != VERSION:
        newer = isinstance(version, int) and version > VERSION
        advice = "; a newer duo_id wrote it, upgrade to read it" if newer else ""
        raise UserError(
            f"{path} has version {excerpt(version)} of its schema, but this duo_id reads version {VERSION}{advice}"
        )
    heads = checked(Heads, contents, path)
    scores = number_rows(f"{path}: scores, row", enumerate(heads.scores, start=1))
    shape, declared = (len(scores), len(scores[0])), (heads.layers, heads.kv_heads)
    if shape != declared:
        raise UserError(
            f"{path}: scores are {shape[0]} layers x {shape[1]} KV heads, "
            f"but layers and kv_heads say {declared[0]} x {declared[1]}"
        )
    return _made(path, scores, heads, heads.provenance, make, heads.needs)


def _contents(pattern: Fields, masks: Mapping[float, Tensor]) -> dict[str, Any]:
    layers, kv_heads = pattern.scores.shape
    return {
        "schema": SCHEMA,
        "version": VERSION,
        "layers": layers,
        "kv_heads": kv_heads,
        "sink_size": pattern.sink_size,
        "recent_size": pattern.recent_size,
        "gated_layers": list(pattern.gated_layers),
        "provenance": pattern.provenance,
        "scores": exact_rows(pattern.scores),
        **_needs_contents(pattern.needs),
        "masks": [
            {"sparsity": sparsity, "retrieval": retrieval.int().tolist()} for sparsity, retrieval in masks.items()
        ],
    }


def _needs_contents(needs: SpanNeeds | None) -> dict[str, Any]:
    if needs is None:
        return {}
    return {"needs": {"levels": list(needs.levels), "costs": [exact_rows(layer) for layer in needs.costs]}}


def duo_config(pattern: Fields, tables: Mapping[str, str]) -> dict[str, Any]:
    """The contents of config.json: what DuoAttention's loaders look up, plus what we need to read its TSVs safely.

    The latter are `gated_layers`, for the TSV of a hybrid model, and checksums, its own and those of the TSVs.

    Args:
        pattern: the pattern that is written.
        tables: the TSVs, by name.
    """
    model = pattern.provenance.get("model")
    name = {"model_name": model["id"]} if isinstance(model, dict) and "id" in model else {}
    sizes = {"sink_size": pattern.sink_size, "recent_size": pattern.recent_size}
    digests = {table: digest_of(text) for table, text in tables.items()}
    return sealed({**name, **sizes, "gated_layers": pattern.gated_layers, TABLES: digests})


def _read_duo(path: Path, make: Make[Made]) -> Made:
    scores = read_tsv(path)
    config_path = path.with_name(CONFIG)
    if not config_path.is_file():
        raise UserError(f"{config_path} is missing: it holds sink_size and recent_size of {path.name}")
    config = read_object(config_path)
    digests = config.pop(TABLES, {})
    if isinstance(digests, dict) and digests.get(path.name) not in (None, digest_of(read_text(path))):
        advice = f"restore the file, or delete {TABLES} and {SEAL} there if you changed it"
        raise UserError(f"{path} {DIFFERS} from that in {CONFIG}; {advice}")
    sizes = checked(Sizes, config, config_path)
    model = {"id": sizes.model_name, "layers": len(scores), "kv_heads": len(scores[0])}
    provenance = {"format": "DuoAttention", "model": model, "config": config}
    return _made(path.parent, scores, sizes, provenance, make)


def _made(
    path: str | Path,
    scores: list[list[float]],
    sizes: Sizes,
    provenance: dict[str, Any],
    make: Make[Made],
    needs: Needs | None = None,
) -> Made:
    gated = tuple(range(len(scores)) if sizes.gated_layers is None else sizes.gated_layers)
    try:
        made_needs = None if needs is None else _made_needs(needs)
        return make(torch.tensor(scores), sizes.sink_size, sizes.recent_size, gated, provenance, made_needs)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _made_needs(needs: Needs) -> SpanNeeds:
    costs = [number_rows(f"needs.costs.{layer}, row", enumerate(rows, 1)) for layer, rows in enumerate(needs.costs)]
    if len({(len(rows), len(rows[0])) for rows in costs}) > 1:
        raise UserError("needs.costs: layers differ in their heads or levels")
    return SpanNeeds(tuple(needs.levels), torch.tensor(costs))


def _mask_name(sparsity: float) -> str:
    """`mask_sparsity_50.tsv` for a half, `mask_sparsity_62.5.tsv` for five eighths."""
    return f"mask_sparsity_{100 * sparsity:.10g}.tsv"
