"""`python -m duo_id.evaluate heads=DIR_OR_NAME`: head patterns on held-out long-context tasks.

The work is imported once the settings have been checked: `--help` and mistakes are answered at once.
"""

from duo_id.common import stopping

if __name__ == "__main__":
    stopping.die_quietly()

from omegaconf import DictConfig, open_dict

from duo_id.common import cli
from duo_id.common.config import parse
from duo_id.evaluate.settings import EvaluateSettings
from duo_id.patterns.sources import local_file


def main(config: DictConfig) -> None:
    """Run the command."""
    config, folder, overrides = cli.start_run(config)
    settings = parse(EvaluateSettings, config)
    local_file(settings.heads)  # refuses what is no pattern
    from duo_id.evaluate.journal import JOURNAL, RESULTS
    from duo_id.evaluate.run import evaluate, with_model_of_pattern

    cli.quiet_libraries()
    if not config.resume:  # a resumed run has saved its model
        with open_dict(config):
            config = with_model_of_pattern(config, overrides)
    try:
        evaluate(parse(EvaluateSettings, config), folder)
    except (KeyboardInterrupt, OSError):
        if (folder / JOURNAL).is_file():
            cli.say(f"stopped; to resume: {cli.resume_command('evaluate', folder)}")
        raise
    cli.say(f"results: {folder / RESULTS}   figures: {folder / 'figures'}")


if __name__ == "__main__":
    cli.run("evaluate", main)
