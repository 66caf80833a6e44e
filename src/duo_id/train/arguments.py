"""The settings of a run that `duo_id.identify` is called for: its arguments over the defaults of the device."""

import hashlib
from collections.abc import Mapping
from dataclasses import fields
from difflib import get_close_matches
from numbers import Integral
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from duo_id.common.composing import check_choice, compose, override
from duo_id.common.config import conf_dir
from duo_id.common.errors import check
from duo_id.data.in_memory import SampleList
from duo_id.methods.settings import METHODS
from duo_id.models.language_model import LanguageModel
from duo_id.patterns.pattern import HeadPattern
from duo_id.train.fitting import train_settings
from duo_id.train.settings import TrainSettings

GPU: dict[str, Any] = {  # what experiment=best has on a GPU
    "data.length_min": "auto",
    "data.length_max": "auto",
    "data.haystack.source": "auto",
    "data.num_lengths": 50,
    "data.num_passkeys": 10,
    "data.passkey_words": 16,
    "method.sink_size": 64,
    "method.recent_size": "auto",
    "data.num_workers": 4,
    "trainer.max_steps": "auto",
    "trainer.log_every_n_steps": 20,
}
GATES = {"method.lr": 0.02}  # on a GPU, of methods that train
RESERVED = (  # what a run of the command decides and one from Python has: the model, its device, a folder
    "model comparison logger repeats resume checkpoint_seconds trainer.devices trainer.num_nodes trainer.strategy "
    "trainer.accelerator trainer._target_ trainer.callbacks step.sequence_parallel step.shard"
).split()


def arguments_by_override(
    sink_size: int | None, recent_size: int | None, lengths: Any, steps: int | None, seed: Any, progress: bool
) -> dict[str, Any]:
    """What was given by name, as overrides."""
    named = {"sink_size": sink_size, "recent_size": recent_size, "steps": steps, "seed": seed}
    for name, value in named.items():
        is_whole = value is None or (isinstance(value, Integral) and not isinstance(value, bool))
        check(is_whole, f"{name}={value!r:.80} must be a whole number")
    given: dict[str, Any] = {
        "method.sink_size": sink_size,
        "method.recent_size": recent_size,
        "trainer.max_steps": steps,
    }
    check(seed is not None and 0 <= seed < 2**32, f"seed={seed} must be a whole number from 0 to {2**32 - 1}")
    if lengths is not None:
        pair = (None, lengths) if isinstance(lengths, Integral) else lengths
        is_pair = isinstance(pair, tuple | list) and len(pair) == 2 and isinstance(pair[1], Integral)
        check(is_pair, f"lengths={lengths!r:.80} must be a number of tokens, or a pair (shortest, longest)")
        given |= {"data.length_min": pair[0], "data.length_max": pair[1]}
    chosen = {key: value for key, value in given.items() if value is not None}
    return chosen | {"seed": seed, "trainer.enable_progress_bar": progress}


def named_patterns(overrides: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, HeadPattern]]:
    """Names in place of head patterns that are given as settings, and the patterns by these names.

    A name says which scores a pattern has, since provenance records it.
    """
    named: dict[str, Any] = dict(overrides)
    patterns = {}
    for key, value in overrides.items():
        if isinstance(value, HeadPattern):
            digest = hashlib.sha256(value.scores.numpy().tobytes()).hexdigest()
            named[key] = f"HeadPattern in memory, scores sha256 {digest[:16]}"
            patterns[named[key]] = value
    return named, patterns


def settings_of(
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
    typed = {f"method.{key}" if key.partition(".")[0] in names else key: value for key, value in overrides.items()}
    for key in typed:
        reserved = any(key == name or key.startswith(f"{name}.") for name in RESERVED)
        check(not reserved, f"{key}: identify makes one run with the model as it is, so this cannot be set")
        check(key not in given, f"{key} is given twice: as an argument and as an override")
        close = get_close_matches(key, names, 1) if "." not in key and key not in config else []
        meant = f", did you mean {close[0]}?" if close else ""
        check(not close, f"{key}: there is no such argument or setting of method={method}{meant}")
    for key in ("method.prior", "method.start"):
        if key in typed:
            typed[key] = _named_method(key.rpartition(".")[2], typed[key])
    chosen = _device_defaults(model, config) | dict(given) | typed
    sizes = [chosen.get(f"method.{size}", config.method[size]) for size in ("sink_size", "recent_size")]
    window = sum(size for size in sizes if isinstance(size, Integral))  # another value is refused with the settings
    if isinstance(rows, SampleList):
        check(
            window < rows.longest,
            f"sink_size + recent_size = {window} must be below the {rows.longest} tokens of the longest sample in "
            "data, or nothing lies outside the window",
        )
        chosen |= {"data.length_min": rows.longest, "data.length_max": rows.longest}
    elif "data.length_max" in chosen and "data.length_min" not in chosen:
        longest, usual = chosen["data.length_max"], config.data.get("length_min", 1)
        chosen["data.length_min"] = min(max(longest // 8, window + 1, usual), longest)
    chosen["model"] = {"id": model.id, "name": model.name, "revision": model.revision}
    chosen |= {"comparison.validation_samples": 0, "logger": {}}
    if isinstance(rows, list) and "tokens" in names:
        chosen.setdefault("method.tokens", "far")
    override(config, chosen)
    settings = train_settings(config, model.model)
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
        f"{key}: a {type(named).__name__} is neither a HeadPattern, its folder, a method's name nor settings with one",
    )
    if named is None or not is_method:
        return named
    values = dict(named) if isinstance(named, Mapping) else {"name": named}
    check_choice(f"{key}.name", values.get("name"), "method")
    method = compose("train", [f"method={values['name']}"]).method
    return {**OmegaConf.to_container(method, resolve=True), **values}  # type: ignore[dict-item]


def _device_defaults(model: LanguageModel, config: DictConfig) -> dict[str, Any]:
    """What differs from conf/train.yaml on the model's device."""
    device, limit = model.model.device, model.max_length
    if device.type != "cuda":
        longest = config.data.get("length_max")  # samples on disk have their own lengths
        shorter = {"data.length_max": limit} if limit and longest and limit < longest else {}
        return {"trainer.accelerator": device.type} | shorter
    chosen: dict[str, Any] = GPU | {"trainer.accelerator": "cuda", "trainer.devices": [device.index or 0]}
    if "lr" in config.method:
        chosen |= GATES
    return chosen
