"""The shape of the source: imports point downward, no model family is named, files stay small."""

import ast
import re
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from duo_id.config import conf_dir, plain
from duo_id.methods import train_settings
from tests.commands import run_command

SOURCE = Path(__file__).parents[1] / "src"
LONGEST = 320  # lines of a module

# Each line imports from the lines above it alone, or from its own from left to right.
ORDER = """
errors integrity files documents provenance style compat stopping folders
attention.masks attention.blends attention.exchange attention.softmax attention.memo attention.full
attention.kernels attention.streaming_kernels attention.streaming_operator attention.streaming attention.decode
attention.padding attention.probe attention.parity attention.heads attention.rows attention.gated
gates penalties objectives
budget mistakes schema trainer config foreign record resuming methods
byte_tokens ranks sharding weights wheels
language_model models
data.words data.samples data.haystack data.disk data.drafting data.passkey data.key_value data.copying data.multi_query
data.text data.mixture data.tasks data.module
patterns tables hub formats
interop.options interop.quantile interop.query_heads interop.tensors interop.registry
deploy.tokens deploy.stores deploy.arriving deploy.layer deploy.cache deploy.wrappers deploy.install deploy.chunks
deploy.prefill deploy.memory
scoring recompute graphs distillation compiled memory plan steps
history plots sharing progress checkpoints tracking
training
scores.subject scores.attention scores.needles scores.anatomy scores.profile scores.retrieval scores.query
scores.reconstruction scores.saliency scores.candidates scores.search scores.registry identification
evaluation.items evaluation.contenders evaluation.comparison
evaluation.chat evaluation.metrics
evaluation.tasks.words evaluation.tasks.building evaluation.tasks.needles evaluation.tasks.ruler evaluation.tasks.lookup
evaluation.tasks.language evaluation.tasks.registry
evaluation.published.building evaluation.published.sources evaluation.published.ruler evaluation.published.longbench
evaluation.published.registry
evaluation.settings evaluation.reading evaluation.judging evaluation.journal evaluation.running evaluation.peers
evaluation.bootstrap evaluation.summary evaluation.table evaluation.paired evaluation.leaderboard evaluation.agreement
evaluation.figures evaluation.runs evaluation.sweeps evaluation.sweep_figures evaluation.page evaluation.harness
benchmarks.settings benchmarks.timing benchmarks.ceilings benchmarks.floors benchmarks.baseline benchmarks.contenders
benchmarks.measure benchmarks.results benchmarks.figures benchmarks.profiling benchmarks.train_step
benchmarks.step_results benchmarks.efficiency
app
train evaluate benchmark report convert lm_eval kvpress
"""
LEVELS = {f"duo_id.{name}": place for place, name in enumerate(ORDER.split())}
ENTRY_POINTS = {f"duo_id.{name}" for name in "train evaluate benchmark report convert lm_eval kvpress".split()}
FAMILIES = (
    "llama mistral mixtral qwen gemma phi[0-9]? gpt_?neox gpt-?2 opt falcon bloom stablelm olmo cohere granite smollm "
    "deepseek nemotron starcoder glm pythia mamba"
)


def module_name(path: Path) -> str:
    """`duo_id.data.disk` of its file; a package is the name of its folder."""
    return ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in sorted((SOURCE / "duo_id").rglob("*.py"))}
PACKAGES = {name for name, path in MODULES.items() if path.stem == "__init__"}


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
    assert set(LEVELS) == MODULES.keys() - PACKAGES


@pytest.mark.parametrize("name", LEVELS)
def test_imports_point_downward(name: str) -> None:
    upward = {module for module in imports(name) - PACKAGES if LEVELS[module] >= LEVELS[name]}
    assert not upward, f"{name} stands below {upward}"


def test_packages_import_nothing_eagerly() -> None:
    for name in PACKAGES - {"duo_id"}:
        assert not imports(name), name
    (guard,) = [node for node in ast.parse(MODULES["duo_id"].read_text()).body if isinstance(node, ast.If)]
    assert ast.unparse(guard.test) == "TYPE_CHECKING"


def test_nobody_imports_the_entry_points() -> None:
    for name in MODULES:
        assert not imports(name) & ENTRY_POINTS, name


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        ("errors", ""),
        ("files", "integrity errors"),
        ("style", ""),
        ("patterns", "provenance documents integrity errors"),
        ("formats", "patterns tables hub files provenance documents integrity errors"),
        ("plots", "patterns files provenance documents integrity errors style"),
        ("attention.probe", "attention.padding errors"),
        (
            "attention.gated",
            "attention.masks attention.blends attention.exchange attention.softmax attention.memo attention.full "
            "attention.kernels attention.streaming_kernels attention.streaming_operator attention.streaming "
            "attention.padding attention.probe attention.parity attention.heads attention.rows "
            "compat documents integrity errors",
        ),
    ],
)
def test_what_others_build_on_knows_little(name: str, allowed: str) -> None:
    assert reached(f"duo_id.{name}") <= {f"duo_id.{module}" for module in allowed.split()}


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
