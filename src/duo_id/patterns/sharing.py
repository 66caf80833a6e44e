"""A head pattern as a repo on the model hub: its files, a figure, and a model card that says how it was found."""

import html
import json
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from huggingface_hub import HfApi, ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined

from duo_id.common.documents import checked, read_object
from duo_id.common.errors import UserError, check, printable
from duo_id.common.figures import save_figure
from duo_id.common.files import write_text
from duo_id.common.integrity import sealed
from duo_id.patterns import hub
from duo_id.patterns.fields import fractions
from duo_id.patterns.pattern import HeadPattern
from duo_id.patterns.provenance import PublishedSummary
from duo_id.patterns.saved import save_pattern
from duo_id.patterns.sources import SHIPPED, list_patterns

CARD, FIGURE, SUMMARY = "README.md", "gates.png", "summary.json"
MARKDOWN = re.compile(r"[\\`*_\[\]|~$]")  # characters that start inline markup
MAX_CELL = 60  # characters of a value in the card's table


def push_to_hub(
    pattern: HeadPattern,
    repo: str,
    *,
    run: str | Path | None = None,
    sparsities: Sequence[float] = (0.25, 0.5, 0.75),
    revision: str | None = None,
    private: bool | None = None,
    message: str = "Head pattern",
    token: str | None = None,
) -> str:
    """Push a pattern to a repo on the hub, which is created if necessary; `load_pattern(repo)` reads it.

    Args:
        pattern: what to share.
        repo: `user/repo`.
        run: the run folder or shipped name that it comes from; its summary.json is published as evidence.
        sparsities: of the masks to write.
        revision: a branch; None: the main one.
        private: visibility of a new repo; None: the account's default.
        message: of the commit.
        token: None: the one stored by `hf auth login`, or HF_TOKEN.

    Returns:
        the URL of the commit.

    Raises:
        UserError: the hub refuses or cannot be reached, or the summary cannot be read.
    """
    check(isinstance(pattern, HeadPattern), f"pattern: a {type(pattern).__name__} is not a HeadPattern")
    if not isinstance(repo, str) or hub.split_revision(repo) != (repo, None):
        raise UserError(f"{repo} is not the name of a repo: pass user/repo, and a branch as revision=")
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as scratch:
        write_folder(pattern, Path(scratch), repo, run, sparsities)
        with hub.readable_errors(repo, revision, local=False):
            api.create_repo(repo, private=private, exist_ok=True)
            if revision is not None:
                api.create_branch(repo, branch=revision, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repo,
                folder_path=scratch,
                commit_message=message,
                revision=revision,
                delete_patterns="mask_sparsity_*.tsv",  # of an earlier push
            )
    return str(commit.commit_url)


