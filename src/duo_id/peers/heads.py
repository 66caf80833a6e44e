"""kvpress's static heads as a head pattern, deployable like any other."""

import json
from importlib.metadata import version
from pathlib import Path

from duo_id.common.errors import UserError, one_line
from duo_id.peers.answers import load_samples
from duo_id.peers.reading import load_model
from duo_id.peers.variants import head_scores

FOLDER = "heads-duo-on-the-fly"


def write_heads(run: Path, device: str | None) -> Path:
    """Score the heads of a run's model; model and windows are those of its `samples.jsonl`.

    Args:
        run: the run folder, into which the scores are written in DuoAttention's format.
        device: where the model runs; None: a GPU if there is one.

    Returns:
        the folder with the scores.

    Raises:
        UserError: the run has no samples, or its model cannot be loaded or scored.
    """
    header, _, _ = load_samples(run)
    model, _ = load_model(header, device)
    try:
        scores = head_scores(model)
    except Exception as error:  # kvpress may raise anything for an unknown model
        raise UserError(f"kvpress cannot score the heads of {header['model']}: {one_line(error)}") from None
    config = {"model_name": header["model"]} | {key: header[key] for key in ("sink_size", "recent_size")}
    config |= {"scores": f"duo_attention_on_the_fly of kvpress {version('kvpress')}, {header['dtype']}"}
    folder = run / FOLDER
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    rows = ["\t".join(map(str, row)) + "\n" for row in scores]
    (folder / "full_attention_heads.tsv").write_text("".join(rows))
    return folder
