import importlib.util
import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from duo_id import load_pattern
from tests.support.commands import QUICK

ROOT = Path(__file__).parents[1]
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


@pytest.fixture(scope="session")
def wheel_python(archives, tmp_path_factory):
    """The Python of a new environment that holds duo_id's wheel and nothing else.

    Dependencies come from the running environment, which a .pth file puts last on the path. The .pth files
    there have no effect from here, so an editable duo_id stays out of sight.
    """
    folder = tmp_path_factory.mktemp("installed") / "venv"
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    (wheel,) = archives.glob("*.whl")
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-index", "--no-deps", wheel, cwd=folder)
    site_packages = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip()
    Path(site_packages, "dependencies.pth").write_text(sysconfig.get_path("purelib"))
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
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "tests/evaluate/test_metrics.py", "-k", "rouge_l"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode == 0) == (tested == "9.9"), done.stdout
    assert ("transformers==9.8 is to be tested, not 9.9" in done.stdout) == (tested == "9.8")


def closure(name, extras):
    """The canonical names of an installed distribution and of all that it requires here, with these extras."""
    found, todo = set(), [(canonicalize_name(name), frozenset(extras))]
    while todo:
        name, extras = item = todo.pop()
        if item in found:
            continue
        found.add(item)
        for requirement in map(Requirement, metadata.requires(name) or []):
            if requirement.marker is None or any(
                requirement.marker.evaluate({"extra": extra}) for extra in {"", *extras}
            ):
                todo.append((canonicalize_name(requirement.name), frozenset(requirement.extras)))
    return {name for name, _ in found}
