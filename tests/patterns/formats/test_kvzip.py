"""KVzip's scores come back bit for bit; nothing in a file is run."""

import os
import pickle
from pathlib import Path

import pytest
import torch

from duo_id.common.errors import UserError
from duo_id.patterns.formats.kvzip import read_kvzip, write_kvzip
from duo_id.patterns.formats.options import Options
from duo_id.patterns.pattern import HeadPattern
from tests.patterns.formats.cases import CASES

WINDOWS = Options(sink_size=16, recent_size=64)
CONTEXT = 50  # tokens


def kept_heads(path: Path, ratio: float) -> torch.Tensor:
    """KVzip's rule for whole heads, restated: what lies above the score at the place of the ratio stays."""
    scores = torch.load(path).squeeze()[..., None].expand(-1, -1, CONTEXT)
    if ratio >= 1:
        return torch.ones(scores.shape[:2], dtype=torch.bool)
    place = max(int(scores.numel() * ratio) - 1, 0)
    return (scores > scores.flatten().sort(descending=True).values[place]).any(-1)


@pytest.mark.parametrize("given", CASES.values(), ids=CASES)
def test_scores_come_back_bit_for_bit(given: HeadPattern, tmp_path: Path) -> None:
    write_kvzip(given, tmp_path / "scores.pt", Options())
    assert read_kvzip(tmp_path / "scores.pt", WINDOWS).scores.equal(given.scores)
    assert [path.name for path in tmp_path.iterdir()] == ["scores.pt"]


@pytest.mark.parametrize("given", [CASES["random"], CASES["close"]], ids=["random", "close"])
def test_the_ratio_keeps_the_retrieval_heads(given: HeadPattern, tmp_path: Path) -> None:
    for streaming in range(19):
        note = write_kvzip(given, tmp_path / "scores.pt", Options(sparsity=streaming / 18))
        ratio = float(note.split("--ratio ")[1].split(":")[0])
        mask = given.binarize(sparsity=streaming / 18)
        assert kept_heads(tmp_path / "scores.pt", ratio).equal(mask.retrieval)


def test_half_precision_and_axes_of_one_are_read(tmp_path: Path) -> None:
    scores = torch.rand(4, 1, 2, 1).to(torch.bfloat16)
    torch.save(scores, tmp_path / "scores.pt")
    found = read_kvzip(tmp_path / "scores.pt", WINDOWS)
    assert found.scores.equal(scores.view(4, 2).float())
    torch.save(torch.rand(4, 1), tmp_path / "scores.pt")
    assert read_kvzip(tmp_path / "scores.pt", WINDOWS).scores.shape == (4, 1)


class Trap:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def test_nothing_is_run(tmp_path: Path) -> None:
    trap = Trap(tmp_path / "sprung")
    torch.save({"score": torch.rand(2, 2), "trap": trap}, tmp_path / "zip.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(trap, protocol=2))
    for name in ("zip.pt", "plain.pt"):
        refused(tmp_path / name, "found a file that cannot be read")
    assert not trap.path.exists()


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ([torch.rand(2, 2)], "found list"),
        ({"a": torch.rand(2, 2)}, "found dict"),
        (torch.ones(2, 2, dtype=torch.int64), r"found torch\.int64"),
        (torch.rand(2, 2, 2), r"found one of shape \(2, 2, 2\)"),
        (torch.rand(3), r"found one of shape \(3,\)"),
        (torch.tensor([[1, torch.nan]]), "KV head 1 is nan"),
    ],
    ids=["list", "dict", "whole", "cube", "row", "nan"],
)
def test_other_contents_are_named(contents: object, message: str, tmp_path: Path) -> None:
    torch.save(contents, tmp_path / "scores.pt")
    refused(tmp_path / "scores.pt", message)


def test_other_files_are_named(tmp_path: Path) -> None:
    for contents in (b"", b"PK\x03\x04broken", b"text", bytes(100)):
        (tmp_path / "scores.pt").write_bytes(contents)
        refused(tmp_path / "scores.pt", "expected KVzip's scores, .* found a file that cannot be read")


def refused(path: Path, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        read_kvzip(path, WINDOWS)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


UNLIKELY = {
    "sparse": (lambda: torch.eye(3).to_sparse(), r"found one that is torch\.sparse_coo"),
    "compressed": (lambda: torch.eye(3).to_sparse_csr(), r"found one that is torch\.sparse_csr"),
    "huge-sparse": (
        lambda: torch.sparse_coo_tensor(torch.zeros(2, 1, dtype=torch.int64), torch.ones(1), (10**9, 10**9)),
        r"found one that is torch\.sparse_coo",
    ),
    "meta": (lambda: torch.rand(2, 2, device="meta"), "found one that is without values"),
    "nested": (lambda: torch.nested.nested_tensor([torch.rand(2), torch.rand(1)]), "found one that is nested"),
    "jagged": (
        lambda: torch.nested.nested_tensor([torch.rand(2), torch.rand(1)], layout=torch.jagged),
        "found one that is nested",
    ),
    "complex": (lambda: torch.rand(2, 2).to(torch.complex64), r"found torch\.complex64"),
    "bool": (lambda: torch.ones(2, 2, dtype=torch.bool), r"found torch\.bool"),
    "huge-view": (lambda: torch.rand(1).expand(10**9, 10**9), r"found one of shape \(1000000000, 1000000000\)"),
    "many-layers": (lambda: torch.rand(5000, 2), "larger than any model"),
    "infinite": (lambda: torch.full((2, 2), 1e300, dtype=torch.float64), "layer 0, KV head 0 is inf"),
}


@pytest.mark.filterwarnings("ignore")  # torch's own, that such tensors are prototypes
@pytest.mark.parametrize("name", UNLIKELY)
def test_unlikely_tensors_are_named(name: str, tmp_path: Path) -> None:
    make, message = UNLIKELY[name]
    torch.save(make(), tmp_path / "scores.pt")
    refused(tmp_path / "scores.pt", message)


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "scores.pt").touch()
    os.truncate(tmp_path / "scores.pt", 2**30)
    refused(tmp_path / "scores.pt", "found 1,073,741,824 bytes, more than")


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "scores.pt")
    with pytest.raises(UserError, match=r"scores\.pt: expected KVzip's scores, .* found no file"):
        read_kvzip(tmp_path / "scores.pt", Options(sink_size=4, recent_size=60))
