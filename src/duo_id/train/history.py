"""The gates over training: recorded in the run folder every few steps, and read back."""

import re
from io import StringIO
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pandas as pd

from duo_id.common.documents import read_text
from duo_id.common.errors import UserError, one_line
from duo_id.common.files import write_text
from duo_id.common.integrity import SEAL, sealed_csv, unsealed_csv

HISTORY = "gates.csv"  # in a run folder: one row per recorded step; columns `step` and `LAYER.HEAD` of gated layers
COLUMN = re.compile(r"\d{1,6}\.\d{1,6}", re.ASCII)  # LAYER.HEAD
RESTORE_ADVICE = (
    "restore it, or remove it to start the history anew; if you changed it yourself, delete the column "
    f"{SEAL} from every row"
)
RECORDS = 50  # per run, roughly: the file is rewritten each time, so it stays small


class GateHistory(lightning.Callback):
    """Adds the scores of the gates to the run's `gates.csv` at the start, every fiftieth of the steps and at the end.

    The file is rewritten and renamed each time, so a killed run loses at most the latest row. A resumed run drops the
    rows after the step that it continues from.
    """

    def __init__(self, run: str | Path) -> None:
        """Record the history of the run in folder `run`."""
        self.path = Path(run) / HISTORY
        self.rows: dict[int, dict[str, float]] = {}

    def on_train_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Continue the history of an earlier part of the run."""
        if trainer.global_step > 0 and self.path.is_file():
            saved = _read(self.path).loc[: trainer.global_step]
            self.rows = {int(step): dict(row) for step, row in zip(saved.index, saved.to_dict("records"), strict=True)}
        self._record(trainer, pl_module)

    def on_train_batch_end(self, trainer: lightning.Trainer, pl_module: Any, *args: Any) -> None:
        """Record the gates every few steps."""
        if trainer.global_step % max(1, trainer.max_steps // RECORDS) == 0:
            self._record(trainer, pl_module)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Record the final gates."""
        self._record(trainer, pl_module)

    def _record(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        scores = pl_module.gates.scores().float().cpu()
        if not scores.isfinite().all():
            return  # training raises the error
        self.rows[trainer.global_step] = {
            f"{layer.index}.{head}": value
            for layer, row in zip(pl_module.gated_model.layers, scores.tolist(), strict=True)
            for head, value in enumerate(row)
        }
        if trainer.is_global_zero:
            table = pd.DataFrame.from_dict(self.rows, orient="index").rename_axis("step")
            write_text(self.path, sealed_csv(table.to_csv(float_format="%.5g")))


def read_history(run: str | Path) -> pd.DataFrame:
    """The gates that a run recorded while it trained.

    Args:
        run: its folder, or its `gates.csv`.

    Returns:
        one row per recorded step, ascending, and one column per KV head of the gated layers: (layer, head).

    Raises:
        UserError: the run has recorded none, or the file is damaged.
    """
    path = Path(run)
    path = path / HISTORY if path.suffix != ".csv" else path
    if not path.is_file():
        raise UserError(
            f"{path} is missing: only method=nested and method=duo train gates, and older versions did not record "
            "them; python -m duo_id.train makes a run that has them"
        )
    table = _read(path)
    table.columns = pd.MultiIndex.from_tuples(
        [tuple(map(int, str(name).split("."))) for name in table], names=["layer", "head"]
    )
    return table


def _read(path: Path) -> pd.DataFrame:
    try:
        table = pd.read_csv(StringIO(unsealed_csv(read_text(path), path, RESTORE_ADVICE)), index_col="step").astype(
            float
        )
    except UserError:
        raise
    except Exception as error:  # pandas raises errors of many kinds
        raise UserError(f"{path} is not a history of gates: {one_line(error)}") from None
    is_numeric = (
        pd.api.types.is_integer_dtype(table.index) and bool(np.isfinite(table.to_numpy()).all()) and not table.empty
    )
    if not is_numeric or not all(COLUMN.fullmatch(str(name)) for name in table):
        raise UserError(f"{path} is not a history of gates: its columns are step and LAYER.HEAD, all numbers")
    return table.sort_index()
