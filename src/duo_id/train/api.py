"""`duo_id.identify`: find the heads of a model that is in memory, from Python."""

import logging
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.utilities.seed import isolate_rng
from omegaconf import DictConfig
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from duo_id.attention.interface import attached
from duo_id.common.cli import versions
from duo_id.common.composing import check_choice, composed, override
from duo_id.common.config import plain
from duo_id.common.errors import check
from duo_id.data.in_memory import task_of
from duo_id.methods.settings import METHODS
from duo_id.models.gated_model import GatedModel
from duo_id.models.in_memory import frozen, language_model_of
from duo_id.models.language_model import LanguageModel
from duo_id.patterns.pattern import HeadPattern
from duo_id.train.fit_gates import TrainRun
from duo_id.train.identify import identify as find_heads
from duo_id.train.progress import introduction
from duo_id.train.settings import TrainSettings, train_settings

LONGEST = 8192  # tokens of a sample on a GPU, where the model takes more and `lengths` says nothing
GPU: dict[str, Any] = {  # what experiment=best has on a GPU, beside lengths
    "data.num_lengths": 50,
    "data.num_passkeys": 10,
    "data.passkey_words": 16,
    "method.sink_size": 64,
    "method.recent_size": 256,
    "trainer.max_steps": 400,
    "trainer.log_every_n_steps": 20,
}
GATES = {"method.lr": 0.02}  # on a GPU, of methods that train


def identify(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    data: Any = "mixture",
    method: str = "nested",
    *,
    sink_size: int | None = None,
    recent_size: int | None = None,
    lengths: int | tuple[int, int] | None = None,
    steps: int | None = None,
    seed: int = 0,
    progress: bool = True,
    on_interrupt: str = "raise",
    text_key: str = "text",
    **overrides: Any,
) -> HeadPattern:
    """Find out which heads of a model must see the whole context.

    The model is frozen while this runs, and left as it was. What is not given has the defaults of
    `python -m duo_id.train` on a CPU, and those of `experiment=best` on a GPU, up to 8192 tokens.

    Args:
        model: any causal language model of transformers, on the device to compute on; also inside `torch.compile` or
            an adapter of PEFT, and quantised.
        tokenizer: of the model.
        data: the name of a task of conf/data; texts; a `datasets.Dataset` of texts or with `input_ids` and `labels`;
            or batches with these, such as a `DataLoader`.
        method: a name of conf/method.
        sink_size: first tokens that a streaming head sees.
        recent_size: most recent tokens that a streaming head sees, its own among them.
        lengths: of samples that are made here, in tokens: the longest, or the shortest and the longest.
        steps: of training.
        seed: of samples and whatever else is drawn; the state of random generators elsewhere is left alone.
        progress: show a bar, or where there is no terminal a line each tenth.
        on_interrupt: of training and searches, `raise` a KeyboardInterrupt, or `return` the pattern so far, with
            `interrupted` in its provenance.
        text_key: the column of a data set with texts.
        overrides: settings of the method by name, such as `objective="kl"`, and others as on the command line, such as
            `**{"data.batch_size": 2}`.

    Returns:
        the pattern, with the model, all settings and the versions in its provenance.

    Raises:
        UserError: something cannot work; the message names the argument or the override.
    """
    check(on_interrupt in ("raise", "return"), f"on_interrupt={on_interrupt!r}: choose raise or return")
    language_model = language_model_of(model, tokenizer)
    given = _arguments(sink_size, recent_size, lengths, steps, seed, progress)
    settings = _settings(language_model, data, method, given, overrides)
    tasks = {}
    if not isinstance(data, str):
        tasks["train"] = task_of(data, settings.data, tokenizer, language_model.max_length, text_key)
    with tempfile.TemporaryDirectory() as folder, isolate_rng(), _quiet(), frozen(language_model.model):
        lightning.seed_everything(seed, workers=True, verbose=False)
        began = time.perf_counter()
        with attached(language_model.model, settings.step.backends) as layers:
            gated_model = GatedModel(language_model, layers, settings.method.window, settings.step.backends)
            console = Console(quiet=not progress)
            for line in introduction(gated_model, settings):
                console.print(line, soft_wrap=True, highlight=False, markup=False)
            run = TrainRun(
                settings=settings,
                seed=seed,
                folder=Path(folder),
                step=settings.step,
                console=console,
                tasks=tasks,
                partial=on_interrupt == "return",
            )
            pattern = find_heads(gated_model, settings.method, run)
        provenance = {
            "model": language_model.describe(layers),
            "settings": plain(settings),
            "versions": versions(),
            "seed": seed,
            "seconds": time.perf_counter() - began,
        }
        own = {key: value for key, value in pattern.provenance.items() if key != "seconds_before"}
        return replace(pattern, provenance=provenance | own)


def _arguments(
    sink_size: int | None,
    recent_size: int | None,
    lengths: int | tuple[int, int] | None,
    steps: int | None,
    seed: int,
    progress: bool,
) -> dict[str, Any]:
    """What was given by name, as overrides."""
    given = {"method.sink_size": sink_size, "method.recent_size": recent_size, "trainer.max_steps": steps, "seed": seed}
    if lengths is not None:
        shortest, longest = lengths if isinstance(lengths, tuple | list) else (None, lengths)
        given |= {"data.length_min": shortest, "data.length_max": longest}
    return {"trainer.enable_progress_bar": progress} | {key: value for key, value in given.items() if value is not None}


def _settings(
    model: LanguageModel, data: Any, method: str, given: Mapping[str, Any], overrides: Mapping[str, Any]
) -> TrainSettings:
    """Typed settings of the run: the defaults of this device under what was given."""
    task = data if isinstance(data, str) else "text"
    check_choice("data", task, "data")
    check_choice("method", method, "method")
    config = composed("train", [f"data={task}", f"method={method}"])
    schema = METHODS.get(config.method.name)
    names = {field.name for field in fields(schema)} if schema else set()
    typed = {f"method.{key}" if key in names else key: value for key, value in overrides.items()}
    chosen = _device_defaults(model, config) | dict(given) | typed
    if "data.length_max" in chosen and "data.length_min" not in {**given, **typed}:
        window = chosen.get("method.sink_size", config.method.sink_size)
        window += chosen.get("method.recent_size", config.method.recent_size)
        chosen["data.length_min"] = min(max(chosen["data.length_max"] // 8, window + 1), chosen["data.length_max"])
    chosen["model"] = {"id": model.id, "name": model.name, "revision": model.revision}
    chosen |= {"comparison.validation_samples": 0, "logger": {}}
    if task == "text" and not isinstance(data, str) and "tokens" in names:
        chosen.setdefault("method.tokens", "far")
    for key in overrides:
        close = get_close_matches(key, names, 1) if "." not in key and key not in names and key not in config else []
        check(
            not close, f"{key}: there is no such argument or setting of method={method}, did you mean {''.join(close)}?"
        )
    override(config, chosen)
    return train_settings(config)


def _device_defaults(model: LanguageModel, config: DictConfig) -> dict[str, Any]:
    """What differs from conf/train.yaml on the model's device."""
    device = model.model.device
    limit = model.max_length
    if device.type != "cuda":
        longest = min(config.data.length_max, limit or config.data.length_max)
        return {"trainer.accelerator": device.type, "data.length_max": longest}
    chosen: dict[str, Any] = GPU | {"trainer.accelerator": "cuda", "trainer.devices": [device.index or 0]}
    if "lr" in config.method:
        chosen |= GATES
    return chosen | {"data.length_max": min(limit or LONGEST, LONGEST)}


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Lightning from talking of itself."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric", "lightning")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
