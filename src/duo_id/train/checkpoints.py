"""Checkpoints, written atomically, also after Ctrl-C or another terminating signal."""

import shutil
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from duo_id.common.errors import UserError, first_line
from duo_id.common.files import atomic_path
from duo_id.common.integrity import check_zip, seal_zip
from duo_id.common.stopping import listen
from duo_id.train.restoring import check_structure

CHECKPOINT = Path("checkpoints") / "last.ckpt"  # in a run folder


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes to a temporary file, syncs and renames it, since Lightning may leave half a file; reads weights only."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write `checkpoint` to `path`, completely or not at all.

        Raises:
            UserError: it cannot be written, as on a full disk.
        """
        try:
            with atomic_path(path) as temporary:
                torch.save(checkpoint, temporary)
                seal_zip(temporary)
        except (OSError, RuntimeError) as error:  # torch's writer raises RuntimeError if the disk is full
            raise UserError(f"{path} cannot be written ({_reason(error, path)}): {_advice(path)}") from error

    def load_checkpoint(self, path: str | Path, map_location: Any = None, weights_only: bool | None = True) -> Any:
        """Read a checkpoint: tensors and plain values only.

        Raises:
            UserError: the file is not a checkpoint, or is incomplete.
        """
        try:
            check_zip(path)  # torch ignores flipped bits, even where the archive's checksums show them
            checkpoint = torch.load(path, map_location=map_location, weights_only=True)
        except Exception as error:  # files may be damaged in any way
            raise UserError(
                f"resume: {path} is not a checkpoint ({_reason(error, path)}): remove it to train from the start"
            ) from error
        check_structure(checkpoint, path)
        return checkpoint


def _reason(error: Exception, path: str | Path) -> str:
    """The reason in one line; for errors of torch's writer, the free disk space."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, RuntimeError) and "file write failed" in str(error):
        free = shutil.disk_usage(Path(path).parent).free
        return f"the file system has {free / 2**20:.0f} MiB free, or a limit on file sizes is reached"
    if Path(path).is_file() and Path(path).stat().st_size == 0:
        return "it is empty"
    return first_line(error)


def _advice(path: str | Path) -> str:
    run = Path(path).parents[1]
    next_step = f"resume={run} from the previous checkpoint" if Path(path).is_file() else "start again"
    return f"make room there, then {next_step}"


class LastCheckpoint(ModelCheckpoint):
    """Keeps one checkpoint, the latest, written every `seconds`, at the last step and after Ctrl-C.

    SIGTERM, SIGHUP and SIGUSR1 act as Ctrl-C. The first signal lets the current step finish, a second stops at once.
    """

    def __init__(self, run: str | Path, seconds: float) -> None:
        """Checkpoint the run in folder `run`."""
        self.path = Path(run) / CHECKPOINT
        super().__init__(
            dirpath=self.path.parent,
            filename=self.path.stem,
            train_time_interval=timedelta(seconds=seconds),
            save_top_k=1,
            enable_version_counter=False,
        )

    def state_dict(self) -> dict[str, Any]:
        """Nothing: there is one file at a known path."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore nothing: Lightning deletes the paths in a checkpoint, and others may have written it."""

    def on_train_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Start the timer and listen for signals."""
        super().on_train_start(trainer, pl_module)
        self._restore = listen(partial(setattr, pl_module, "interrupted"))

    def on_train_batch_end(self, trainer: lightning.Trainer, pl_module: Any, *args: Any) -> None:
        """Save periodically, at the end, and when any rank is interrupted."""
        if trainer.world_size > 1:  # a signal to any rank ends all
            number = torch.tensor(int(pl_module.interrupted), device=trainer.strategy.root_device)
            pl_module.interrupted = int(trainer.strategy.reduce(number, reduce_op="max"))
        if pl_module.interrupted or trainer.global_step >= trainer.max_steps:
            trainer.should_stop = True
            self._save_checkpoint(trainer, str(self.path))
        else:
            super().on_train_batch_end(trainer, pl_module, *args)

    def _remove_checkpoint(self, trainer: lightning.Trainer, filepath: str) -> None:
        """Remove nothing: the one file is overwritten, and Lightning would remove folders too."""

    def teardown(self, trainer: lightning.Trainer, pl_module: Any, stage: str) -> None:
        """Restore the signal handlers."""
        if hasattr(self, "_restore"):
            self._restore()
