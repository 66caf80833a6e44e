"""What Hydra calls at the end of a sweep; it imports this module whenever a command starts, so what is heavy waits."""

import sys
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from rich.console import Console
from rich.markup import escape

from duo_id.common.errors import UserError
from duo_id.common.tables import print_tables


class SweepTable(Callback):
    """Shows a sweep's table at its end; a sweep with failed jobs exits with status 2, wherever they ran."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Called by Hydra, in the process that started the jobs."""
        from duo_id.report.sweeps import read_sweep, tables

        folder, console = Path(config.hydra.sweep.dir), Console()
        try:
            sweep = read_sweep(folder)
        except UserError as error:  # Hydra would turn it into a warning
            console.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True, highlight=False)
            sys.exit(2)
        print_tables(console, *tables(sweep).values())
        advice = f"table and figures: python -m duo_id.report {folder}"
        console.print(advice, soft_wrap=True, highlight=False, markup=False)
        if len(sweep.ended) < len(sweep.jobs):
            sys.exit(2)
