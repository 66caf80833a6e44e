"""The shape of the source: imports point downward, no model family is named, files stay small."""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from duo_id.common.config import conf_dir, plain
from duo_id.train.fitting import train_settings
from tests.support.commands import run_command

SOURCE = Path(__file__).parents[1] / "src"
LONGEST = 320  # lines of a module

# A package imports from those before it alone.
PACKAGES = (
    "common distributed patterns attention vllm deploy models data step methods lm_eval train benchmark report peers "
    "evaluate"
).split()
DOORS = {"duo_id.__main__", "duo_id.convert", "duo_id.kvpress"}  # beside the packages, imported by nobody
FAMILIES = (
    "llama mistral mixtral qwen gemma phi[0-9]? gpt_?neox gpt-?2 opt falcon bloom stablelm olmo cohere granite smollm "
    "deepseek nemotron starcoder glm pythia mamba"
)


def module_name(path: Path) -> str:
    """`duo_id.data.disk` of its file; a package is the name of its folder."""
    return ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in sorted((SOURCE / "duo_id").rglob("*.py"))}
INITS = {name for name, path in MODULES.items() if path.stem == "__init__"}


def imports(name: str) -> set[str]:
    """The modules of this project that a module imports anywhere, also inside functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} has a relative import"
            members = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {member if member in MODULES else str(node.module) for member in members}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            given = node.args[0]
            assert isinstance(given, ast.Constant) or name == "duo_id", f"{name} hides what it imports"
            found |= {given.value} if isinstance(given, ast.Constant) else set()
    return {module for module in found if module in MODULES}


def reached(name: str) -> set[str]:
    """All modules of this project that importing one loads."""
    found, todo = set(), [name]
    while todo:
        for module in imports(todo.pop()) - found:
            found.add(module)
            todo.append(module)
    return found


def test_every_module_has_its_place() -> None:
    assert {name.split(".")[1] for name in MODULES.keys() - DOORS - {"duo_id"}} == set(PACKAGES)


@pytest.mark.parametrize("name", sorted(MODULES.keys() - DOORS - {"duo_id"}))
def test_imports_point_downward(name: str) -> None:
    place = PACKAGES.index(name.split(".")[1])
    above = {module for module in imports(name) - {"duo_id"} if module.split(".")[1] not in PACKAGES[: place + 1]}
    assert not above, f"{name} stands below {above}"


def test_no_imports_go_round_in_a_circle() -> None:
    TopologicalSorter({name: imports(name) - {name} for name in MODULES}).prepare()


def test_packages_import_nothing_eagerly() -> None:
    for name in INITS - {"duo_id"}:
        lazy = {"duo_id.vllm.plugin"} if name == "duo_id.vllm" else set()  # its function imports it when it is called
        assert imports(name) == lazy, name
    (guard,) = [node for node in ast.parse(MODULES["duo_id"].read_text()).body if isinstance(node, ast.If)]
    assert ast.unparse(guard.test) == "TYPE_CHECKING"


def test_nobody_imports_the_entry_points() -> None:
    for name in MODULES:
        entries = {module for module in imports(name) if module in DOORS or module.endswith("__main__")}
        assert not entries, name


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        ("common.errors", ""),
        ("common.files", "common.integrity common.errors"),
        ("common.figures", "common.files common.integrity common.errors"),
        ("patterns.sources", "patterns.hub common.errors"),
        (
            "patterns.files",
            "patterns.needs patterns.fields patterns.sources patterns.tables patterns.hub common.files "
            "common.documents common.integrity common.errors",
        ),
        ("patterns.heatmap", "patterns.cells common.figures common.files common.integrity common.errors"),
        (
            "patterns.pattern",
            "patterns.allocation patterns.mask patterns.needs patterns.spans patterns.cells patterns.fields "
            "patterns.files patterns.sources patterns.heatmap patterns.tables patterns.hub patterns.provenance "
            "common.figures common.files common.documents common.integrity common.errors",
        ),
        ("attention.layers", "attention.padding common.errors"),
        (
            "attention.interface",
            "attention.window attention.choices attention.blends attention.ulysses attention.softmax attention.memo "
            "attention.full attention.kernels.shared attention.kernels.streaming attention.kernels.operator "
            "attention.streaming attention.padding attention.layers attention.parity attention.functions "
            "attention.last_layer common.compat common.documents common.integrity common.errors",
        ),
    ],
)
def test_what_others_build_on_knows_little(name: str, allowed: str) -> None:
    known = {f"duo_id.{module}" for module in allowed.split()}
    assert reached(f"duo_id.{name}") - INITS <= known


@pytest.mark.parametrize("name", MODULES)
def test_no_model_family_is_named(name: str) -> None:
    text = MODULES[name].read_text()
    families = "|".join(FAMILIES.split())
    found = re.findall(rf"(?i)(?<![a-z])(?:{families})(?![a-z])", text.replace("SmolLM2", ""))
    assert not found


@pytest.mark.parametrize("name", MODULES)
def test_modules_are_small_and_say_what_they_are(name: str) -> None:
    text = MODULES[name].read_text()
    assert ast.get_docstring(ast.parse(text))
    assert len(text.splitlines()) <= LONGEST


def leaves(config: object, prefix: str = "") -> set[str]:
    """The dotted keys of all values."""
    if not isinstance(config, dict) or not config:
        return {prefix.rstrip(".")}
    return {leaf for key, value in config.items() for leaf in leaves(value, f"{prefix}{key}.")}


@pytest.mark.parametrize("path", sorted((conf_dir() / "experiment").glob("*.yaml")), ids=lambda path: path.stem)
def test_experiments_hold_overrides_alone(path: Path, tmp_path: Path) -> None:
    text, config = path.read_text(), OmegaConf.to_container(OmegaConf.load(path))
    assert text.startswith("# @package _global_\n# ")
    chosen = []
    for default in config.pop("defaults", []):
        if isinstance(default, str):  # another experiment, which this one adds to
            continue
        ((key, choice),) = default.items()
        assert key.startswith("override /"), f"{path.stem} adds a group"
        chosen.append(f"{key.removeprefix('override /')}={choice}")
    assert "_target_" not in text
    base: list[DictConfig] = []
    run_command("train", *chosen, folder=tmp_path, command=base.append)
    known = leaves(OmegaConf.to_container(base[0]))
    assert leaves(config) - {""} <= known, "an experiment changes values and adds none"


def test_settings_have_no_key_without_a_place_in_conf(tmp_path: Path) -> None:
    """What a user can override is written down in a YAML, where it is found, but for what is rarely needed."""
    base: list[DictConfig] = []
    run_command("train", "model=smollm2-135m", "data/haystack=hub", folder=tmp_path, command=base.append)
    known = OmegaConf.create(OmegaConf.to_container(base[0]) | {"logger": {}})
    known = OmegaConf.create(plain(train_settings(known)))
    rare = {"model.trust_remote_code", "model.config", "data.haystack.path", "logger"}
    assert leaves(OmegaConf.to_container(known)) - rare <= leaves(OmegaConf.to_container(base[0]))
