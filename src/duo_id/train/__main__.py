"""`python -m duo_id.train`: find a model's retrieval heads by any method, and evaluate their masks.

The work is imported once the settings have been checked: `--help` and mistakes are answered at once.
"""

from duo_id.common import stopping

if __name__ == "__main__":
    stopping.die_quietly()

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from duo_id.common import cli
from duo_id.common.record import SETTINGS
from duo_id.train.fitting import train_settings


def main(config: DictConfig) -> float | None:
    """Run the command; returns what a sweep minimises: the masks' mean answer loss on validation samples."""
    config, folder, _ = cli.start_run(config)
    in_sweep = HydraConfig.get().mode == RunMode.MULTIRUN
    try:
        settings = train_settings(config)
        from duo_id.train.run import train

        cli.quiet_libraries()
        summary = train(settings, folder, in_sweep)
    except (KeyboardInterrupt, OSError):
        if (folder / SETTINGS).is_file():
            cli.say(f"stopped; to resume: {cli.resume_command('train', folder)}")
        raise
    cli.say(f"heads: {folder / 'heads'}   figures: {folder / 'figures'}")
    return summary.get("validation_loss")


if __name__ == "__main__":
    cli.run("train", main)
