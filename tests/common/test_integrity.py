"""Bit rot in what is written and read again: it reads as it was, or one line names the file."""

import hashlib
import json
import os
import random
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from pyarrow import parquet
from torch import Tensor

from duo_id.common.errors import UserError
from duo_id.common.files import whole_folder
from duo_id.common.integrity import SEAL, SUMS, check_sums, sealed, sealed_csv
from duo_id.common.mistakes import describe_error
from duo_id.common.record import SETTINGS, keep_settings, read_settings
from duo_id.data.disk import DiskTask, write_dataset
from duo_id.data.samples import Sample
from duo_id.data.settings import DataGenSettings, DataSettings
from duo_id.evaluate.items import Item, Question
from duo_id.evaluate.journal import JOURNAL, RESULTS, Journal, write_results
from duo_id.methods.head_order import HeadOrder
from duo_id.methods.search import SEARCH_FILE, _read_order
from duo_id.models.loading import byte_tokenizer
from duo_id.models.settings import ModelSettings
from duo_id.patterns.files import TABLES
from duo_id.patterns.pattern import HeadPattern
from duo_id.patterns.saved import load_pattern, save_pattern
from duo_id.report.summary import load_results
from duo_id.train.checkpoints import AtomicCheckpointIO
from duo_id.train.history import HISTORY, read_history

PATTERN = HeadPattern(
    torch.linspace(0, 1, 12).view(3, 4), 4, 60, (0, 2), {"model": {"id": "some/model"}, "seconds": 2.5}
)
CHECKPOINT = {
    "pytorch-lightning_version": "2.6.0",
    "epoch": 0,
    "global_step": 7,
    "loops": {},
    "state_dict": {"gates": torch.linspace(-1, 1, 24)},
    "optimizer_states": [{"moments": torch.rand(24), "rate": 1e-2}],
    "lr_schedulers": [{"last_epoch": 7}],
}
RUN = {"model": {"name": "tiny", "rate": 0.02}, "data": {"task": "passkey", "length_max": 800}}
ITEM = Item("t", 100, 0, (1,) * 9, (Question((1,), (2,)),) * 5)


class Kind(NamedTuple):
    """One kind of file: its writer and reader, given its folder, and the files in it that may rot."""

    write: Callable[[Path], object]
    read: Callable[[Path], Any]
    files: str


class Counting:
    """A task whose sample `index` has 64 tokens, all of them the index."""

    def sample(self, index: int, seed: int) -> Sample:
        tokens = torch.full((64,), index)
        return Sample(input_ids=tokens, labels=tokens + 1, answers=tokens + seed)


def rows(kind: str) -> list[dict[str, Any]]:
    columns = {
        "task": "t",
        "length": 100,
        "index": 0,
        "sample": ITEM.digest,
        "kind": kind,
        "heads": kind,
        "sparsity": 0.5,
    }
    columns |= {
        "seed": 3,
        "depth": None,
        "kl": 0.5,
        "tokens": 2,
        "correct": 1,
        "score": None,
        "exact": None,
        "bytes": 9,
    }
    return [
        columns | {"question": question, "text": None, "loss": 1.5 + question, "full_bytes": 18}
        for question in range(5)
    ]


def write_journal(folder: Path) -> None:
    journal = Journal(folder, {"seed": 0})
    for row in rows("baseline"):
        journal.add([row])


def write_samples(folder: Path) -> None:
    settings = DataGenSettings(ModelSettings("tiny", "some/tiny"), DataSettings(), str(folder / "made"), 6, 2, 0, 7)
    write_dataset(settings, byte_tokenizer(), {"train": Counting(), "validation": Counting()})


def read_samples(folder: Path) -> Any:
    tasks = [
        DiskTask(DataSettings(task="disk", path=str(folder / "made")), byte_tokenizer(), split)
        for split in ("train", "validation")
    ]
    return [plain(task.sample(index, 0)) for task in tasks for index in range(len(task))]


def write_history(folder: Path) -> None:
    lines = [f"{step},{step / 8},{step / 9:.5g},0.5\n" for step in range(12)]
    (folder / HISTORY).write_text(sealed_csv("step,0.0,0.1,2.0\n" + "".join(lines)))


