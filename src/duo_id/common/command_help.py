"""`--help`: a command's examples, its config groups, and its composed settings beside the comments of conf/."""

import re
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra.core.default_element import ResultDefault
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import OmegaConf

from duo_id.common.config import conf_dir

Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
NARROWEST = 30  # characters of a comment: where a value leaves less, its comment follows on lines of its own
WHOLE_WORDS: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}


def command_help(command: str, overrides: Sequence[str], width: int) -> str:
    """What `--help` shows beside these overrides.

    Args:
        command: conf/`command`.yaml is its config.
        overrides: the rest of the command line: other choices have other settings. Those of a sweep show no effect.
        width: characters of a line.

    Raises:
        HydraException or OmegaConfBaseException: the overrides cannot be parsed or composed.
    """
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    applied = [str(override.input_line) for override in parsed if not override.is_sweep_override()]
    with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        config = loader.load_configuration(command, applied, RunMode.RUN)
        defaults = loader.compute_defaults_list(command, applied, RunMode.RUN).defaults
    header = config.hydra.help.header
    composed: Any = OmegaConf.to_container(config)
    settings = {key: value for key, value in composed.items() if key != "hydra"}
    lines = [
        *[header, "", "GROUP=CHOICE, of these groups (conf/GROUP/CHOICE.yaml says what each is):", ""],
        *_choice_lines(command, width),
        *["", "KEY=VALUE, of these settings:", ""],
        *_setting_lines(settings, _comments(defaults), width),
    ]
    return "\n".join(lines)


def _choice_lines(command: str, width: int) -> Iterator[str]:
    """The groups that a command's defaults list names, each with its choices."""
    defaults = yaml.load((conf_dir() / f"{command}.yaml").read_text(encoding="utf-8"), Loader)["defaults"]
    named = [key for default in defaults if isinstance(default, dict) for key in default]
    for group in (key.partition("@")[0] for key in named if not key.startswith("override ")):
        choices = sorted(path.stem for path in (conf_dir() / group).glob("*.yaml"))
        yield from _wrapped(f"{group}: {', '.join(choices)}", width, "    ")


def _setting_lines(settings: dict[str, Any], comments: dict[str, str], width: int, key: str = "") -> Iterator[str]:
    """Settings as YAML, each beside its comment; `key` leads to them."""
    indent = "  " * (key.count(".") + 1 if key else 0)
    for name, value in settings.items():
        path = f"{key}.{name}" if key else str(name)
        nested = isinstance(value, dict) and bool(value)
        text = f"{indent}{name}:" if nested else f"{indent}{name}: {_flow(value)}"
        yield from _commented(text, comments.get(path, ""), indent, width)
        if nested:
            yield from _setting_lines(value, comments, width, path)


def _commented(text: str, comment: str, indent: str, width: int) -> Iterator[str]:
    """A setting, with its comment beside it or, where that leaves too little room, below it."""
    if comment and width - len(text) - len("  # ") >= NARROWEST:
        first, rest = f"{text}  # ", f"{' ' * len(text)}  # "
        yield from textwrap.wrap(comment, width, initial_indent=first, subsequent_indent=rest, **WHOLE_WORDS)
        return
    yield from _wrapped(text, width, f"{indent}    ")
    margin = f"{indent}  # "
    yield from textwrap.wrap(comment, width, initial_indent=margin, subsequent_indent=margin, **WHOLE_WORDS)


def _wrapped(text: str, width: int, margin: str) -> list[str]:
    return textwrap.wrap(text, width, subsequent_indent=margin, **WHOLE_WORDS)


def _flow(value: Any) -> str:
    """A value as YAML on one line."""
    return yaml.safe_dump(value, default_flow_style=True, width=10**9).removesuffix("...\n").rstrip("\n")


def _comments(defaults: Sequence[ResultDefault]) -> dict[str, str]:
    """The comment on each setting, by its dotted key.

    A chosen file comes before those that it inherits from, then come the others of its group, and last the files
    without a group: the command's own and, since their comments are about the values that they choose, experiments.

    Args:
        defaults: the files that the settings were composed from, in the order in which they were merged.
    """
    files = [(default.package or "", conf_dir() / f"{default.config_path}.yaml") for default in defaults]
    files = [(package, path) for package, path in files if path.is_file() and not f"{package}.".startswith("hydra.")]
    chosen = [(package, path) for package, path in reversed(files) if package]
    others = [(package, other) for package, path in chosen for other in sorted(path.parent.glob("*.yaml"))]
    found: dict[str, str] = {}
    for package, path in [*chosen, *others, *((package, path) for package, path in files if not package)]:
        for key, comment in file_comments(path).items():
            found.setdefault(f"{package}.{key}" if package else key, comment)
    return found


def file_comments(path: Path) -> dict[str, str]:
    """The comment beside each key of a YAML file, by its dotted key, with the lines that continue it."""
    text = path.read_text(encoding="utf-8")
    return dict(_node_comments(yaml.compose(text, Loader), text.splitlines()))


def _node_comments(node: yaml.Node | None, lines: list[str], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        number, column = key.end_mark.line, key.end_mark.column
        if value.end_mark.line == number:
            column = value.end_mark.column
        if beside := re.search(r"(?:^|\s)# *(.*)", lines[number][column:]):
            margin = " " * (column + beside.start() + beside.group().index("#")) + "#"
            parts = [beside[1]]
            while (number := number + 1) < len(lines) and lines[number].startswith(margin):
                parts.append(lines[number].removeprefix(margin))
            yield prefix + key.value, " ".join(part.strip() for part in parts)
        yield from _node_comments(value, lines, f"{prefix}{key.value}.")
