"""`duo_id.identify`: find the heads of a model that is in memory, from Python."""

import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning
import torch
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from duo_id.attention.interface import attached
from duo_id.common.argument_names import argument_names, naming_arguments
from duo_id.common.cli import versions
from duo_id.common.config import plain
from duo_id.common.errors import check
from duo_id.common.isolation import isolated
from duo_id.data.haystack import text_versions, with_digest
from duo_id.data.in_memory import SampleList, read_data, text_task
from duo_id.data.samples import Task
from duo_id.data.writing import with_written
from duo_id.models.gated_model import GatedModel
from duo_id.models.in_memory import frozen, language_model_of
from duo_id.patterns.pattern import HeadPattern
from duo_id.train.arguments import arguments_by_override, named_patterns, settings_of
from duo_id.train.fit_gates import TrainRun
from duo_id.train.identify import identify as find_heads
from duo_id.train.progress import introduction


@naming_arguments()
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
    `python -m duo_id.train` on a CPU, and those of `experiment=best` on a GPU.

    Args:
        model: any causal language model of transformers, on the device to compute on; also inside `torch.compile` or
            an adapter of PEFT.
        tokenizer: of the model.
        data: the name of a task of conf/data; texts; a `datasets.Dataset` of texts or with `input_ids` and `labels`;
            or batches with these, such as a `DataLoader`.
        method: a name of conf/method.
        sink_size: first tokens that a streaming head sees.
        recent_size: most recent tokens that a streaming head sees, its own among them.
        lengths: of samples that are made here, in tokens: the longest, or the shortest and the longest. Beyond
            12,000 tokens, on a CPU, they need a longer text: `**{"data.haystack.source": "packages"}`.
        steps: of training.
        seed: of samples and whatever else is drawn; the state of random generators elsewhere is left alone.
        progress: show a bar, or where there is no terminal a line each tenth.
        on_interrupt: of training and searches, `raise` a KeyboardInterrupt, or `return` the pattern so far, with
            `interrupted` in its provenance.
        text_key: the column of a data set with texts. Of texts, tokens count by how much they depend on what streaming
            heads do not see (`tokens="far"`); labels of your own samples count alike.
        overrides: settings of the method by name, such as `objective="kl"` or another pattern as `prior` (or `start`,
            of a search), and others as on the command line, such as `**{"data.batch_size": 2}`.

    Returns:
        the pattern, with the model, its active adapters, all settings and the versions in its provenance.

    Raises:
        UserError: something cannot work; the message names the argument or the override.
    """
    check(on_interrupt in ("raise", "return"), f"on_interrupt={on_interrupt!r}: choose raise or return")
    check(not torch.is_inference_mode_enabled(), "identify needs gradients: call it outside torch.inference_mode")
    language_model = language_model_of(model, tokenizer)
    overrides, patterns = named_patterns(overrides)
    given = arguments_by_override(sink_size, recent_size, lengths, steps, seed, progress)
    with tempfile.TemporaryDirectory() as folder, isolated(), torch.enable_grad(), frozen(language_model.model):
        lightning.seed_everything(int(given["seed"]), workers=True, verbose=False)
        vocabulary = int(language_model.model.config.get_text_config().vocab_size)
        rows = None if isinstance(data, str) else read_data(data, text_key, vocabulary)
        settings = settings_of(language_model, data, rows, method, given, overrides)
        tasks: dict[str, Task] = {}
        if isinstance(rows, SampleList):
            tasks["train"] = rows
        elif rows is not None:
            tasks["train"] = text_task(rows, settings.data, tokenizer, language_model.max_length)
        else:
            settings = replace(settings, data=with_digest(settings.data))
        console = Console(quiet=not progress)
        data_settings = with_written(settings.data, language_model, console)
        settings = replace(settings, data=replace(settings.data, self_sha256=data_settings.self_sha256))
        began = time.perf_counter()
        with attached(language_model.model, settings.step.backends) as layers:
            gated_model = GatedModel(language_model, layers, settings.method.window, settings.step.backends)
            for line in introduction(gated_model, settings):
                console.print(argument_names(line), soft_wrap=True, highlight=False, markup=False)
            run = TrainRun(
                settings=replace(settings, data=data_settings),
                seed=settings.seed,
                folder=Path(folder),
                step=settings.step,
                console=console,
                tasks=tasks,
                patterns=patterns,
                partial=on_interrupt == "return",
            )
            pattern = find_heads(gated_model, settings.method, run)
        provenance = {
            "model": language_model.describe(layers),
            "settings": plain(settings),
            "versions": versions() | text_versions(settings.data.haystack),
            "seed": settings.seed,
            "seconds": time.perf_counter() - began,
        }
        of_method = {key: value for key, value in pattern.provenance.items() if key != "seconds_before"}
        return replace(pattern, provenance=provenance | of_method)
