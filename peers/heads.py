"""`python peers/heads.py RUN_FOLDER`: kvpress's static heads as a head pattern, deployable like any other.

Model and windows are taken from `samples.jsonl` in the run folder. `heads-duo-on-the-fly/` is written next to it, in
DuoAttention's format, which `duo_id.load_pattern` reads.
"""

import json
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import transformers
from answers import UsageError, load_samples
from presses import head_scores
from run import DEVICE, load_model

USAGE = "python peers/heads.py RUN_FOLDER"
FOLDER = "heads-duo-on-the-fly"


def write_heads(run: Path) -> Path:
    """Score the heads of a run's model; returns the folder with the scores.

    Raises:
        UsageError: the run has no samples, or its model cannot be loaded or scored.
    """
    header, _, _ = load_samples(run)
    model, _ = load_model(header, DEVICE)
    try:
        scores = head_scores(model)
    except Exception as error:  # kvpress may raise anything for an unknown model
        reason = " ".join(str(error).split())
        raise UsageError(f"kvpress cannot score the heads of {header['model']}: {reason}") from None
    config = {"model_name": header["model"]} | {key: header[key] for key in ("sink_size", "recent_size")}
    config |= {"scores": f"duo_attention_on_the_fly of kvpress {version('kvpress')}, {header['dtype']}"}
    folder = run / FOLDER
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    rows = ["\t".join(map(str, row)) + "\n" for row in scores]
    (folder / "full_attention_heads.tsv").write_text("".join(rows))
    return folder


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit status, 2 for a usage error."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        if len(arguments) != 1:
            raise UsageError(f"give one run folder: {USAGE}")
        print(f"heads: {write_heads(Path(arguments[0]))}")
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
