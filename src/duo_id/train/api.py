"""`duo_id.identify`: find the heads of a model that is in memory, from Python."""

import tempfile
import time
from collections.abc import Mapping
from dataclasses import fields, replace
from difflib import get_close_matches
from numbers import Integral
from pathlib import Path
from typing import Any

import lightning
import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from duo_id.attention.interface import attached
from duo_id.common.cli import versions
from duo_id.common.composing import check_choice, compose, override
from duo_id.common.config import conf_dir, plain
from duo_id.common.errors import check
from duo_id.common.isolation import isolated
from duo_id.data.haystack import text_versions, with_digest
from duo_id.data.in_memory import SampleList, read_data, text_task
from duo_id.data.samples import Task
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
    "data.num_workers": 4,
    "trainer.max_steps": 400,
    "trainer.log_every_n_steps": 20,
}
GATES = {"method.lr": 0.02}  # on a GPU, of methods that train
RESERVED = (  # what a run of the command decides and one from Python has: the model, its device, a folder
    "model comparison logger repeats resume checkpoint_seconds trainer.devices trainer.num_nodes trainer.strategy "
    "trainer.accelerator trainer._target_ trainer.callbacks step.sequence_parallel step.shard"
).split()
SMALL = 2e8  # parameters of a model whose logits and graphs are small beside a GPU's memory


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
            an adapter of PEFT.
        tokenizer: of the model.
        data: the name of a task of conf/data; texts; a `datasets.Dataset` of texts or with `input_ids` and `labels`;
            or batches with these, such as a `DataLoader`.
        method: a name of conf/method.
        sink_size: first tokens that a streaming head sees.
        recent_size: most recent tokens that a streaming head sees, its own among them.
        lengths: of samples that are made here, in tokens: the longest, or the shortest and the longest. Beyond about
            15000 they need a longer text: `**{"data.haystack.source": "packages"}`.
        steps: of training.
        seed: of samples and whatever else is drawn; the state of random generators elsewhere is left alone.
        progress: show a bar, or where there is no terminal a line each tenth.
        on_interrupt: of training and searches, `raise` a KeyboardInterrupt, or `return` the pattern so far, with
            `interrupted` in its provenance.
        text_key: the column of a data set with texts. Of texts, tokens count by how much they depend on what streaming
            heads do not see (`tokens="far"`); labels of your own samples count alike.
        overrides: settings of the method by name, such as `objective="kl"`, and others as on the command line, such as
            `**{"data.batch_size": 2}`.

    Returns:
        the pattern, with the model, all settings and the versions in its provenance.

    Raises:
        UserError: something cannot work; the message names the argument or the override.
    """
    check(on_interrupt in ("raise", "return"), f"on_interrupt={on_interrupt!r}: choose raise or return")
    check(not torch.is_inference_mode_enabled(), "identify needs gradients: call it outside torch.inference_mode")
    language_model = language_model_of(model, tokenizer)
    given = _arguments(sink_size, recent_size, lengths, steps, seed, progress)
    with tempfile.TemporaryDirectory() as folder, isolated(), torch.enable_grad(), frozen(language_model.model):
        lightning.seed_everything(int(given["seed"]), workers=True, verbose=False)
        vocabulary = int(language_model.model.config.get_text_config().vocab_size)
        rows = None if isinstance(data, str) else read_data(data, text_key, vocabulary)
        settings = _settings(language_model, data, rows, method, given, overrides)
        tasks: dict[str, Task] = {}
        if isinstance(rows, SampleList):
            tasks["train"] = rows
        elif rows is not None:
            tasks["train"] = text_task(rows, settings.data, tokenizer, language_model.max_length)
        else:
            settings = replace(settings, data=with_digest(settings.data))
        began = time.perf_counter()
        with attached(language_model.model, settings.step.backends) as layers:
            gated_model = GatedModel(language_model, layers, settings.method.window, settings.step.backends)
            console = Console(quiet=not progress)
            for line in introduction(gated_model, settings):
                console.print(line, soft_wrap=True, highlight=False, markup=False)
            run = TrainRun(
                settings=settings,
                seed=settings.seed,
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
            "versions": versions() | text_versions(settings.data.haystack),
            "seed": settings.seed,
            "seconds": time.perf_counter() - began,
        }
        of_method = {key: value for key, value in pattern.provenance.items() if key != "seconds_before"}
        return replace(pattern, provenance=provenance | of_method)


def _arguments(
    sink_size: int | None, recent_size: int | None, lengths: Any, steps: int | None, seed: Any, progress: bool
) -> dict[str, Any]:
    """What was given by name, as overrides."""
    given: dict[str, Any] = {
        "method.sink_size": sink_size,
        "method.recent_size": recent_size,
        "trainer.max_steps": steps,
    }
    for name, value in (given | {"seed": seed}).items():
        is_whole = value is None or (isinstance(value, Integral) and not isinstance(value, bool))
        check(is_whole, f"{name.rpartition('.')[2]}={value!r:.80} must be a whole number")
    check(seed is not None and 0 <= seed < 2**32, f"seed={seed} must be a whole number from 0 to {2**32 - 1}")
    if lengths is not None:
        pair = (None, lengths) if isinstance(lengths, Integral) else lengths
        is_pair = isinstance(pair, tuple | list) and len(pair) == 2 and isinstance(pair[1], Integral)
        check(is_pair, f"lengths={lengths!r:.80} must be a number of tokens, or a pair (shortest, longest)")
        given |= {"data.length_min": pair[0], "data.length_max": pair[1]}
    chosen = {key: value for key, value in given.items() if value is not None}
    return chosen | {"seed": seed, "trainer.enable_progress_bar": progress}


def _settings(
    model: LanguageModel,
    data: Any,
    rows: list[str] | SampleList | None,
    method: str,
    given: Mapping[str, Any],
    overrides: Mapping[str, Any],
) -> TrainSettings:
    """Typed settings of the run: the defaults of this device under what was given."""
    task = data if isinstance(data, str) else "text"
    check_choice("data", task, "data")
    check_choice("method", method, "method")
    config = compose("train", [f"data={task}", f"method={method}"])
    schema = METHODS.get(config.method.name)
    names = {field.name for field in fields(schema)} if schema else set()
    typed = {f"method.{key}" if key in names else key: value for key, value in overrides.items()}
    for key in typed:
        reserved = any(key == name or key.startswith(f"{name}.") for name in RESERVED)
        check(not reserved, f"{key}: identify makes one run with the model as it is, so this cannot be set")
        check(key not in given, f"{key} is given twice, by name and as {key}")
        close = get_close_matches(key, names, 1) if "." not in key and key not in config else []
        meant = f", did you mean {close[0]}?" if close else ""
        check(not close, f"{key}: there is no such argument or setting of method={method}{meant}")
    for key in ("method.prior", "method.start"):
        if key in typed:
            typed[key] = _named_method(key.rpartition(".")[2], typed[key])
    chosen = _device_defaults(model, config) | dict(given) | typed
    if isinstance(rows, SampleList):
        chosen |= {"data.length_min": rows.longest, "data.length_max": rows.longest}
    elif "data.length_max" in chosen and "data.length_min" not in {**given, **typed}:
        window = chosen.get("method.sink_size", config.method.sink_size)
        window += chosen.get("method.recent_size", config.method.recent_size)
        chosen["data.length_min"] = min(max(chosen["data.length_max"] // 8, window + 1), chosen["data.length_max"])
    chosen["model"] = {"id": model.id, "name": model.name, "revision": model.revision}
    chosen |= {"comparison.validation_samples": 0, "logger": {}}
    if isinstance(rows, list) and "tokens" in names:
        chosen.setdefault("method.tokens", "far")
    override(config, chosen)
    settings = train_settings(config)
    limit = model.max_length
    check(
        not isinstance(rows, SampleList) or limit is None or rows.longest <= limit,
        f"data: a sample has {settings.data.length_max} tokens, and the model takes {limit}",
    )
    return settings


def _named_method(key: str, named: Any) -> Any:
    """Another method's settings, those of conf/method/NAME.yaml under what is given; or the folder of a pattern."""
    if isinstance(named, Path):
        return str(named)
    is_method = isinstance(named, Mapping) or named in [path.stem for path in (conf_dir() / "method").glob("*.yaml")]
    check(
        is_method or named is None or isinstance(named, str),
        f"{key}: a {type(named).__name__} is neither a method's name, settings with a name, nor a pattern's folder",
    )
    if named is None or not is_method:
        return named
    values = dict(named) if isinstance(named, Mapping) else {"name": named}
    check_choice(f"{key}.name", values.get("name"), "method")
    method = compose("train", [f"method={values['name']}"]).method
    return {**OmegaConf.to_container(method, resolve=True), **values}  # type: ignore[dict-item]


def _device_defaults(model: LanguageModel, config: DictConfig) -> dict[str, Any]:
    """What differs from conf/train.yaml on the model's device."""
    device = model.model.device
    limit = model.max_length
    if device.type != "cuda":
        shorter = {"data.length_max": limit} if limit and limit < config.data.length_max else {}
        return {"trainer.accelerator": device.type} | shorter
    chosen: dict[str, Any] = GPU | {"trainer.accelerator": "cuda", "trainer.devices": [device.index or 0]}
    if "lr" in config.method:
        chosen |= GATES
    if model.model.num_parameters() <= SMALL:
        chosen["step.cuda_graphs"] = True  # launches are the bottleneck
    return chosen | {"data.length_max": min(limit or LONGEST, LONGEST)}
