"""Limits on the settings in other people's files: patterns and run folders are data and cannot name code.

Command lines and conf/ are trusted. docs/security.md states the rules that are enforced here.
"""

import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from duo_id.common.config import shown
from duo_id.common.errors import UserError
from duo_id.common.mistakes import escape_interpolations

# Settings of a model that a pattern may contain.
MODEL_TEXTS = ("id", "name", "revision", "wheel", "init", "dtype", "weights")
MODEL_SHAPES = ("architecture", "config")
# Keys of a model's config that may hold a word; all others hold numbers (`_attn_implementation` could load kernels).
TEXT_KEYS = (
    "model_type",
    "hidden_act",
    "hidden_activation",
    "activation_function",
    "layer_types",
    "rope_type",
    "type",
    "dtype",
    "torch_dtype",
    "position_embedding_type",
)
WORD = re.compile(r"[\w.+-]{1,64}")
NAME = re.compile(r"[A-Za-z]\w{0,63}")  # of a key in a model's config: not a private one
MAX_TEXT = 200  # characters
COUNT_KEYS = re.compile(
    r"(num|n)_\w*(layer|block|head|expert|group|stage)\w*|(\w*_)?(layers|blocks|heads|experts)|depth"
)
MAX_NUMBERS = {True: 2**10, False: 2**40}  # by whether a number counts parts of the model, each of which is allocated
# Packages of the classes that a run's files may name; every run imports them anyway.
ALLOWED_PACKAGES = ("lightning.pytorch", "torch.optim", "duo_id")
ALLOWED_CALLBACKS = "lightning.pytorch.callbacks"  # not duo_id's: they write to any path, and a run adds its own
WRITE_ARGUMENTS = re.compile(r"(\w*_)?(dir|dirpath|directory|run|path|paths|file|filename|folder|root)")
TRAINERS = ("lightning.Trainer", "lightning.pytorch.Trainer")
OUTSIDE_PATH = re.compile(r"^[/~\\]|^\w:\\|(^|[/\\])\.\.([/\\]|$)|://")  # a path out of the run folder, or a URL

KeyPath = tuple[str | int, ...]


def model_of(provenance: Mapping[str, Any], override: str) -> dict[str, Any] | None:
    """The settings of the model that a pattern was found on: its name and its sizes, and nothing that names code.

    Args:
        provenance: of the pattern.
        override: the override that named the pattern, for messages.

    Returns:
        values for `ModelSettings`, with interpolations escaped; None if the pattern does not name its model.

    Raises:
        UserError: a value is invalid.
    """
    settings = provenance.get("settings")
    recorded = settings.get("model") if isinstance(settings, Mapping) else None
    if not recorded:
        return None
    if not isinstance(recorded, Mapping):
        raise UserError(f"{override}: settings.model of the pattern is no mapping: give model=NAME")
    model: dict[str, Any] = {}
    for key in MODEL_TEXTS:
        value = recorded.get(key)
        if value is None or value == "":
            continue
        if not isinstance(value, str) or len(value) > MAX_TEXT or not value.isprintable():
            raise UserError(f"{override}: the pattern's model.{key}={value!r:.80} is no short text: give model=NAME")
        model[key] = value
    if not WORD.fullmatch(model.get("wheel", "none")):
        raise UserError(f"{override}: the pattern's model.wheel={model['wheel']!r} is no package: give model=NAME")
    for key in MODEL_SHAPES:
        if value := recorded.get(key):
            if not isinstance(value, Mapping):
                raise UserError(f"{override}: the pattern's model.{key}={value!r:.80} is no mapping: give model=NAME")
            check_shape(value, f"model.{key}", f"{override}: the pattern's ", "give model=NAME")
            model[key] = value
    if "id" not in model:
        raise UserError(f"{override}: the pattern does not say which model.id it was found on: give model=NAME")
    return escape_interpolations(model)


def describe_model(provenance: Mapping[str, Any], override: str, advice: str) -> str:
    """A line about the model that a pattern names, shown before the model is loaded.

    Args:
        provenance: of a pattern for which `model_of` returns a model.
        override: the override that named the pattern.
        advice: the override that chooses another model.
    """
    model = provenance["settings"]["model"]
    revision = f" (revision {model['revision']})" if model.get("revision") else ""
    code = "; it was found with trust_remote_code=true, which no pattern switches on" if _needs_code(model) else ""
    return f"the model that {override} names: {model['id']}{revision}; for another give {advice}{code}"


def describe_weights(provenance: Mapping[str, Any], weights: str | None, heads: str) -> str | None:
    """A line about heads that are used on weights of other bits than they were found on; None: no such thing is known.

    Args:
        provenance: of the pattern.
        weights: int8, int4, another method that they are quantised by, or None.
        heads: what the line calls them.
    """
    model = provenance.get("model")
    found = model.get("weights") if isinstance(model, Mapping) else weights
    if found == weights:
        return None
    kinds = ("unquantised" if kind is None else kind for kind in (found, weights))
    return "{} were found on {} weights, and are used on {} ones".format(heads, *kinds)


def _needs_code(model: Mapping[str, Any]) -> bool:
    return model.get("trust_remote_code") not in (None, False)


