"""`python -m duo_id.evaluate heads=DIR`: the comparison that ends a training run, for any exported pattern."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict

from duo_id import app
from duo_id.attention.gated import Backends, attached
from duo_id.config import EvaluateSettings, parse, plain, require
from duo_id.data.module import SampleModule
from duo_id.evaluation.comparison import check_window, compare, results_table
from duo_id.files import write_text
from duo_id.formats import list_patterns, load_pattern
from duo_id.models import load_model


def evaluate(settings: EvaluateSettings, folder: Path) -> dict[str, Any]:
    """Compare a pattern's masks with the full model, random masks and all heads streaming.

    Args:
        settings: which pattern, model and samples.
        folder: the run folder; `results.json` is written to it.

    Returns:
        the results that are also written.

    Raises:
        UserError: something in the settings cannot work; the message names the override.
    """
    pattern = load_pattern(settings.heads)
    model = load_model(settings.model, "cuda" if torch.cuda.is_available() else "cpu", settings.seed)
    backends = Backends(settings.step.full_backend, settings.step.streaming_backend)
    data = SampleModule(settings.data, model.tokenizer, settings.seed, model.max_length)
    samples = data.samples("test", settings.evaluation.samples)
    with attached(model.model, backends) as layers:
        pattern.check_fits(model.num_layers, layers[0].kv_heads, model.name)
        description = model.describe(layers)
    check_window(samples, pattern.sink_size, pattern.recent_size)
    results = compare(
        model,
        pattern,
        samples,
        settings.sparsity,
        settings.evaluation.random_masks,
        settings.seed,
        backends,
        settings.deploy,
    )
    app.console.print(results_table(results, f"{model.name} under {settings.heads}: {len(samples)} held-out samples"))
    report = {
        "heads": settings.heads,
        "model": description,
        "results": [result.summary() | {"samples": [vars(score) for score in result.samples]} for result in results],
        "settings": plain(settings),
        "versions": app.versions(),
    }
    write_text(folder / "results.json", json.dumps(report, indent=1))
    app.console.print(f"results: {folder / 'results.json'}", soft_wrap=True)
    return report


def as_found(config: DictConfig, given: Sequence[str]) -> DictConfig:
    """The config with the model and samples that the pattern was found on, unless overrides say otherwise.

    Args:
        config: the composed config.
        given: the command line's overrides.
    """
    require(isinstance(config.heads, str), f"heads={config.heads}: give a run folder or one of {list_patterns()}")
    found = load_pattern(config.heads).provenance.get("settings", {})
    keys = [override.split("=")[0].lstrip("+").replace("/", ".") for override in given]
    for group in ("model", "data", "evaluation", "sparsity", "seed"):
        if group not in found or group in keys:
            continue
        settings = OmegaConf.create({group: found[group]})
        for key in keys:
            if key.startswith(f"{group}."):
                OmegaConf.update(settings, key, OmegaConf.select(config, key), merge=False)
        config[group] = settings[group]
    return config


def main(config: DictConfig) -> None:
    """Run the command."""
    config, folder, _ = app.start_run(config)
    with open_dict(config):
        config = as_found(config, HydraConfig.get().overrides.task)
    evaluate(parse(EvaluateSettings, config), folder)


if __name__ == "__main__":
    app.run("evaluate", main)
