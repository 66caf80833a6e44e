"""A head pattern as a repo of the model hub: its files, a figure, and a model card that says how it was found."""

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
from duo_id.common.errors import UserError, printable
from duo_id.common.figures import save_figure
from duo_id.common.files import write_text
from duo_id.common.integrity import sealed
from duo_id.patterns import hub
from duo_id.patterns.files import SHIPPED, list_patterns, save_pattern
from duo_id.patterns.pattern import HeadPattern
from duo_id.patterns.plots import plot_gates
from duo_id.patterns.provenance import Shared

CARD, FIGURE, SUMMARY = "README.md", "gates.png", "summary.json"
MARKDOWN = re.compile(r"[\\`*_\[\]|~$]")  # what begins a structure within a line
TOLD = 60  # characters of a value in the card's table


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
    """Write a pattern to a repo of the hub, which is made if it does not exist; `load_pattern(repo)` reads it.

    Args:
        pattern: what to share.
        repo: `user/repo`.
        run: the run folder or shipped name that it comes from, whose summary.json goes along as evidence.
        sparsities: of the masks that are written.
        revision: a branch; None: the main one.
        private: of a new repo; None: as the account has it.
        message: of the commit.
        token: None: the one that `hf auth login` stored, or HF_TOKEN.

    Returns:
        the address of the commit.

    Raises:
        UserError: the hub refuses, cannot be reached, or the summary cannot be read.
    """
    if hub.split_revision(repo) != (repo, None):
        raise UserError(f"{repo} is no name of a repo: give user/repo, and a branch as revision=")
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as scratch:
        write_folder(pattern, Path(scratch), repo, run, sparsities)
        with hub.told(repo, revision, here=False):
            api.create_repo(repo, private=private, exist_ok=True)
            if revision is not None:
                api.create_branch(repo, branch=revision, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repo,
                folder_path=scratch,
                commit_message=message,
                revision=revision,
                delete_patterns="mask_sparsity_*.tsv",  # those of an earlier push
            )
    return str(commit.commit_url)


def write_folder(
    pattern: HeadPattern,
    folder: Path,
    repo: str,
    run: str | Path | None = None,
    sparsities: Sequence[float] = (0.25, 0.5, 0.75),
) -> None:
    """Write what a repo holds to a local folder, which `load_pattern` reads as well.

    Args:
        pattern: what to share.
        folder: where.
        repo: `user/repo`, for the card.
        run: as for `push_to_hub`.
        sparsities: of the masks that are written; the card shows the middle one.

    Raises:
        UserError: a sparsity is out of range, or the summary cannot be read.
    """
    if not sparsities:
        raise UserError("sparsities=() leaves no mask to show: give at least one")
    summary = _summary(run)
    shown = sorted(sparsities)[len(sparsities) // 2]
    results = (summary or {}).get("results") or []
    card = model_card(pattern, repo, results, shown)
    save_pattern(pattern, folder, sparsities)
    title = _model(pattern).get("name") or _model(pattern).get("id")
    save_figure(plot_gates(pattern, title, pattern.binarize(sparsity=shown)), folder / FIGURE)
    if summary is not None:
        write_text(folder / SUMMARY, json.dumps(sealed(summary), indent=1))
    write_text(folder / CARD, card)


def model_card(
    pattern: HeadPattern, repo: str, results: Sequence[Mapping[str, Any]] = (), sparsity: float = 0.5
) -> str:
    """The card, Markdown with YAML in front.

    Args:
        pattern: what it is about.
        repo: `user/repo`.
        results: rows of a summary.json.
        sparsity: that the figure shows and the example uses.
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
        title=f"Retrieval heads of {_plain(model.get('name') or model.get('id') or 'a model')}",
        model_link=f"[{base}](https://huggingface.co/{base})" if base else _plain(model.get("id") or "a model"),
        layers=layers,
        kv_heads=kv_heads,
        sink_size=pattern.sink_size,
        recent_size=pattern.recent_size,
        ungated=len(gated) < layers,
        gated=", ".join(map(str, gated)),
        percent=f"{100 * sparsity:.4g}",
        sparsity=sparsity,
        repo=repo,
        results=_result_rows(results),
        found=dict(_found(pattern.provenance)),
        evidence=bool(results),
    )


def _summary(run: str | Path | None) -> dict[str, Any] | None:
    """What is published of the summary.json of a run folder or a shipped pattern: what its schema knows."""
    if run is None:
        return None
    shipped = str(run) in list_patterns()
    path = (SHIPPED / run if shipped else Path(run).expanduser()) / SUMMARY
    if path.is_symlink() and not shipped:  # some installers link what they install
        raise UserError(f"run={run}: {path} is a symbolic link, maybe to what is not to be published: copy it there")
    if not path.is_file():
        raise UserError(f"run={run}: there is no {path}; give the folder of a finished training run")
    return checked(Shared, read_object(path), path).model_dump(exclude={"settings"}, exclude_unset=True)


def _result_rows(results: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """One row for each kind of mask and sparsity, means over the seeds of random masks."""
    try:
        table = pd.DataFrame(results, columns=["heads", "sparsity", "answer_loss", "token_accuracy"])
        table = table.dropna().groupby(["heads", "sparsity"], sort=False).mean(numeric_only=True).reset_index()
        return [
            {
                "heads": "full attention" if row.heads == "full" else _plain(row.heads),
                "sparsity": f"{100 * row.sparsity:.4g}%",
                "loss": f"{row.answer_loss:.3f}",
                "accuracy": f"{100 * row.token_accuracy:.1f}%",
            }
            for row in table.itertuples()
        ]
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{SUMMARY}: results are not the rows of a training run ({error})") from None


def _found(provenance: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What the table of the card says: the settings of method and data, and what they ran on."""
    settings = provenance.get("settings") or {}
    for group in ("method", "data"):
        yield from _overrides(group, settings.get(group))
    for key, value in provenance.items():
        if key not in ("settings", "model") and isinstance(value, (str, int, float)):
            yield _plain(key), _plain(value)
    if versions := provenance.get("versions"):
        yield "versions", _plain(", ".join(f"{name} {version}" for name, version in versions.items()), 4 * TOLD)


def _overrides(key: str, value: Any) -> Iterator[tuple[str, str]]:
    """A setting, or the settings of a group, as one would type them."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _overrides(f"{key}.{name}", inner)
    elif value is not None:
        yield _plain(key, 4 * TOLD), _plain(value)


def _plain(value: Any, longest: int = TOLD) -> str:
    """A value as text on one line of a table: nothing in it is Markdown, HTML, or turns the direction of the line."""
    text = value if isinstance(value, str) else json.dumps(value)
    text = printable(" ".join(text.split()))
    text = text if len(text) <= longest else f"{text[: longest - 1]}…"
    return html.escape(MARKDOWN.sub(r"\\\g<0>", text), quote=False)


def _model(pattern: HeadPattern) -> dict[str, Any]:
    return pattern.provenance.get("model") or {}
