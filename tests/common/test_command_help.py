"""`--help` of the commands that Hydra composes, against a line-by-line reading of conf/."""

import re
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import yaml

from duo_id.common.command_help import command_help, file_comments
from duo_id.common.config import conf_dir
from tests.support.commands import run_command
from tests.support.compositions import remembered_compositions

WIDE = 10_000  # characters of a line: no comment is wrapped
GROUPS = {
    "train": ["model", "data", "method", "step", "trainer", "logger", "experiment"],
    "evaluate": ["model", "data/haystack", "evaluation"],
    "benchmark": ["model", "step", "preset"],
    "data_gen": ["model", "data"],
}
ALIKE = {"model": ["hub", "tiny"], "experiment": ["paper"], "preset": ["scale-70b-32k"]}  # others have other values
OF_ALL = ("experiment", "evaluation", "preset")  # groups whose files are about settings of all groups
CHOICES = [
    (command, f"{group}={path.stem}")
    for command, groups in GROUPS.items()
    for group in groups
    for path in sorted((conf_dir() / group).glob("*.yaml"))
    if path.stem in ALIKE.get(group, [path.stem])
]


@pytest.fixture(autouse=True)
def remembered() -> Iterator[None]:
    with remembered_compositions():
        yield


def settings_shown(text: str) -> dict[str, str]:
    """The comment on each setting of a page, or of a YAML file, by dotted key; empty where there is none."""
    comments: dict[str, str] = {}
    keys: list[str] = []
    for line in text.splitlines():
        if found := re.match(r"( *)([\w-]+):(?: .*?)??(?:  # (.*))?$", line):
            keys[len(found[1]) // 2 :] = [found[2]]
            comments[".".join(keys)] = found[3] or ""
        elif comments and (more := re.match(r" {5,}# (.*)", line)):
            comments[".".join(keys)] += f" {more[1]}"
    return comments


def shown(command: str, *overrides: str, width: int = WIDE) -> dict[str, str]:
    """The settings on a command's page."""
    page = command_help(command, overrides, width)
    return settings_shown(page.partition("of these settings:\n\n")[2])


@cache
def comments_of(group: str) -> dict[str, set[str]]:
    """All comments on each key in the files of a group."""
    found: dict[str, set[str]] = {}
    for path in (conf_dir() / group).glob("*.yaml"):
        for key, comment in settings_shown(path.read_text()).items():
            found.setdefault(f"{group.replace('/', '.')}.{key}", set()).update({comment} - {""})
    return found


@pytest.mark.parametrize(("command", "choice"), CHOICES, ids=[" ".join(case) for case in CHOICES])
def test_every_setting_with_a_comment_shows_it_and_no_other_shows_any(command: str, choice: str) -> None:
    group, _, name = choice.partition("=")
    in_groups = [comments_of(named) for named in {*GROUPS[command], "data/haystack"} - {*OF_ALL}]
    own = settings_shown((conf_dir() / f"{command}.yaml").read_text())
    chosen = settings_shown((conf_dir() / group / f"{name}.yaml").read_text()) if group in OF_ALL else {}
    for key, comment in shown(command, choice).items():
        of_group = set().union(*(comments.get(key, set()) for comments in in_groups))
        assert comment in (of_group or {own.get(key) or chosen.get(key, "")}), key


def test_a_chosen_file_comes_before_those_that_it_inherits_from_and_these_before_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {name: file_comments(conf_dir() / "method" / f"{name}.yaml") for name in ("nested", "duo", "search")}
    assert "temperature" not in files["nested"]
    settings = shown("train", "method=nested")
    assert settings["method.temperature"] == files["duo"]["temperature"]
    assert settings["method.objective"] == files["duo"]["objective"] != files["search"]["objective"]
    assert shown("train", "method=search")["method.objective"] == files["search"]["objective"]
    shutil.copytree(conf_dir(), tmp_path / "conf")
    nested = tmp_path / "conf" / "method" / "nested.yaml"
    nested.write_text(nested.read_text().replace("temperature: 0.3", "temperature: 0.3  # its own"))
    monkeypatch.setattr("duo_id.common.command_help.conf_dir", lambda: tmp_path / "conf")
    assert shown("train", "method=nested")["method.temperature"] == "its own"
    assert shown("train", "method=duo")["method.temperature"] == files["duo"]["temperature"]


def test_the_command_line_chooses_what_is_shown() -> None:
    page = command_help("train", ["method=search", "seed=7", "+method@method.start=reconstruction"], 80)
    assert "\nseed: 7\n" in page
    assert "method.strategy" in settings_shown(page)
    assert "  start:  # a saved pattern, or another method" in page
    assert "    sink_size: 16  # tokens\n" in page
    assert "method.gate" not in settings_shown(page)
    assert "\nseed: 0\n" in command_help("train", ["seed=1,2", "method.lr=0.1"], 80), "a sweep has no one value"


@pytest.mark.parametrize("command", GROUPS)
def test_the_groups_are_those_of_the_commands_own_defaults(command: str) -> None:
    page = command_help(command, [], WIDE).partition("GROUP=CHOICE, of these groups")[2].partition("KEY=VALUE")[0]
    groups = dict(line.split(": ") for line in page.splitlines() if ": " in line and not line.startswith(" ("))
    assert list(groups) == GROUPS[command]
    for group, choices in groups.items():
        assert choices.split(", ") == sorted(path.stem for path in (conf_dir() / group).glob("*.yaml"))


@pytest.mark.parametrize("command", GROUPS)
def test_a_page_fits_80_columns_and_loses_nothing(command: str) -> None:
    narrow, wide = (command_help(command, [], width) for width in (80, WIDE))
    assert max(map(len, narrow.splitlines())) <= 80
    assert shown(command, width=80) == shown(command)
    assert re.sub(r"\s+(# )?", " ", narrow) == re.sub(r"\s+(# )?", " ", wide)


def test_a_comment_without_room_stands_below() -> None:
    lines = command_help("evaluate", ["evaluation=quick"], 60).splitlines()
    at = next(number for number, line in enumerate(lines) if line.startswith("tasks:"))
    assert lines[at + 1].startswith("    ")
    assert lines[at + 2] == "  # tasks and groups of tasks: an unknown name shows the"
    assert max(map(len, lines[lines.index("KEY=VALUE, of these settings:") :])) <= 60


def test_without_a_terminal_lines_are_wide(tmp_path: Path) -> None:
    finished = run_command("train", "method=search", "--help", folder=tmp_path)
    assert finished.status == 0
    assert 80 < max(map(len, finished.output.splitlines())) <= 200
    assert "method.strategy" in settings_shown(finished.output)
    assert not list(tmp_path.iterdir()), "help writes nothing"


def test_mistakes_beside_help_are_one_line(tmp_path: Path) -> None:
    assert "did you mean nested?" in run_command("train", "method=nestd", "-h", folder=tmp_path).error


def test_comments_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "some.yaml"
    path.write_text(
        "# About the file.\n"
        "plain: 1\n"
        "text: 'a # b'  # beside a text\n"
        "list: [1, 2]   #about a list\n"
        "group:  # about the group,\n"
        "        # on two lines\n"
        "  # about nothing\n"
        "  inner: x#y  # inside\n"
        "block:\n"
        "  - one  # an item's\n"
        "empty:  # of nothing\n"
    )
    assert file_comments(path) == {
        "text": "beside a text",
        "list": "about a list",
        "group": "about the group, on two lines",
        "group.inner": "inside",
        "empty": "of nothing",
    }
    assert yaml.safe_load(path.read_text())["group"] == {"inner": "x#y"}
    path.write_text("")
    assert file_comments(path) == {}
