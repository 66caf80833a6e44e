"""`python -m duo_id.train`: identify a model's retrieval heads by training gates, and show how good they are."""

import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning
from hydra.utils import instantiate
from lightning.pytorch.callbacks import LambdaCallback
from omegaconf import DictConfig

from duo_id import app
from duo_id.attention.gated import Backends, attached
from duo_id.checkpoints import CHECKPOINT, AtomicCheckpointIO, LastCheckpoint
from duo_id.config import TrainSettings, parse, plain, require
from duo_id.data.module import SampleModule
from duo_id.evaluation.comparison import check_window, compare, results_table
from duo_id.files import write_text
from duo_id.formats import save_pattern
from duo_id.models import load_model
from duo_id.plots import plot_gates, plot_training, read_metrics, save_figure
from duo_id.progress import TrainingBar
from duo_id.recompute import recomputed
from duo_id.training import GateTraining

UNTOLD = ("logger", "resume", "checkpoint_seconds")  # settings that say nothing about what was found, only about a disk


def train(settings: TrainSettings, folder: Path, accepted: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Train the gates, export them as a head pattern and compare its masks.

    Args:
        settings: what to identify, on which samples, how.
        folder: the run folder; `heads/`, `figures/` and `summary.json` are written to it.
        accepted: called once the settings, and those of a resumed run, have proved to work.

    Returns:
        the summary that is also written.

    Raises:
        UserError: something in the settings cannot work; the message names the override.
        KeyboardInterrupt: after Ctrl-C, once a checkpoint is written.
    """
    began = time.perf_counter()
    lightning.seed_everything(settings.seed, workers=True, verbose=False)
    trainer = _trainer(settings, folder, accepted)
    model = load_model(settings.model, trainer.strategy.root_device, settings.seed)
    backends = Backends(settings.step.full_backend, settings.step.streaming_backend)
    data = SampleModule(
        settings.data, model.tokenizer, settings.seed, model.max_length, settings.comparison.validation_samples
    )
    data.task("train")  # what cannot work is refused before the first step
    test = data.samples("test", settings.comparison.samples)
    check_window(test, settings.method.sink_size, settings.method.recent_size)
    with attached(model.model, backends) as layers:
        gates = GateTraining(
            model, layers, settings.method, settings.step, settings.trainer["max_steps"], settings.sparsity
        )
        loaded = time.perf_counter()
        with recomputed(model.model, layers) if settings.step.recompute else nullcontext():
            checkpoint = str(Path(settings.resume) / CHECKPOINT) if settings.resume else None
            trainer.fit(gates, datamodule=data, ckpt_path=checkpoint, weights_only=True)
        if gates.interrupted:
            raise KeyboardInterrupt
        trained = time.perf_counter()
        found = {
            "model": model.describe(layers),
            "settings": {key: value for key, value in plain(settings).items() if key not in UNTOLD},
            "steps": trainer.global_step,
            "seed": settings.seed,
            "versions": app.versions(),
        }
    pattern = gates.pattern(**found)
    save_pattern(pattern, folder / "heads", settings.sparsity)
    save_figure(plot_gates(pattern, title=f"Gates of {model.name}"), folder / "figures" / "gates.png")
    if "csv" in settings.logger:
        curve = plot_training(read_metrics(folder), title=f"Training gates of {model.name}")
        save_figure(curve, folder / "figures" / "training.png")
    random_masks = settings.comparison.random_masks
    results = compare(model, pattern, test, settings.sparsity, random_masks, settings.seed, backends)
    done = time.perf_counter()
    app.console.print(results_table(results, f"{model.name}: {len(test)} held-out samples"))
    summary = found | {
        "mean_gate": float(pattern.scores[list(pattern.gated_layers)].mean()),
        "seconds": {"load": loaded - began, "train": trained - loaded, "compare": done - trained},
        "results": [result.summary() for result in results],
    }
    write_text(folder / "summary.json", json.dumps(summary, indent=1))
    return summary


def _trainer(settings: TrainSettings, folder: Path, accepted: Callable[[], None]) -> lightning.Trainer:
    """Lightning's trainer with conf/trainer's arguments, our checkpoints and the chosen logger."""
    arguments = {"limit_train_batches": settings.trainer["max_steps"]} | settings.trainer  # the stream has no end
    trainer = instantiate(
        arguments,
        logger=[instantiate(logger) for logger in settings.logger.values()],
        callbacks=[
            LastCheckpoint(folder, settings.checkpoint_seconds),
            TrainingBar(),
            LambdaCallback(on_train_start=lambda *_: accepted()),
        ],
        plugins=[AtomicCheckpointIO()],
        default_root_dir=str(folder),
    )
    require(trainer.world_size == 1, f"trainer.devices={settings.trainer.get('devices')}: only 1 works at present")
    return trainer


def main(config: DictConfig) -> float:
    """Run the command; returns what a sweep minimises, the found masks' mean answer loss on held-out samples."""
    config, folder, overrides = app.start_run(config)
    try:
        summary = train(parse(TrainSettings, config), folder, lambda: app.keep_overrides(folder, overrides))
    except (KeyboardInterrupt, OSError):
        if (folder / CHECKPOINT).is_file():
            app.console.print(f"stopped; to go on: python -m duo_id.train resume={folder}", soft_wrap=True)
        raise
    app.console.print(f"heads: {folder / 'heads'}   figures: {folder / 'figures'}", soft_wrap=True)
    losses = [result["answer_loss"] for result in summary["results"] if result["heads"] == "found"]
    return sum(losses) / len(losses)


if __name__ == "__main__":
    app.run("train", main)
