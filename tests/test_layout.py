"""The shape of the source: imports point downward, no model family is named, files stay small."""

import ast
import re
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from duo_id.common.config import plain
from duo_id.methods.settings import train_settings
from duo_id.train.settings import conf_dir
from tests.support.commands import run_command

SOURCE = Path(__file__).parents[1] / "src"
LONGEST = 320  # lines of a module

# Each line imports from the lines above it alone, or from its own from left to right.
ORDER = """
common.errors common.integrity common.files common.documents patterns.provenance common.figures common.compat
common.stopping common.folders attention.window attention.blends attention.ulysses attention.softmax attention.memo
attention.full attention.kernels.cached attention.kernels.streaming attention.kernels.operator attention.streaming
attention.decode attention.padding attention.layers attention.parity attention.functions attention.last_layer
attention.interface methods.gates methods.penalties step.objectives step.budget common.mistakes common.config
train.trainer train.settings common.foreign common.record common.resuming methods.settings models.tokenizers
distributed.ranks distributed.sharding models.weights models.wheels models.language_model models.loading data.words
data.samples data.haystack data.disk data.synthetic data.passkey data.key_value data.copying data.multi_query
data.text data.mixture data.registry data.datamodule patterns.pattern patterns.tables patterns.hub patterns.files
patterns.formats.options patterns.formats.quantile_tables patterns.formats.query_heads patterns.formats.kvzip
patterns.formats.registry deploy.counts deploy.stores deploy.arriving deploy.layer deploy.cache deploy.wrappers
deploy.install deploy.chunks deploy.prefill deploy.cache_memory train.scoring step.recompute step.cuda_graphs
step.distillation step.compiled step.memory step.devices step.prepare train.history patterns.plots patterns.sharing
train.progress train.checkpoints train.tracking train.gate_training methods.gated_model methods.attention_weights
methods.needles methods.anatomy methods.attention_profile methods.retrieval_score methods.query_score
methods.reconstruction methods.saliency methods.candidates methods.search methods.registry train.identify
evaluate.items evaluate.contenders train.comparison evaluate.chat evaluate.metrics evaluate.tasks.words
evaluate.tasks.building evaluate.tasks.needles evaluate.tasks.ruler evaluate.tasks.lookup evaluate.tasks.language
evaluate.tasks.registry evaluate.published.building evaluate.published.sources evaluate.published.ruler
evaluate.published.longbench evaluate.published.registry evaluate.settings evaluate.reading evaluate.judging
evaluate.journal evaluate.runner evaluate.peers report.bootstrap report.summary report.tables report.paired
report.leaderboard patterns.agreement report.figures report.runs report.sweeps report.sweep_figures report.page
lm_eval.model benchmark.settings benchmark.timing benchmark.ceilings benchmark.roofline benchmark.static_attention
benchmark.contenders benchmark.caches benchmark.tables benchmark.figures benchmark.profiling benchmark.train_step
benchmark.step_tables benchmark.efficiency common.cli
train.run evaluate.run benchmark.run
train.__main__ evaluate.__main__ benchmark.__main__ report.__main__ lm_eval.__main__ convert kvpress
"""
LEVELS = {f"duo_id.{name}": place for place, name in enumerate(ORDER.split())}
ENTRY_POINTS = {name for name in LEVELS if name.endswith("__main__")} | {"duo_id.convert", "duo_id.kvpress"}
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
        ("common.errors", ""),
        ("common.files", "common.integrity common.errors"),
        ("common.figures", ""),
        ("patterns.pattern", "patterns.provenance common.documents common.integrity common.errors"),
        (
            "patterns.files",
            "patterns.pattern patterns.tables patterns.hub common.files patterns.provenance common.documents common.integrity common.errors",
        ),
        (
            "patterns.plots",
            "patterns.pattern common.files patterns.provenance common.documents common.integrity common.errors common.figures",
        ),
        ("attention.layers", "attention.padding common.errors"),
        (
            "attention.interface",
            "attention.window attention.blends attention.ulysses attention.softmax attention.memo attention.full "
            "attention.kernels.cached attention.kernels.streaming attention.kernels.operator attention.streaming "
            "attention.padding attention.layers attention.parity attention.functions attention.last_layer "
            "common.compat common.documents common.integrity common.errors",
        ),
    ],
)
def test_what_others_build_on_knows_little(name: str, allowed: str) -> None:
    known = {f"duo_id.{module}" for module in allowed.split()}
    assert reached(f"duo_id.{name}") - PACKAGES <= known


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
