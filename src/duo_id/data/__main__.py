"""`python -m duo_id.data out=DIR n=1000 [data=key_value model=... data.length_max=...]`: write samples to disk.

The work is imported once the settings have been checked: `--help` and mistakes are answered at once.
"""

from duo_id.common import stopping

if __name__ == "__main__":
    stopping.die_quietly()

from dataclasses import replace

from omegaconf import DictConfig

from duo_id.common import cli
from duo_id.common.config import parse
from duo_id.data.settings import DataGenSettings


def generate(config: DictConfig) -> None:
    """Write the data set that the config describes.

    Raises:
        UserError: the settings do not fit together, or `out` exists.
    """
    settings = parse(DataGenSettings, config)
    import torch

    from duo_id.data.disk import write_dataset
    from duo_id.data.haystack import with_digest
    from duo_id.data.registry import make_task
    from duo_id.data.writing import with_written
    from duo_id.models.loading import load_model, load_tokenizer

    cli.quiet_libraries()
    settings = replace(settings, data=with_digest(settings.data))
    tokenizer = load_tokenizer(settings.model)
    if settings.data.reads_written:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = load_model(settings.model, device, settings.seed)
        settings = replace(settings, data=with_written(settings.data, model, cli.console))
    counts = {"train": settings.n, "validation": settings.n_validation, "test": settings.n_test}
    tasks = {split: make_task(settings.data, tokenizer, split) for split, count in counts.items() if count > 0}
    cli.say(write_dataset(settings, tokenizer, tasks))


if __name__ == "__main__":
    cli.run("data_gen", generate)