def write_folder(
    pattern: HeadPattern,
    folder: Path,
    repo: str,
    run: str | Path | None = None,
    sparsities: Sequence[float] = (0.25, 0.5, 0.75),
) -> None:
    """Write the contents of a repo to a local folder, which `load_pattern` reads as well.

    Args:
        pattern: what to share.
        folder: destination.
        repo: `user/repo`, for the card.
        run: as for `push_to_hub`.
        sparsities: of the masks to write; the card shows the middle one.

    Raises:
        UserError: a sparsity is out of range, or the summary cannot be read.
    """
    ascending = fractions("sparsities", sparsities)
    if not ascending:
        raise UserError("sparsities=() leaves no mask to show: pass at least one")
    summary = _summary(run)
    sparsity = ascending[len(ascending) // 2]
    results = (summary or {}).get("results") or []
    card = model_card(pattern, repo, results, sparsity)
    save_pattern(pattern, folder, ascending)
    title = _model(pattern).get("name") or _model(pattern).get("id")
    save_figure(pattern.plot(sparsity, title=title), folder / FIGURE)
    if summary is not None:
        write_text(folder / SUMMARY, json.dumps(sealed(summary), indent=1))
    write_text(folder / CARD, card)


def model_card(
    pattern: HeadPattern, repo: str, results: Sequence[Mapping[str, Any]] = (), sparsity: float = 0.5
) -> str:
    """The model card: Markdown with YAML front matter.

    Args:
        pattern: the pattern that it describes.
        repo: `user/repo`.
        results: rows of a summary.json.
        sparsity: shown in the figure and used in the example.
    """
    model, gated = _model(pattern), pattern.gated_layers
    layers, kv_heads = pattern.scores.shape
    base = model.get("id") if hub.split_revision(str(model.get("id"))) else None
    front = ModelCardData(base_model=base, library_name="duo_id", tags=["retrieval-heads", "duo-attention", "kv-cache"])
    environment = Environment(
        loader=PackageLoader("duo_id.patterns", ""), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("card.md.j2").render(
        front=front.to_yaml(),
        title=f"Retrieval heads of {_cell(model.get('name') or model.get('id') or 'a model')}",
        model_link=f"[{base}](https://huggingface.co/{base})" if base else _cell(model.get("id") or "a model"),
        layers=layers,
        kv_heads=kv_heads,
        sink_size=pattern.sink_size,
        recent_size=pattern.recent_size,
        ungated=len(gated) < layers,
        gated=", ".join(map(str, gated)),
        percent=f"{100 * sparsity:.4g}",
        sparsity=sparsity,
        repo=repo,
        spans="" if pattern.needs is None else " or ".join(map(str, pattern.needs.levels[:-1])),
        results=_result_rows(results),
        provenance=dict(_provenance_rows(pattern.provenance)),
        evidence=bool(results),
    )


def _summary(run: str | Path | None) -> dict[str, Any] | None:
    """The published part of the summary.json of a run folder or a shipped pattern: the fields of its schema."""
    if run is None:
        return None
    is_shipped = str(run) in list_patterns()
    path = (SHIPPED / run if is_shipped else Path(run).expanduser()) / SUMMARY
    if path.is_symlink() and not is_shipped:  # some installers use links for package files
        raise UserError(f"run={run}: {path} is a symbolic link, maybe to a private file: copy the file there")
    if not path.is_file():
        raise UserError(f"run={run}: there is no {path}; pass the folder of a finished training run")
    return checked(PublishedSummary, read_object(path), path).model_dump(exclude={"settings"}, exclude_unset=True)


def _result_rows(results: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """One row for each kind of mask and sparsity, means over the seeds of random masks."""
    try:
        table = pd.DataFrame(results, columns=["heads", "sparsity", "answer_loss", "token_accuracy"])
        table = table.dropna().groupby(["heads", "sparsity"], sort=False).mean(numeric_only=True).reset_index()
        return [
            {
                "heads": "full attention" if row.heads == "full" else _cell(row.heads),
                "sparsity": f"{100 * row.sparsity:.4g}%",
                "loss": f"{row.answer_loss:.3f}",
                "accuracy": f"{100 * row.token_accuracy:.1f}%",
            }
            for row in table.itertuples()
        ]
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{SUMMARY}: results are not the rows of a training run ({error})") from None


def _provenance_rows(provenance: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Rows of the card's provenance table: the settings of method and data, and the software versions."""
    settings = provenance.get("settings") or {}
    for group in ("method", "data"):
        yield from _overrides(group, settings.get(group))
    for key, value in provenance.items():
        if key not in ("settings", "model") and isinstance(value, (str, int, float)):
            yield _cell(key), _cell(value)
    if versions := provenance.get("versions"):
        yield "versions", _cell(", ".join(f"{name} {version}" for name, version in versions.items()), 4 * MAX_CELL)


def _overrides(key: str, value: Any) -> Iterator[tuple[str, str]]:
    """A setting, or the settings of a group, as command-line overrides."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _overrides(f"{key}.{name}", inner)
    elif value is not None:
        yield _cell(key, 4 * MAX_CELL), _cell(value)


def _cell(value: Any, longest: int = MAX_CELL) -> str:
    """A value as a single-line table cell, without Markdown, HTML or characters that change the text direction."""
    text = value if isinstance(value, str) else json.dumps(value)
    text = printable(" ".join(text.split()))
    text = text if len(text) <= longest else f"{text[: longest - 1]}…"
    return html.escape(MARKDOWN.sub(r"\\\g<0>", text), quote=False)


def _model(pattern: HeadPattern) -> dict[str, Any]:
    return pattern.provenance.get("model") or {}
