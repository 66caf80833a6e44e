"""Write passkey samples to disk: `python data_gen/passkey.py out=DIR n=1000 [model=... data.length_max=...]`."""

import hydra
from omegaconf import DictConfig

from duo_id.config import DataGenSettings, conf_dir, parse
from duo_id.data.disk import write_dataset
from duo_id.data.tasks import make_task
from duo_id.errors import UserError


def generate(config: DictConfig) -> None:
    """Write the dataset that the config describes.

    Raises:
        UserError: the settings do not fit together, or `out` exists.
    """
    from duo_id.models import load_tokenizer

    settings = parse(DataGenSettings, config)
    tokenizer = load_tokenizer(settings.model)
    counts = {"train": settings.n, "validation": settings.n_validation, "test": settings.n_test}
    tasks = {split: make_task(settings.data, tokenizer, split) for split, count in counts.items() if count > 0}
    print(write_dataset(settings, tokenizer, tasks))


@hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="data_gen")
def main(config: DictConfig) -> None:
    """Generate, and show what the user can mend as one line."""
    try:
        generate(config)
    except UserError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