def check_shape(value: Any, path: str, prefix: str, advice: str) -> None:
    """Raise a `UserError` unless all values of a model's config are numbers, or words under one of `TEXT_KEYS`.

    Args:
        value: the config, or a part of it.
        path: its dotted key, for messages.
        prefix: how messages begin.
        advice: how messages end.
    """
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if not NAME.fullmatch(str(key)) or "trust_remote_code" in str(key):
                raise UserError(f"{prefix}{path}.{key} is no number of a model's shape: {advice}")
            check_shape(inner, f"{path}.{key}", prefix, advice)
    elif isinstance(value, list):
        for inner in value:
            check_shape(inner, path, prefix, advice)
    elif isinstance(value, int | float):
        counts = COUNT_KEYS.fullmatch(path.rpartition(".")[2]) is not None
        if not abs(value) <= MAX_NUMBERS[counts]:  # true for NaN too
            raise UserError(f"{prefix}{path}={value} is more than any model has: {advice}")
    elif isinstance(value, str) and (path.rpartition(".")[2] not in TEXT_KEYS or not WORD.fullmatch(value)):
        raise UserError(f"{prefix}{path}={value!r:.80} is no number of a model's shape: {advice}")


def check_resumed_settings(settings: Mapping[str, Any], trusted: Mapping[str, Any], resume: str) -> None:
    """Raise a `UserError` if a run folder adds settings that could run code, or read or write outside the folder.

    Args:
        settings: plain settings: the run's, overridden by the command line.
        trusted: plain settings composed from the command line alone; equal values are trusted.
        resume: the run folder.
    """
    trusted_values = dict(walk(trusted))
    for path, value in walk(settings):
        if path in trusted_values and trusted_values[path] == value and type(trusted_values[path]) is type(value):
            continue
        reason = _refusal(path, value, settings)
        if reason is not None:
            raise UserError(
                f"resume={resume}: its saved {'.'.join(map(str, path))}={shown(value)} {reason}, which files of a run "
                "are not trusted with; if you trust it, give this setting again"
            )


def walk(value: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """All leaves of nested plain containers, each with the path of keys and indices to it."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from walk(inner, (*path, key))
        if not value:
            yield path, None
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from walk(inner, (*path, index))
    else:
        yield path, value


def is_allowed_class(target: str, role: str) -> bool:
    """Whether a run's files may name a class, decided without importing anything.

    Args:
        target: dotted name of the class.
        role: what the class must be: trainer, callback, logger, strategy or optimizer.
    """
    import torch
    from lightning.pytorch import Callback
    from lightning.pytorch.loggers import Logger
    from lightning.pytorch.strategies import Strategy

    if role == "trainer":
        return target in TRAINERS
    base_classes = {"callback": Callback, "logger": Logger, "strategy": Strategy, "optimizer": torch.optim.Optimizer}
    module, _, name = target.rpartition(".")
    packages = (ALLOWED_CALLBACKS,) if role == "callback" else ALLOWED_PACKAGES
    if not any(module == package or module.startswith(f"{package}.") for package in packages):
        return False
    attribute = vars(sys.modules[module]).get(name) if module in sys.modules else None
    return isinstance(attribute, type) and issubclass(attribute, base_classes[role])


def _refusal(path: KeyPath, value: Any, settings: Any) -> str | None:
    """Why a value from a run folder is refused; None if it is allowed."""
    key = path[-1] if path else ""
    if "trust_remote_code" in path and value not in (False, None):
        return "would run code from the model's repository"
    if "_target_" in path[:-1] or (key == "_target_" and not isinstance(value, str)):
        return "is no name of a class"
    if key == "_target_":
        role = _required_role(path[:-1])
        if role is None:
            return "names a class where none is allowed"
        packages = ALLOWED_CALLBACKS if role == "callback" else "Lightning, torch.optim or duo_id"
        return None if is_allowed_class(value, role) else f"is no {role} of {packages}"
    if any(isinstance(part, str) and re.fullmatch(r"_\w+_", part) for part in path):
        return "changes how Hydra creates objects"
    if "objective" in path:
        named = [part for part in (*path[path.index("objective") + 1 :], value) if isinstance(part, str)]
        return "names an objective to import" if any("." in name for name in named) else None
    if path[:2] in (("model", "architecture"), ("model", "config")):
        try:
            check_shape(_nested(path[2:], value), ".".join(map(str, path[:2])), "", "")
        except UserError:
            return "is no number of a model's shape"
    replaced = path[:1] == ("logger",) and path[2:] == ("save_dir",)  # by the run folder
    if not isinstance(value, str) or replaced or not _in_object(path, settings):
        return None
    if OUTSIDE_PATH.search(value):
        return "leads out of the run folder"
    writes = path[:1] == ("logger",) or path[:2] == ("trainer", "callbacks")
    if writes and any(isinstance(part, str) and WRITE_ARGUMENTS.fullmatch(part) for part in path[2:]):
        return "says where to write"  # relative paths too: they start at the working directory
    if path[:2] == ("trainer", "callbacks") and key != "monitor" and re.search(r"[/\\:]", value):
        return "may be a path"
    return None


def _required_role(path: KeyPath) -> str | None:
    """The role that an object at this path of the settings must have; None if no object is allowed there."""
    if path == ("trainer",):
        return "trainer"
    if path[:2] == ("trainer", "callbacks") and (len(path) == 2 or (len(path) == 3 and isinstance(path[2], int))):
        return "callback"
    if path == ("trainer", "strategy"):
        return "strategy"
    if len(path) == 2 and path[0] == "logger":
        return "logger"
    return "optimizer" if path[:1] == ("method",) and path[-1] == "optimizer" else None


def _in_object(path: KeyPath, settings: Any) -> bool:
    """Whether a value is, or is nested in, an argument of an object that Hydra creates."""
    for part in path[:-1]:
        if isinstance(settings, Mapping) and "_target_" in settings:
            return True
        settings = settings[part]
    return isinstance(settings, Mapping) and "_target_" in settings


def _nested(path: KeyPath, value: Any) -> Any:
    """The value nested in mappings of these keys; list indices are ignored."""
    for part in reversed(path):
        value = value if isinstance(part, int) else {part: value}
    return value
