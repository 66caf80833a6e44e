"""`python peers/heads.py RUN_FOLDER`: kvpress's static heads as a head pattern, to be deployed like any other.

Model and windows are those of `samples.jsonl` in the run folder. `heads-duo-on-the-fly/` is written beside it, in the
format of DuoAttention that `duo_id.load_pattern` reads.
"""

import json
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import transformers
from answers import Mistake, load_samples
from presses import head_scores
from run import DEVICE, load_model

USAGE = "python peers/heads.py RUN_FOLDER"
FOLDER = "heads-duo-on-the-fly"


def write_heads(run: Path) -> Path:
    """Score the heads of the model that a run was about; the folder that holds the scores.

    Raises:
        Mistake: the run has no samples, or its model cannot be loaded or scored.
    """
    header, _, _ = load_samples(run)
    model, _ = load_model(header, DEVICE)
    try:
        scores = head_scores(model)
    except Exception as error:  # whatever kvpress may raise for a model that it does not know
        raise Mistake(f"kvpress cannot score the heads of {header['model']}: {' '.join(str(error).split())}") from None
    config = {"model_name": header["model"]} | {key: header[key] for key in ("sink_size", "recent_size")}
    config |= {"scores": f"duo_attention_on_the_fly of kvpress {version('kvpress')}, {header['dtype']}"}
    folder = run / FOLDER
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    rows = ["\t".join(map(str, row)) + "\n" for row in scores]
    (folder / "full_attention_heads.tsv").write_text("".join(rows))
    return folder


def main(arguments: Sequence[str]) -> int:
    """Run the command; the exit status: 2 for a mistake of the user."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        if len(arguments) != 1:
            raise Mistake(f"give one run folder: {USAGE}")
        print(f"heads: {write_heads(Path(arguments[0]))}")
    except Mistake as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
