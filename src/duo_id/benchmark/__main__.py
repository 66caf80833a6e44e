"""`python -m duo_id.benchmark task=decode|prefill|memory|train_step`: masks and training steps on this machine.

The work is imported once the settings have been checked: `--help` and mistakes are answered at once.
"""

from duo_id.common import stopping

if __name__ == "__main__":
    stopping.die_quietly()

from omegaconf import DictConfig

from duo_id.benchmark.settings import BenchmarkSettings
from duo_id.common import cli
from duo_id.common.config import parse


def main(config: DictConfig) -> None:
    """Run the command."""
    config, folder, overrides = cli.start_run(config)
    settings = parse(BenchmarkSettings, config)
    from duo_id.benchmark.run import benchmark

    cli.quiet_libraries()
    benchmark(settings, folder, overrides)


if __name__ == "__main__":
    cli.run("benchmark", main)
