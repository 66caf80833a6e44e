"""What is remembered of a composition is what Hydra composes."""

from pathlib import Path

import hydra
import pytest
from hydra.errors import HydraException
from omegaconf import OmegaConf

from duo_id.common.config import conf_dir
from tests.support.compositions import remembered_compositions

LINES = (
    ("train", []),
    ("train", ["model=tiny", "seed=3", "sparsity=[0.25,0.5]", "+trainer.min_steps=1"]),
    ("train", ["model=tiny", "seed=4", "~logger"]),
    ("train", ["experiment=clamped", "data.haystack.source=file", "hydra.run.dir=${seed}"]),
    ("train", ["method=search", "+method@method.start=reconstruction", "method.start.samples=2"]),
    ("evaluate", ["evaluation=quick", "heads=a"]),
    ("evaluate", ["evaluation=quick", "heads={a: b}"]),
    ("benchmark", ["preset=paper-3m"]),
)


def composed(command: str, overrides: list[str]) -> str:
    with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return OmegaConf.to_yaml(hydra.compose(command, overrides, return_hydra_config=True))


def test_what_is_remembered_is_what_is_composed() -> None:
    """Twice, in either order, so that nothing that one command changes is there for the next."""
    expected = {number: composed(*line) for number, line in enumerate(LINES)}
    with remembered_compositions():
        for order in (sorted(expected), sorted(expected, reverse=True)):
            for number in order:
                assert composed(*LINES[number]) == expected[number]


@pytest.mark.parametrize(
    "overrides", [["method=nestd"], ["method.lrr=1"], ["seed=[", "model=tiny"], ["~nosuch"]], ids=str
)
def test_mistakes_are_found_each_time(overrides: list[str]) -> None:
    messages = []
    with pytest.raises(HydraException) as raised:
        composed("train", overrides)
    messages.append(str(raised.value))
    with remembered_compositions():
        composed("train", [])
        for _ in range(2):
            with pytest.raises(HydraException) as raised:
                composed("train", overrides)
            messages.append(str(raised.value))
    assert len(set(messages)) == 1


def test_a_file_that_changes_is_read_again(tmp_path: Path) -> None:
    for value in (1, 2):
        (tmp_path / "main.yaml").write_text(f"a: {value}\n")
        with remembered_compositions(), hydra.initialize_config_dir(str(tmp_path), version_base="1.3"):
            assert hydra.compose("main").a == value
