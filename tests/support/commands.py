"""Runs the commands as a user would, but inside the test's process, which saves repeated imports."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from omegaconf import DictConfig

from duo_id.benchmark import __main__ as benchmark
from duo_id.common import cli
from duo_id.common.config import parse
from duo_id.evaluate import __main__ as evaluate
from duo_id.train import __main__ as train
from duo_id.train.fitting import train_settings
from duo_id.train.settings import TrainSettings
from tests.support.compositions import remembered_compositions
from tests.support.figures import blank_figures

COMMANDS = {"train": train.main, "evaluate": evaluate.main, "benchmark": benchmark.main}

# A run of two steps on tiny random weights. Tokens are bytes, so contexts are long.
QUICK = [
    "model=tiny",
    "data=passkey",
    "data.length_min=700",
    "data.length_max=800",
    "data.num_lengths=2",
    "data.num_passkeys=2",
    "data.passkey_words=2",
    "data.num_workers=0",
    "method.sink_size=4",
    "method.recent_size=60",
    "trainer.accelerator=cpu",
    "trainer.max_steps=2",
    "trainer.val_check_interval=1",
    "trainer.log_every_n_steps=1",
    "comparison.samples=2",
    "comparison.validation_samples=1",
    "comparison.random_masks=3",
    "sparsity=[0.25,0.5]",
]


@dataclass(frozen=True)
class Finished:
    """A command's output and exit status."""

    status: int
    output: str

    @property
    def error(self) -> str:
        """The error line, after checking that there is only one and no other sign of an error."""
        lines = [line for line in self.output.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, self.output
        assert "Traceback" not in self.output
        assert "Error executing job" not in self.output
        assert self.status == 2
        return lines[0]


def run_command(
    name: str,
    *overrides: str,
    folder: Path,
    command: Callable[[DictConfig], object] | None = None,
    figures: bool = False,
) -> Finished:
    """Run a command in the working directory `folder`, with `run` there as its run folder unless overridden.

    Args:
        name: train, evaluate or benchmark, or another top-level config with `command`.
        overrides: the command line.
        folder: the working directory.
        command: called with the config instead of the command's own function.
        figures: whether its figures are drawn, or left blank.
    """
    if not any(override.startswith(("resume=", "hydra.run.dir=")) for override in overrides):
        overrides = (*overrides, f"hydra.run.dir={folder / 'run'}")
    output, random_state = StringIO(), torch.get_rng_state()
    with (
        chdir(folder),
        redirect_stdout(output),
        redirect_stderr(output),
        patch.object(sys, "argv", [name, *overrides]),
        patch.dict(os.environ),
        patch.object(os, "fsync"),  # no machine goes down while tests run
        shortcuts(figures),
    ):
        try:
            cli.run(name, command or COMMANDS[name])
            status = 0
        except SystemExit as exiting:
            status = exiting.code if isinstance(exiting.code, int) else 1
    torch.set_rng_state(random_state)
    return Finished(status, output.getvalue())


@contextmanager
def shortcuts(figures: bool = False) -> Iterator[None]:
    """Leave out of the commands in a block what takes long and is not what they are tested for.

    Lightning reads the metadata of all installed distributions for each trainer, to look for callbacks of others.
    """
    registry = sys.modules.get("lightning.fabric.utilities.registry")
    with (
        remembered_compositions(),
        nullcontext() if registry is None else patch.object(registry, "entry_points", return_value=[]),
        nullcontext() if figures else blank_figures(),
    ):
        yield


def settings_of(name: str, schema: type, *overrides: str, folder: Path) -> Any:
    """The typed settings that a command gets with these overrides."""
    settings: list[Any] = []
    read = train_settings if schema is TrainSettings else partial(parse, schema)
    finished = run_command(name, *overrides, folder=folder, command=lambda config: settings.append(read(config)))
    assert finished.status == 0, finished.output
    return settings[0]
