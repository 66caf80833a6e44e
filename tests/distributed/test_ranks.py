"""Which numbers of processes can share a step, and what is said of those that cannot."""

import pytest
import torch

from duo_id.common.errors import UserError
from duo_id.distributed.launch import check_ranks
from duo_id.distributed.ranks import Ranks
from duo_id.train.settings import TrainSettings
from tests.support.commands import QUICK, run_command, settings_of


def test_neighbours_share_tokens_and_groups_share_samples() -> None:
    places = [Ranks(2, 3, rank) for rank in range(6)]
    assert [place.data_rank for place in places] == [0, 0, 0, 1, 1, 1]
    assert [place.part for place in places] == [0, 1, 2, 0, 1, 2]
    assert [place.first for place in places] == [True, *[False] * 5]


def test_the_longest_part_of_a_sample_and_the_most_samples_count() -> None:
    assert Ranks(2, 3).tokens(31, 3) == 11 * 2
    assert Ranks().tokens(31, 3) == 93


def test_one_process_asks_nobody() -> None:
    value = torch.tensor(2.0)
    assert Ranks().mean(value) is value
    assert Ranks().group_sum(value) is value
    assert Ranks().broadcast("folder") == "folder"
    assert Ranks().reduce_max(1.5, 2, device=torch.device("cpu")) == [1.5, 2]
    with pytest.raises(RuntimeError, match="gloo"), Ranks().one_line_errors():
        raise RuntimeError("gloo: of no other process")


def test_a_lost_process_is_a_connection_error() -> None:
    with pytest.raises(ConnectionError, match="another process"), Ranks(data=2).one_line_errors():
        raise RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer")
    with pytest.raises(RuntimeError, match="other"), Ranks(data=2).one_line_errors():
        raise RuntimeError("something other")


def test_memory_that_does_not_suffice_is_one_line() -> None:
    with (
        pytest.raises(UserError, match=r"^process 1 of 2 ran out of device memory"),
        Ranks(2, rank=1).one_line_errors(),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(UserError, match=r"^the device ran out of memory: lower data"), Ranks().one_line_errors():
        raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize(("world", "sequence", "batch"), [(1, 1, 1), (4, 4, 1), (4, 2, 2), (4, 1, 8), (6, 3, 4)])
def test_numbers_that_work(world: int, sequence: int, batch: int) -> None:
    check_ranks(world, sequence, batch)


@pytest.mark.parametrize(
    ("world", "sequence", "batch", "message"),
    [
        (4, 3, 1, r"step.sequence_parallel=3 does not divide the 4 processes .* step.sequence_parallel=2"),
        (2, 4, 1, r"step.sequence_parallel=4 does not divide the 2 processes .* step.sequence_parallel=2"),
        (4, 1, 1, r"data.batch_size=1, .* 4 groups .* data.batch_size=4 and step.sequence_parallel=4"),
        (4, 1, 6, r"data.batch_size=6, .* 4 groups .* data.batch_size=8 and step.sequence_parallel=2"),
    ],
)
def test_numbers_that_cannot_work_name_the_nearest(world: int, sequence: int, batch: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_ranks(world, sequence, batch)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["step.sequence_parallel=2"], "step.sequence_parallel=2 does not divide the 1 processes"),
        (["trainer.devices=2"], "data.batch_size=1, the samples of a step, is not divisible by 2 groups"),
        (["trainer.devices=0"], "trainer.devices=0"),
        (
            ["trainer.devices=2", "data.batch_size=2", "+trainer.strategy=fsdp"],
            "trainer.strategy=fsdp: only auto works",
        ),
        (["step.sequence_parallel=0"], "step.sequence_parallel=0 must be at least 1"),
    ],
)
def test_the_command_refuses_them_in_one_line(overrides: list[str], message: str, tmp_path) -> None:  # type: ignore[no-untyped-def]
    assert message in run_command("train", *QUICK, *overrides, folder=tmp_path).error


def test_a_launcher_gets_the_same_settings(tmp_path) -> None:  # type: ignore[no-untyped-def]
    overrides = ["trainer.devices=8", "+trainer.num_nodes=2", "step.sequence_parallel=4", "data.batch_size=4"]
    settings = settings_of("train", TrainSettings, *QUICK, *overrides, folder=tmp_path)
    assert (settings.step.sequence_parallel, settings.step.shard) == (4, True)
