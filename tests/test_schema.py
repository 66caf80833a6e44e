"""Every setting of every command under values that are none: one line that names it, or it is listed here."""

import inspect
import math
from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from typing import Any, get_args, get_type_hints

import lightning
import pytest
from omegaconf import OmegaConf
from typing_extensions import is_typeddict

from duo_id.config import ModelSettings, TrainSettings, parse
from duo_id.errors import UserError
from duo_id.methods import METHODS, train_settings
from duo_id.schema import shown
from duo_id.trainer import OURS, TrainerSettings
from tests.test_config import NEEDED, SCHEMAS, base, changed  # noqa: F401  # a fixture

VALUES: dict[str, Any] = {
    "nan": math.nan,
    "inf": math.inf,
    "negative": -1,
    "zero": 0,
    "fraction": 1.5,
    "huge": 10**22,
    "huge-float": 1e22,
    "thousands-of-digits": 10**5000,
    "true": True,
    "null": None,
    "empty": "",
    "word": "nosuch",
    "two-lines": "a\nb",
    "list": [1],
    "empty-list": [],
    "list-in-a-list": [[0.5]],
    "mapping": {"nosuch": 1},
    "empty-mapping": {},
}


def leaves(schema: Any, path: str = "") -> Iterator[str]:
    """The override of every setting within a schema."""
    if schema is TrainerSettings:
        yield from (f"{path}.{name}" for name in get_type_hints(schema))
    for name, kind in get_type_hints(schema).items() if is_dataclass(schema) else []:
        place = f"{path}.{name}".lstrip(".")
        yield place
        yield from leaves(kind, place)


if __name__ == "__main__":
    pass