def write_search(folder: Path) -> None:
    state = {"shape": [3, 4], "first": [3, 1], "last": [2], "hints": [0.25] * 12, "swaps": 0, "seconds": 9.5}
    (folder / SEARCH_FILE).write_text(json.dumps(sealed(state)))


def write_evaluation(folder: Path) -> None:
    results = {"model": {"name": "m"}, "patterns": {}, "contenders": [], "settings": {}, "versions": {}}
    write_results(folder, results | {"rows": rows("full") + rows("baseline")})


def write_folder(folder: Path) -> None:
    with whole_folder(folder / "weights") as work:
        (work / "model.safetensors").write_bytes(random.Random(0).randbytes(3000))
        (work / "inner").mkdir()
        (work / "inner" / "config.json").write_text("{}")


def read_folder(folder: Path) -> Any:
    check_sums(folder / "weights", "remove it")
    return {
        path.name: path.read_bytes() for path in (folder / "weights").rglob("*") if path.is_file() and path.name != SUMS
    }


def plain(value: Any) -> Any:
    """What can be compared bit for bit."""
    if isinstance(value, Tensor):
        return str(value.dtype), tuple(value.shape), value.numpy().tobytes()
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    return [plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def told(pattern: HeadPattern) -> Any:
    return plain(pattern.scores), pattern.sink_size, pattern.recent_size, pattern.gated_layers, pattern.provenance


KINDS = {
    "checkpoint": Kind(
        lambda folder: AtomicCheckpointIO().save_checkpoint(CHECKPOINT, folder / "last.ckpt"),
        lambda folder: plain(AtomicCheckpointIO().load_checkpoint(folder / "last.ckpt")),
        "last.ckpt",
    ),
    "heads": Kind(
        lambda folder: save_pattern(PATTERN, folder),
        lambda folder: told(load_pattern(folder / "heads.json")),
        "heads.json",
    ),
    "table": Kind(
        lambda folder: save_pattern(PATTERN, folder),
        lambda folder: told(load_pattern(folder / "full_attention_heads.tsv")),
        "[cf]*",
    ),
    "history": Kind(write_history, lambda folder: read_history(folder).to_csv(), HISTORY),
    "search": Kind(
        write_search, lambda folder: plain(asdict(_read_order(folder / SEARCH_FILE, HeadOrder((3, 4)))[0])), SEARCH_FILE
    ),
    "settings": Kind(lambda folder: keep_settings(folder, RUN, {}), read_settings, SETTINGS),
    "journal": Kind(write_journal, lambda folder: Journal(folder, {"seed": 0}).rows, JOURNAL),
    "results": Kind(write_evaluation, load_results, RESULTS),
    "samples": Kind(write_samples, read_samples, "made/*/*.arrow"),
    "folder": Kind(write_folder, read_folder, "weights/**/*"),
}


def flipped(data: bytes, draw: random.Random) -> bytes:
    bit = draw.randrange(8 * len(data))
    return data[: bit // 8] + bytes([data[bit // 8] ^ 1 << bit % 8]) + data[bit // 8 + 1 :]


def zeroed(data: bytes, draw: random.Random) -> bytes:
    start, size = draw.randrange(len(data)), draw.choice([16, 512, 4096])
    return data[:start] + bytes(len(data[start : start + size])) + data[start + size :]


DAMAGES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "flipped": flipped,
    "cut-off": lambda data, draw: data[: draw.randrange(len(data))],
    "zeroed": zeroed,
    "empty": lambda data, draw: b"",
}


def outcome(read: Callable[[Path], Any], folder: Path) -> Any:
    """What is read, or the error."""
    try:
        return read(folder)
    except UserError as error:
        return error


def survey(kind: str, damage: str, trials: int, folder: Path) -> dict[str, int]:
    """How often a damaged file read as it was, and how often it was refused; anything else is a failure."""
    write, read, files = KINDS[kind]
    folder.mkdir(exist_ok=True)
    write(folder)
    originals = {path: path.read_bytes() for path in sorted(folder.glob(files)) if path.is_file()}
    expected, draw, outcomes = read(folder), random.Random(f"{kind} {damage}"), {"equal": 0, "refused": 0}
    for _ in range(trials):
        path = draw.choice(list(originals))
        path.write_bytes(DAMAGES[damage](originals[path], draw))
        got = outcome(read, folder)
        if isinstance(got, UserError):
            names = [SUMS, *(original.name for original in originals)]
            assert any(name in str(got) for name in names), got
            assert "\n" not in str(got)
            outcomes["refused"] += 1
        else:
            # Rows at the end of a journal may be missing: it grows, and they are scored again.
            shorter = kind == "journal" and got == expected[: len(got)]
            assert got == expected or shorter, f"{path.name}, {damage}"
            outcomes["equal"] += 1
        for file, data in originals.items():  # all, since reading a journal repairs it
            file.write_bytes(data)
    return outcomes


@pytest.mark.parametrize(("kind", "damage"), list(product(KINDS, DAMAGES)))
def test_a_damaged_file_reads_as_it_was_or_is_refused(kind: str, damage: str, tmp_path: Path) -> None:
    outcomes = survey(kind, damage, 1 if damage == "empty" else 6, tmp_path)
    assert outcomes["refused"] or kind == "journal", outcomes


def strip_csv(text: str) -> str:
    return "".join(line.rpartition(",")[0] + "\n" for line in text.splitlines())


def strip_json(text: str) -> str:
    return json.dumps({key: value for key, value in json.loads(text).items() if key not in (SEAL, TABLES)})


def strip_lines(text: str) -> str:
    return "".join(strip_json(line) + "\n" for line in text.splitlines())


STRIPS = {HISTORY: strip_csv, JOURNAL: strip_lines}


@pytest.mark.parametrize("kind", KINDS)
def test_what_has_no_checksum_is_read_as_before(kind: str, tmp_path: Path) -> None:
    write, read, files = KINDS[kind]
    write(tmp_path)
    expected = read(tmp_path)
    (tmp_path / "last.ckpt").unlink(missing_ok=True)
    torch.save(CHECKPOINT, tmp_path / "last.ckpt")
    for sums in tmp_path.rglob(SUMS):
        sums.unlink()
    for path in tmp_path.glob(files):
        if path.suffix in (".json", ".jsonl", ".csv"):
            path.write_text(STRIPS.get(path.name, strip_json)(path.read_text()))
            assert SEAL not in path.read_text()
    assert read(tmp_path) == expected


def test_a_layout_is_free_and_an_edit_is_refused_with_the_way_out(tmp_path: Path) -> None:
    save_pattern(PATTERN, tmp_path)
    path = tmp_path / "heads.json"
    contents = dict(reversed(json.loads(path.read_text()).items()))
    path.write_text(json.dumps(contents, indent=3))
    assert told(load_pattern(path)) == told(PATTERN)
    path.write_text(json.dumps(contents | {"sink_size": 5}))
    with pytest.raises(UserError, match=r"heads\.json is not what was written: .* or delete its sha256 if you"):
        load_pattern(path)
    del contents[SEAL]
    path.write_text(json.dumps(contents | {"sink_size": 5}))
    assert load_pattern(path).sink_size == 5


def test_a_table_beside_the_sizes_of_another_is_refused(tmp_path: Path) -> None:
    """As a kill leaves them between the two, or a copy of one of them."""
    save_pattern(PATTERN, tmp_path)
    other = HeadPattern(PATTERN.scores.flip(0), 8, 60)
    save_pattern(other, tmp_path / "other")
    shutil.copy(tmp_path / "other" / "full_attention_heads.tsv", tmp_path)
    with pytest.raises(UserError, match=r"full_attention_heads\.tsv is not what .* from that in config\.json"):
        load_pattern(tmp_path / "full_attention_heads.tsv")
    assert told(load_pattern(tmp_path)) == told(PATTERN), "heads.json is whole by itself"


@pytest.mark.parametrize("name", ["made", "weights"])
def test_the_checksums_of_a_folder_are_those_of_the_usual_tool(name: str, tmp_path: Path) -> None:
    if shutil.which("sha256sum") is None:
        pytest.skip("there is no sha256sum")
    KINDS["samples" if name == "made" else "folder"].write(tmp_path)
    checked = subprocess.run(
        ["sha256sum", "-c", "--strict", SUMS], cwd=tmp_path / name, check=True, capture_output=True, text=True
    )
    files = [path for path in (tmp_path / name).rglob("*") if path.is_file() and path.name != SUMS]
    assert checked.stdout.count(": OK\n") == len(files) >= 2


def test_a_missing_file_is_named_and_paths_out_of_the_folder_are_not_followed(tmp_path: Path) -> None:
    write_folder(tmp_path)
    (tmp_path / "secret").write_text("theirs")
    digest = hashlib.sha256(b"theirs").hexdigest()
    sums = tmp_path / "weights" / SUMS
    original = sums.read_text()
    sums.write_text(original + f"{digest}  ../secret\n")
    with pytest.raises(UserError, match=r"lists '\.\./secret', which is missing; remove it$"):
        check_sums(tmp_path / "weights", "remove it")
    sums.write_text(original)
    (tmp_path / "weights" / "inner" / "config.json").unlink()
    with pytest.raises(UserError, match=r"lists 'inner/config\.json', which is missing; remove it$"):
        check_sums(tmp_path / "weights", "remove it")


def test_a_damaged_row_is_named_and_scored_again_without_it(tmp_path: Path) -> None:
    write_journal(tmp_path)
    path = tmp_path / JOURNAL
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines).replace('"loss": 3.5', '"loss": 3.4'))
    with pytest.raises(UserError, match=r"scores\.jsonl, line 4 .*; delete that line to score it again\)$"):
        Journal(tmp_path, {"seed": 0})
    path.write_text("".join(lines[:3] + lines[4:]))
    assert [row["question"] for row in Journal(tmp_path, {"seed": 0}).rows] == [0, 1, 3, 4]


