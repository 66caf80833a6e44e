"""Hydra composes the groups of conf/ once for all commands of a test process that choose the same ones.

What remains to be done for each command is what differs: its overrides of single values.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from copy import copy, deepcopy
from pathlib import Path
from typing import Any
from unittest.mock import patch

from hydra._internal import config_loader_impl
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra._internal.core_plugins.importlib_resources_config_source import ImportlibResourcesConfigSource
from hydra._internal.defaults_list import DefaultsList, Overrides
from hydra._internal.hydra import Hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.plugins.config_source import ConfigResult, ConfigSource
from omegaconf import DictConfig, base

from duo_id.common.config import conf_dir

COMPOSE = ConfigLoaderImpl._compose_config_from_defaults_list
SOURCES = (FileConfigSource, ImportlibResourcesConfigSource)
Key = tuple[object, ...]  # the command, its choices of groups, and where they lie; or a file, and when it was written

_chosen: dict[Key, DefaultsList] = {}
_composed: dict[int, DictConfig | None] = {}  # by the list of files of one of `_chosen`, which is never collected
_parsed: dict[str, Override] = {}
_files: dict[Key, ConfigResult] = {}
_interpolations: dict[tuple[object, ...], Any] = {}


@contextmanager
def remembered_compositions() -> Iterator[None]:
    """Remember what Hydra has parsed and composed while the block lasts; mistakes are found anew each time."""
    with ExitStack() as patches:
        for place, name, function in (
            # It composes all settings an extra time to look for hydra.mode, and reads the first file twice to look for
            # hydra.searchpath; nothing in conf/ sets either.
            (Hydra, "get_mode", lambda *_, **__: None),
            (ConfigLoaderImpl, "_process_config_searchpath", _search(ConfigLoaderImpl._process_config_searchpath)),
            (OverridesParser, "parse_rule", _parse(OverridesParser.parse_rule)),
            (config_loader_impl, "create_defaults_list", _choose(config_loader_impl.create_defaults_list)),
            (ConfigLoaderImpl, "_compose_config_from_defaults_list", _compose(COMPOSE)),
            (base, "parse", _interpolate(base.parse)),
            *((source, "load_config", _load(source.load_config)) for source in SOURCES),
        ):
            patches.enter_context(patch.object(place, name, function))
        yield


def _load(inner: Callable[..., ConfigResult]) -> Callable[..., ConfigResult]:
    def load(self: ConfigSource, config_path: str) -> ConfigResult:
        file = Path(self.path, self._normalize_file_name(config_path))
        key = (self.path, config_path, file.stat().st_mtime_ns if file.is_file() else None)
        if key not in _files:
            _files[key] = inner(self, config_path)
        return deepcopy(_files[key])

    return load


def _search(inner: Callable[..., None]) -> Callable[..., None]:
    def search(self: ConfigLoaderImpl, config_name: str, overrides: list[Override], repo: Any) -> None:
        if any(override.key_or_group == "hydra.searchpath" for override in overrides):
            inner(self, config_name, overrides, repo)

    return search


def _parse(inner: Callable[..., Any]) -> Callable[..., Any]:
    def parse(self: OverridesParser, text: str, rule: str) -> Any:
        if rule != "override":
            return inner(self, text, rule)
        if text not in _parsed:
            _parsed[text] = inner(self, text, rule)
        return copy(_parsed[text])

    return parse


def _choose(inner: Callable[..., DefaultsList]) -> Callable[..., DefaultsList]:
    def choose(repo: Any, config_name: str, overrides_list: list[Override], **options: Any) -> DefaultsList:
        values = Overrides(repo, overrides_list).config_overrides
        groups = [override.input_line for override in overrides_list if not any(override is value for value in values)]
        places = [source.path for source in repo.get_sources()]
        if str(conf_dir()) not in places:  # others may change
            return inner(repo=repo, config_name=config_name, overrides_list=overrides_list, **options)
        key = (config_name, *sorted(options.items()), None, *groups, None, *places)
        if key not in _chosen:
            _chosen[key] = inner(repo=repo, config_name=config_name, overrides_list=overrides_list, **options)
            _composed[id(_chosen[key].defaults)] = None
        found = copy(_chosen[key])
        found.config_overrides = values
        return found

    return choose


def _compose(inner: Callable[..., DictConfig]) -> Callable[..., DictConfig]:
    def compose(self: ConfigLoaderImpl, defaults: list[Any], repo: Any) -> DictConfig:
        if id(defaults) not in _composed:
            return inner(self, defaults, repo)
        if (remembered := _composed[id(defaults)]) is None:
            remembered = _composed[id(defaults)] = inner(self, defaults, repo)
        return deepcopy(remembered)

    return compose


def _interpolate(inner: Callable[..., Any]) -> Callable[..., Any]:
    def interpolate(*arguments: Any) -> Any:
        if arguments not in _interpolations:
            _interpolations[arguments] = inner(*arguments)
        return _interpolations[arguments]

    return interpolate
