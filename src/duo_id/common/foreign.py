"""What other people's files may decide: patterns and run folders are data, and name no code.

What a user types, and conf/, is trusted. docs/security.md has the rules that are enforced here.
"""

import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from duo_id.common.config import shown
from duo_id.common.errors import UserError
from duo_id.common.mistakes import literal

MODEL_TEXTS = ("id", "name", "revision", "wheel", "init", "dtype")  # of a model, as a pattern may give them
MODEL_SHAPES = ("architecture", "config")
WORDS = (  # numbers of a model's config that are words; no other key may be one (`_attn_implementation` loads kernels)
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
NAME = re.compile(r"[A-Za-z]\w{0,63}")  # of a number in a model's config: none of its private ones
LINE = 200  # characters of a text
COUNT = re.compile(r"(num|n)_\w*(layer|block|head|expert|group|stage)\w*|(\w*_)?(layers|blocks|heads|experts)|depth")
MOST = {True: 2**10, False: 2**40}  # of a number that counts parts of a model, each of which is made, and of others
HERE = (  # where the classes lie that a run's files may name, and whose modules are loaded whenever a run starts
    "lightning.pytorch",
    "torch.optim",
    "duo_id",
)
CALLBACKS = "lightning.pytorch.callbacks"  # those of duo_id write where they are told, and a run has its own
WRITES = re.compile(r"(\w*_)?(dir|dirpath|directory|run|path|paths|file|filename|folder|root)")  # arguments: where to
TRAINERS = ("lightning.Trainer", "lightning.pytorch.Trainer")
ELSEWHERE = re.compile(r"^[/~\\]|^\w:\\|(^|[/\\])\.\.([/\\]|$)|://")  # a path out of the run folder, or an address

Place = tuple[str | int, ...]


def model_of(provenance: Mapping[str, Any], override: str) -> dict[str, Any] | None:
    """The settings of the model that a pattern was found on: its name and its numbers, and nothing that names code.

    Args:
        provenance: of the pattern.
        override: that named the pattern, for messages.

    Returns:
        values for `ModelSettings`, made literal; None: the pattern does not say.

    Raises:
        UserError: a value is not what it could be.
    """
    settings = provenance.get("settings")
    given = settings.get("model") if isinstance(settings, Mapping) else None
    if not given:
        return None
    if not isinstance(given, Mapping):
        raise UserError(f"{override}: settings.model of the pattern is no mapping: give model=NAME")
    found: dict[str, Any] = {}
    for key in MODEL_TEXTS:
        value = given.get(key)
        if value is None or value == "":
            continue
        if not isinstance(value, str) or len(value) > LINE or not value.isprintable():
            raise UserError(f"{override}: the pattern's model.{key}={value!r:.80} is no short text: give model=NAME")
        found[key] = value
    if not WORD.fullmatch(found.get("wheel", "none")):
        raise UserError(f"{override}: the pattern's model.wheel={found['wheel']!r} is no package: give model=NAME")
    for key in MODEL_SHAPES:
        if value := given.get(key):
            if not isinstance(value, Mapping):
                raise UserError(f"{override}: the pattern's model.{key}={value!r:.80} is no mapping: give model=NAME")
            check_shape(value, f"model.{key}", f"{override}: the pattern's ", "give model=NAME")
            found[key] = value
    if "id" not in found:
        raise UserError(f"{override}: the pattern does not say which model.id it was found on: give model=NAME")
    return literal(found)


def told_model(provenance: Mapping[str, Any], override: str, advice: str) -> str:
    """A line about the model that a pattern names, to be shown before that is loaded.

    Args:
        provenance: of a pattern that `model_of` takes a model from.
        override: that named the pattern.
        advice: the override that names another model.
    """
    given = provenance["settings"]["model"]
    revision = f" (revision {given['revision']})" if given.get("revision") else ""
    code = "; it was found with trust_remote_code=true, which no pattern switches on" if _needs_code(given) else ""
    return f"the model that {override} names: {given['id']}{revision}; for another give {advice}{code}"


def _needs_code(given: Mapping[str, Any]) -> bool:
    return given.get("trust_remote_code") not in (None, False)


def check_shape(value: Any, path: str, before: str, advice: str) -> None:
    """Raise a `UserError` unless a model's numbers are numbers, but for those that are words (`WORDS`)."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if not NAME.fullmatch(str(key)) or "trust_remote_code" in str(key):
                raise UserError(f"{before}{path}.{key} is no number of a model's shape: {advice}")
            check_shape(inner, f"{path}.{key}", before, advice)
    elif isinstance(value, list):
        for inner in value:
            check_shape(inner, path, before, advice)
    elif isinstance(value, int | float):
        counts = COUNT.fullmatch(path.rpartition(".")[2]) is not None
        if not abs(value) <= MOST[counts]:  # also where it is none
            raise UserError(f"{before}{path}={value} is more than any model has: {advice}")
    elif isinstance(value, str) and (path.rpartition(".")[2] not in WORDS or not WORD.fullmatch(value)):
        raise UserError(f"{before}{path}={value!r:.80} is no number of a model's shape: {advice}")


def check_resumed(found: Mapping[str, Any], trusted: Mapping[str, Any], resume: str) -> None:
    """Raise a `UserError` if what a run folder adds to the settings could run code, read or write elsewhere.

    Args:
        found: plain settings, of the run and today's.
        trusted: plain settings that today's command line gives alone; what is the same there is trusted.
        resume: the run folder.
    """
    known = dict(walk(trusted))
    for path, value in walk(found):
        if path in known and known[path] == value and type(known[path]) is type(value):
            continue
        reason = _reason(path, value, found)
        if reason is not None:
            raise UserError(
                f"resume={resume}: its saved {'.'.join(map(str, path))}={shown(value)} {reason}, and files of a run "
                "are not trusted with that; if you are, give this setting again"
            )


def walk(value: Any, path: Place = ()) -> Iterator[tuple[Place, Any]]:
    """All values within plain containers that are no containers, and the keys that lead to them."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from walk(inner, (*path, key))
        if not value:
            yield path, None
    elif isinstance(value, list | tuple):
        for place, inner in enumerate(value):
            yield from walk(inner, (*path, place))
    else:
        yield path, value


def class_of(target: str, role: str) -> bool:
    """Whether a dotted name is that of a class which a run's files may name, without importing anything.

    Args:
        target: the name.
        role: what it must be: trainer, callback, logger, strategy or optimizer.
    """
    import torch
    from lightning.pytorch import Callback
    from lightning.pytorch.loggers import Logger
    from lightning.pytorch.strategies import Strategy

    if role == "trainer":
        return target in TRAINERS
    kinds = {"callback": Callback, "logger": Logger, "strategy": Strategy, "optimizer": torch.optim.Optimizer}
    module, _, name = target.rpartition(".")
    places = (CALLBACKS,) if role == "callback" else HERE
    if not any(module == place or module.startswith(f"{place}.") for place in places):
        return False
    one = vars(sys.modules[module]).get(name) if module in sys.modules else None
    return isinstance(one, type) and issubclass(one, kinds[role])


def _reason(path: Place, value: Any, found: Any) -> str | None:
    """What is wrong with a value that a run folder brings along, if anything."""
    key = path[-1] if path else ""
    if "trust_remote_code" in path and value not in (False, None):
        return "would switch on code of the model's repository"
    if "_target_" in path[:-1] or (key == "_target_" and not isinstance(value, str)):
        return "is no name of a class"
    if key == "_target_":
        role = _role(path[:-1])
        allowed = role is not None and class_of(value, role)
        of = CALLBACKS if role == "callback" else "Lightning, torch.optim or duo_id"
        return None if allowed else f"is no {role or 'place for one'} of {of}"
    if any(isinstance(part, str) and re.fullmatch(r"_\w+_", part) for part in path):
        return "steers how Hydra makes objects"
    if "objective" in path:
        named = [part for part in (*path[path.index("objective") + 1 :], value) if isinstance(part, str)]
        return "names an objective to import" if any("." in name for name in named) else None
    if path[:2] in (("model", "architecture"), ("model", "config")):
        try:
            check_shape(_nested(path[2:], value), ".".join(map(str, path[:2])), "", "")
        except UserError:
            return "is no number of a model's shape"
    replaced = path[:1] == ("logger",) and path[2:] == ("save_dir",)  # by the run folder
    if not isinstance(value, str) or replaced or not _in_object(path, found):
        return None
    if ELSEWHERE.search(value):
        return "leads out of the run folder"
    told = path[:1] == ("logger",) or path[:2] == ("trainer", "callbacks")
    if told and any(isinstance(part, str) and WRITES.fullmatch(part) for part in path[2:]):
        return "says where to write"  # which a path that does not start at the root does from where one works
    if path[:2] == ("trainer", "callbacks") and key != "monitor" and re.search(r"[/\\:]", value):
        return "may be a path"
    return None


def _role(path: Place) -> str | None:
    """What the object at a place of the settings must be."""
    if path == ("trainer",):
        return "trainer"
    if path[:2] == ("trainer", "callbacks") and (len(path) == 2 or (len(path) == 3 and isinstance(path[2], int))):
        return "callback"
    if path == ("trainer", "strategy"):
        return "strategy"
    if len(path) == 2 and path[0] == "logger":
        return "logger"
    return "optimizer" if path[:1] == ("method",) and path[-1] == "optimizer" else None


def _in_object(path: Place, found: Any) -> bool:
    """Whether a value is, or lies in, an argument of an object that Hydra makes."""
    for part in path[:-1]:
        if isinstance(found, Mapping) and "_target_" in found:
            return True
        found = found[part]
    return isinstance(found, Mapping) and "_target_" in found


def _nested(path: Place, value: Any) -> Any:
    """The value inside mappings of these keys; places in lists do not count."""
    for part in reversed(path):
        value = value if isinstance(part, int) else {part: value}
    return value