def test_a_page_of_the_rows_in_parquet_that_rots_is_found(tmp_path: Path) -> None:
    write_evaluation(tmp_path)
    path = tmp_path / "results.parquet"
    data = path.read_bytes()
    offset = data.index(b"baseline")
    path.write_bytes(data[:offset] + b"b4seline" + data[offset + 8 :])
    with pytest.raises(OSError, match="CRC"):
        parquet.read_table(path, page_checksum_verification=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="who is not root cannot become another user")
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_may_not_be_read_is_named(kind: str, tmp_path: Path) -> None:
    write, read, files = KINDS[kind]
    write(tmp_path)
    paths = [path for path in tmp_path.glob(files) if path.is_file()]
    for path in paths:
        path.chmod(0)
    for folder in (tmp_path, *(inner for inner in tmp_path.rglob("*") if inner.is_dir())):
        folder.chmod(0o777)
    message = as_nobody(read, tmp_path)
    assert any(path.name in message for path in paths), message
    assert "Permission denied" in message
    assert "\n" not in message


def as_nobody(read: Callable[[Path], Any], folder: Path) -> str:
    """What a user without rights is told."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        message = "it was read"
        try:
            os.chdir(folder)  # the folders above are root's own
            os.seteuid(65534)
            read(Path())
        except (UserError, OSError) as error:
            message = describe_error(error)
        except BaseException as error:
            message = repr(error)
        finally:
            os.write(writer, message.encode())
            os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    with open(reader, encoding="utf-8") as pipe:
        return pipe.read()


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "damage"), list(product(KINDS, [name for name in DAMAGES if name != "empty"])))
def test_a_thousand_damaged_files_read_as_they_were_or_are_refused(kind: str, damage: str, tmp_path: Path) -> None:
    outcomes = survey(kind, damage, 1000, tmp_path)
    print(f"{kind} {damage}: {outcomes['refused']} refused, {outcomes['equal']} equal")
    assert outcomes["refused"] > 500 or (kind, damage) == ("journal", "cut-off")
