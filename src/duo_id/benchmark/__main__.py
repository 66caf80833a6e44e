"""`python -m duo_id.benchmark task=decode|prefill|memory|train_step`: masks and training steps on this machine."""

from duo_id.common import stopping

if __name__ == "__main__":
    stopping.die_quietly()

from omegaconf import DictConfig

from duo_id.benchmark.run import benchmark
from duo_id.benchmark.settings import BenchmarkSettings
from duo_id.common import cli
from duo_id.common.config import parse


def main(config: DictConfig) -> None:
    """Run the command."""
    config, folder, overrides = cli.start_run(config)
    benchmark(parse(BenchmarkSettings, config), folder, overrides)


if __name__ == "__main__":
    cli.run("benchmark", main)
