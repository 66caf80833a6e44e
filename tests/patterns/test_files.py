"""What is written is what is read, by us and by DuoAttention's loaders; what cannot be read says why, in one line."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from duo_id.common.errors import UserError
from duo_id.common.integrity import unsealed
from duo_id.patterns import files, sources
from duo_id.patterns.files import contents_of
from duo_id.patterns.needs import SpanNeeds
from duo_id.patterns.pattern import HeadPattern
from duo_id.patterns.saved import load_pattern, pattern_from_json, save_pattern
from duo_id.patterns.sources import list_patterns
from duo_id.patterns.tables import exact_rows

pytestmark = pytest.mark.filterwarnings("ignore::duo_id.patterns.pattern.TieWarning")  # their order is what is tested

PUBLISHED = Path(os.environ.get("DUO_ID_SHARED", Path(__file__).parents[3] / "shared")) / "attn_patterns"
THIRDS = torch.arange(-20, 28).view(6, 4, 2) / 3
NEEDS = SpanNeeds((8, 64, -1), torch.cat([THIRDS, torch.zeros(6, 4, 1)], -1))
NAMES = sorted(folder.name for folder in PUBLISHED.glob("*") if folder.is_dir())


def duo_attention_load(folder: Path) -> tuple[np.ndarray, int, int]:
    """The rule of DuoAttention's loader (github.com/mit-han-lab/duo-attention, `load_attn_pattern`), restated."""
    scores = np.loadtxt(folder / "full_attention_heads.tsv", dtype=float, delimiter="\t")
    config = json.loads((folder / "config.json").read_text())
    return np.clip(scores, 0, 1), config["sink_size"], config["recent_size"]


def bits(scores: torch.Tensor) -> list[list[int]]:
    return scores.view(torch.int32).tolist()


def hard_scores() -> torch.Tensor:
    """Float32 values that lose their last bits when written carelessly."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randint(-(2**31), 2**31 - 1, (4000,), generator=generator, dtype=torch.int64).to(torch.int32)
    values = patterns.view(torch.float32)
    near_one = torch.tensor([1 - 2**-24, 1 + 2**-23, 0.1, 1e-45, -1e-45, 3.4028235e38, -0.0, 1 / 3])
    return torch.cat([values[values.isfinite()][:3512], near_one]).view(-1, 8)


@pytest.fixture
def pattern() -> HeadPattern:
    provenance = {
        "model": {"id": "someone/a model", "revision": "abc", "layers": 6, "kv_heads": 4},
        "method": {"name": "duo", "note": "a [\n 1,  2 ] kept\tas it is, α"},
        "seed": 42,
        "versions": {"torch": "2.13"},
        "git_commit": None,
    }
    scores = torch.rand(6, 4, generator=torch.Generator().manual_seed(1)) - 0.001
    return HeadPattern(scores, 16, 64, (0, 2, 3, 5), provenance)


@pytest.mark.parametrize(
    "scores",
    [
        hard_scores(),
        torch.zeros(3, 4),
        torch.ones(3, 4),
        torch.tensor([[1.0, 1.0, 0.5], [0.5, 1.0, 0.5]]),
        torch.rand(1, 5),
        torch.rand(5, 1),
        torch.rand(1, 1),
    ],
    ids=["hard", "zeros", "ones", "ties", "row", "column", "single"],
)
def test_scores_come_back_bit_for_bit_from_json_and_from_tsv(scores: torch.Tensor, tmp_path: Path) -> None:
    pattern = HeadPattern(scores, 16, 64)
    save_pattern(pattern, tmp_path)
    assert bits(load_pattern(tmp_path).scores) == bits(pattern.scores)
    assert load_pattern(tmp_path) == pattern
    from_tsv = load_pattern(tmp_path / "full_attention_heads.tsv")
    assert bits(from_tsv.scores) == bits(pattern.scores)
    assert from_tsv.binarize(sparsity=0.5) == pattern.binarize(sparsity=0.5)


def test_provenance_and_gated_layers_come_back(pattern: HeadPattern, tmp_path: Path) -> None:
    save_pattern(pattern, tmp_path / "heads")
    for source in (tmp_path, str(tmp_path / "heads"), tmp_path / "heads" / "heads.json"):
        assert load_pattern(source) == pattern
    from_tsv = load_pattern(tmp_path / "heads" / "full_attention_heads.tsv")
    assert from_tsv.gated_layers == pattern.gated_layers
    assert from_tsv.provenance["model"] == {"id": "someone/a model", "layers": 6, "kv_heads": 4}


def test_duo_attention_reads_what_we_write(pattern: HeadPattern, tmp_path: Path) -> None:
    save_pattern(pattern, tmp_path)
    scores, sink_size, recent_size = duo_attention_load(tmp_path)
    assert (sink_size, recent_size) == (16, 64)
    assert np.array_equal(scores.astype(np.float32), pattern.scores.clip(0, 1).numpy())
    assert (scores[[1, 4]] == 1).all()


def test_masks_are_written_for_every_sparsity(pattern: HeadPattern, tmp_path: Path) -> None:
    save_pattern(pattern, tmp_path, (0.5, 0.9))
    save_pattern(pattern, tmp_path, (0.25, 0.625, 0.57, 0.25))
    names = {"mask_sparsity_25.tsv": 0.25, "mask_sparsity_62.5.tsv": 0.625, "mask_sparsity_57.tsv": 0.57}
    assert {path.name for path in tmp_path.iterdir()} == {
        "full_attention_heads.tsv",
        "config.json",
        "heads.json",
        *names,
    }
    saved = {mask["sparsity"]: mask["retrieval"] for mask in json.loads((tmp_path / "heads.json").read_text())["masks"]}
    assert list(saved) == sorted(names.values())
    for name, sparsity in names.items():
        expected = pattern.binarize(sparsity=sparsity).retrieval.int().tolist()
        assert (tmp_path / name).read_text() == "".join("\t".join(map(str, row)) + "\n" for row in expected)
        assert saved[sparsity] == expected


def test_json_holds_the_agreed_fields_one_row_a_line(pattern: HeadPattern, tmp_path: Path) -> None:
    save_pattern(pattern, tmp_path)
    text = (tmp_path / "heads.json").read_text()
    contents = json.loads(text)
    assert (contents["schema"], contents["version"]) == ("duo_id/heads", 2)
    assert (contents["layers"], contents["kv_heads"]) == (6, 4)
    assert contents["gated_layers"] == [0, 2, 3, 5]
    assert contents["provenance"] == pattern.provenance
    assert len(text.splitlines()) < 80


def test_what_is_written_keeps_to_the_schema(pattern: HeadPattern, tmp_path: Path) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads((Path(files.__file__).parent / "heads.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    check = jsonschema.Draft202012Validator(schema)
    save_pattern(pattern, tmp_path)
    contents = json.loads((tmp_path / "heads.json").read_text())
    check.validate(contents)
    check.validate(contents_of(pattern))
    check.validate(contents_of(load_pattern("SmolLM2-135M-Instruct")))
    assert schema["properties"].keys() == contents.keys() | {"needs"}
    assert set(schema["required"]) == contents.keys() - {"masks", "sha256"}
    needs = contents_of(replace(pattern, needs=NEEDS))
    check.validate(needs)
    assert schema["properties"]["needs"]["properties"].keys() == needs["needs"].keys()
    for wrong in ([], [8], [0, -1], [8, 8, -1], [8.5, -1]):
        assert not check.is_valid(needs | {"needs": needs["needs"] | {"levels": wrong}}), wrong
    assert schema["properties"]["version"]["const"] == files.VERSION
    for change in ({"schema": "x"}, {"version": 1}, {"recent_size": 0}, {"scores": [[]]}, {"gated_layers": []}):
        assert not check.is_valid(contents | change)
    for key in schema["required"]:
        assert not check.is_valid({name: value for name, value in contents.items() if name != key})


def test_older_versions_are_brought_up_step_by_step(
    pattern: HeadPattern, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if version 1 had called the scores gates, and version 2 had left out the gated layers."""
    steps = {
        1: lambda old: {**old, "version": 2, "scores": old["gates"]},
        2: lambda old: {**old, "version": 3, "gated_layers": [0, 2, 3, 5]},
    }
    contents = contents_of(pattern)
    first = {**contents, "version": 1, "gates": contents["scores"]}
    del first["scores"], first["gated_layers"]
    monkeypatch.setattr(files, "VERSION", 3)
    monkeypatch.setattr(files, "MIGRATIONS", steps)
    (tmp_path / "heads.json").write_text(json.dumps(first))
    assert load_pattern(tmp_path) == pattern
    monkeypatch.setattr(files, "MIGRATIONS", {2: steps[2]})
    refused(tmp_path, "has version 1 of its schema, but this duo_id reads version 3$")
    (tmp_path / "heads.json").write_text(json.dumps(first | {"version": 4}))
    refused(tmp_path, "has version 4 .* upgrade")


def test_files_of_version_1_are_read(pattern: HeadPattern, tmp_path: Path) -> None:
    shipped = json.loads((sources.SHIPPED / "SmolLM2-135M-Instruct" / "heads.json").read_text())
    assert shipped["version"] == 1
    assert exact_rows(load_pattern("SmolLM2-135M-Instruct").scores) == shipped["scores"]
    first = contents_of(pattern) | {"version": 1}
    (tmp_path / "heads.json").write_text(json.dumps(first))
    assert load_pattern(tmp_path) == pattern
    assert pattern_from_json(first, "here") == pattern


def test_needs_come_back_bit_for_bit(pattern: HeadPattern, tmp_path: Path) -> None:
    measured = replace(pattern, needs=NEEDS)
    save_pattern(measured, tmp_path)
    assert load_pattern(tmp_path) == measured != pattern
    text = (tmp_path / "heads.json").read_text()
    assert "needs" in json.loads(text)
    assert len(text.splitlines()) < 120, "a head a line"
    save_pattern(pattern, tmp_path)
    assert "needs" not in json.loads((tmp_path / "heads.json").read_text())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"levels": [64, 8, -1]}, r"heads.json: levels=\[64, 8, -1\] must be", id="descending"),
        pytest.param({"levels": [8.5, 64, -1]}, r"needs.levels.0=8.5 is no whole number|must be a valid", id="half"),
        pytest.param({"levels": None}, "needs.levels=None is no list", id="no levels"),
        pytest.param({"costs": []}, r"costs must have the shape", id="no costs"),
        pytest.param({"costs": [[[1, 0]]]}, r"costs must have the shape .* 3 levels", id="two levels"),
        pytest.param({"costs": [[[1, 1, 0]], [[1, 0]]]}, "needs.costs: layers differ", id="layers differ"),
        pytest.param({"costs": [[[1, 1, 0], [1, 0]]]}, "needs.costs.0, row 2 has 2 columns", id="heads differ"),
        pytest.param({"costs": [[[1, 1, 0]]]}, "needs are of 1 layers x 1 KV heads, but the scores of 6 x 4", id="few"),
        pytest.param({"costs": [[[1e39, 1, 0]]]}, "at span 8 is inf: it must be finite", id="beyond float32"),
        pytest.param({"costs": [[["x", 1, 0]]]}, r"needs.costs.0.0.0='x' is no number", id="text"),
        pytest.param({"costs": 1}, r"needs.costs=1 is no list", id="a number"),
    ],
)
def test_malformed_needs_are_named(change: dict, message: str, pattern: HeadPattern, tmp_path: Path) -> None:
    contents = contents_of(replace(pattern, needs=NEEDS))
    (tmp_path / "heads.json").write_text(json.dumps(contents | {"needs": contents["needs"] | change}))
    refused(tmp_path, message)


def test_nothing_is_written_for_a_sparsity_out_of_range(pattern: HeadPattern, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"sparsity=1\.5"):
        save_pattern(pattern, tmp_path / "heads", (0.5, 1.5))
    assert not (tmp_path / "heads").exists()


def test_heads_json_is_written_last(pattern: HeadPattern, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that fills up half-way leaves an older export as it was."""
    save_pattern(pattern, tmp_path)
    written: list[str] = []

    def failing(path: Path, text: str) -> None:
        written.append(path.name)
        if path.name == "heads.json":
            raise OSError("disk full")

    monkeypatch.setattr(files, "write_text", failing)
    with pytest.raises(OSError, match="disk full"):
        save_pattern(HeadPattern(torch.rand(6, 4), 1, 1), tmp_path, (0.1,))
    assert written[-1] == "heads.json"
    assert len(written) == 4
    assert (tmp_path / "mask_sparsity_50.tsv").exists()
    assert load_pattern(tmp_path) == pattern


@pytest.mark.parametrize("name", NAMES)
def test_published_patterns_load_and_binarize(name: str, tmp_path: Path) -> None:
    pattern = load_pattern(PUBLISHED / name)
    shape = (32, 32) if name.startswith("Llama-2") else (32, 8)
    assert tuple(pattern.scores.shape) == shape
    assert (pattern.sink_size, pattern.recent_size) == (128, 256)
    assert pattern.provenance["model"]["id"] == f"models/{name}"
    raw = np.loadtxt(PUBLISHED / name / "full_attention_heads.tsv", delimiter="\t")
    assert np.array_equal(pattern.scores.numpy(), raw.astype(np.float32))
    for sparsity in (0.25, 0.5, 0.75):
        assert (~pattern.binarize(sparsity=sparsity).retrieval).sum() == sparsity * raw.size
    save_pattern(pattern, tmp_path)
    ours, theirs = duo_attention_load(tmp_path), duo_attention_load(PUBLISHED / name)
    assert np.array_equal(ours[0].astype(np.float32), theirs[0].astype(np.float32))
    assert ours[1:] == theirs[1:]
    assert load_pattern(tmp_path) == pattern


@pytest.mark.skipif(not NAMES, reason="the published patterns are not here")
def test_published_patterns_are_kept_raw() -> None:
    assert min(load_pattern(PUBLISHED / name).scores.min().item() for name in NAMES) < -0.001


def test_shipped_names(pattern: HeadPattern, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(load_pattern(name).provenance for name in list_patterns())
    monkeypatch.setattr(sources, "SHIPPED", tmp_path / "head_patterns")
    assert list_patterns() == []
    save_pattern(pattern, tmp_path / "head_patterns" / "b")
    save_pattern(HeadPattern(torch.rand(2, 2), 1, 1), tmp_path / "head_patterns" / "a")
    assert list_patterns() == ["a", "b"]
    (tmp_path / "b").mkdir()
    monkeypatch.chdir(tmp_path)
    assert load_pattern("b") == pattern  # though a folder of this name stands here, say of model weights
    with pytest.raises(UserError, match="b has no heads/ yet"):
        load_pattern("./b")
    with pytest.raises(UserError, match=r"no head pattern 'c'.* \(a, b\)"):
        load_pattern("c")


def test_patterns_are_read_from_parsed_contents(pattern: HeadPattern) -> None:
    assert pattern_from_json(contents_of(pattern), "here") == pattern
    assert pattern_from_json(json.loads(json.dumps(contents_of(pattern))), "here") == pattern
    with pytest.raises(UserError, match=r"^here: scores\.0\.1='x' is no number$"):
        pattern_from_json(contents_of(pattern) | {"scores": [[0.5, "x"]]}, "here")


def test_blank_lines_and_other_line_ends_are_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"sink_size": 1, "recent_size": 2}')
    (tmp_path / "full_attention_heads.tsv").write_bytes(b"1e0\t0.5\r\n\r\n0\t1\r\n\n")
    assert load_pattern(tmp_path).scores.tolist() == [[1, 0.5], [0, 1]]


@pytest.mark.parametrize(
    ("tsv", "message"),
    [
        (b"", "line 1: empty"),
        (b"\n \n", "line 1: empty"),
        (b"0.5\t1\n0.5\tx\n", "line 2, column 2: 'x' is not a finite number"),
        (b"0.5 1\n", "line 1, column 1: '0.5 1' is not a finite number"),
        (b"1\t1\t1\n\n1\t1\n", "line 3 has 2 columns, but the first has 3"),
        (b"1\t1\n1\t1\t1\n", "line 2 has 3 columns, but the first has 2"),
        (b"1\t\n", "line 1, column 2: '' is not"),
        (b"1\tnan\n", "line 1, column 2: 'nan' is not"),
        (b"-inf\t1\n", "line 1, column 1: '-inf' is not"),
        (b"1e39\t1\n", "layer 0, KV head 0 is inf"),
        (b"\xff\xfe\x00", "not a text file"),
        (b"1\t1e400\n", "line 1, column 2: '1e400' is not"),
        ("1\t\u0661\n".encode(), "line 1, column 2: '\u0661' is not"),
        (b"1\t1_0\n", "line 1, column 2: '1_0' is not"),
        (b"1\t0x1\n", "line 1, column 2: '0x1' is not"),
        (b"\x00\x01\n", "line 1, column 1: "),
        (b"1\n" * 5000, "larger than any model"),
        (b"1\t" * 2**23 + b"1\n", "bytes, more than"),
    ],
)
def test_malformed_tables_are_named(tsv: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"sink_size": 1, "recent_size": 2}')
    (tmp_path / "full_attention_heads.tsv").write_bytes(tsv)
    refused(tmp_path, message)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "config.json is missing"),
        ('{"sink_size": 1}', "lacks recent_size"),
        ('{"recent_size": 1}', "lacks sink_size"),
        ('{"sink_size": 1,\n "recent_size": }', "config.json, line 2, column 17: not JSON"),
        ("[1, 2]", "expected a JSON object, found list"),
        ('{"sink_size": null, "recent_size": 2}', "config.json: sink_size=None is no whole number"),
        ('{"sink_size": 1, "recent_size": 0}', "recent_size=0 must be"),
        ('{"sink_size": 1, "recent_size": 2, "gated_layers": 3}', "config.json: gated_layers=3 is no list"),
    ],
)
def test_malformed_configs_are_named(config: str | None, message: str, tmp_path: Path) -> None:
    (tmp_path / "full_attention_heads.tsv").write_text("1\t0\n")
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    refused(tmp_path, message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": "other/heads"}, "its schema is 'other/heads', not 'duo_id/heads'"),
        ({"schema": None}, "its schema is None"),
        ({"version": 3}, "has version 3 .* upgrade"),
        ({"version": "x"}, "has version 'x' .* reads version 2$"),
        ({"layers": 5}, "scores are 6 layers x 4 KV heads, but layers and kv_heads say 5 x 4"),
        ({"kv_heads": 8}, "say 6 x 8"),
        ({"scores": [[1, 2], [3]]}, "scores, row 2 has 1 columns, but the first has 2"),
        ({"scores": [[1, None]]}, "scores.0.1=None is no number"),
        ({"scores": [[1, float("nan")]]}, "heads.json: nan is no finite number"),
        ({"scores": []}, "row 1: empty"),
        ({"scores": [[]]}, "row 1: empty"),
        ({"scores": [1, 2]}, "scores.0=1 is no list"),
        ({"scores": 1}, "scores=1 is no list"),
        ({"gated_layers": [0, 6]}, r"gated_layers=\[0, 6\]"),
        ({"gated_layers": None}, "gated_layers=None is no list"),
        ({"provenance": []}, r"provenance=\[\.\.\.\] is no object"),
        ({"recent_size": -3}, "recent_size=-3"),
        ({"recent_size": 10**18}, "recent_size=1000000000000000000 must be less than"),
        ({"layers": 10**9}, "but layers and kv_heads say 1000000000 x 4"),
        ({"scores": [["0.5", 1]]}, r"scores\.0\.0='0\.5' is no number"),
        ({"gated_layers": list(range(10**5))}, r"gated_layers=\[0, 1, 2.{0,60} must name"),
        ({"provenance": {"model": 3}}, r"provenance\.model=3 is no object"),
        ({"provenance": {"model": {"layers": 10**9}}}, r"provenance\.model\.layers=1000000000, but the scores have 6"),
    ],
)
def test_malformed_heads_json_is_named(change: dict, message: str, pattern: HeadPattern, tmp_path: Path) -> None:
    save_pattern(pattern, tmp_path)
    contents = unsealed(json.loads((tmp_path / "heads.json").read_text()))
    (tmp_path / "heads.json").write_text(json.dumps(contents | change))
    refused(tmp_path, message)


def test_missing_fields_of_heads_json_are_named(pattern: HeadPattern, tmp_path: Path) -> None:
    save_pattern(pattern, tmp_path)
    contents = unsealed(json.loads((tmp_path / "heads.json").read_text()))
    del contents["scores"], contents["sink_size"]
    (tmp_path / "heads.json").write_text(json.dumps(contents))
    refused(tmp_path, "lacks sink_size, scores")
    (tmp_path / "heads.json").write_text("{")
    refused(tmp_path, "heads.json, line 1, column 1: not JSON")


def test_folders_and_files_that_hold_no_pattern_are_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    refused(tmp_path, "has no heads/ yet .* when it finishes")
    (tmp_path / "heads").mkdir()
    refused(tmp_path, "has no heads/ yet")
    refused(tmp_path / "heads", "has no heads/ yet")
    refused(tmp_path / "config.json", "its schema is None")
    (tmp_path / "model.safetensors").write_bytes(b"")
    refused(tmp_path / "model.safetensors", "not a head pattern: pass a folder")
    refused(tmp_path / "nowhere", "not a file, a folder or a shipped name")


def refused(source: Path, message: str) -> None:
    """`load_pattern` says `message`, names the place, and does so in one line."""
    with pytest.raises(UserError, match=message) as error:
        load_pattern(source)
    assert str(source) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "stand_in", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to(path.name)], ids=["folder", "pipe", "loop"]
)
def test_what_stands_in_for_a_file_is_named(
    stand_in: Callable[[Path], None], pattern: HeadPattern, tmp_path: Path
) -> None:
    save_pattern(pattern, tmp_path)
    (tmp_path / "heads.json").unlink()
    stand_in(tmp_path / "heads.json")  # and the table beside it is not read in its place
    with pytest.raises(UserError, match=r"heads\.json (is a folder|is no file|cannot be read)"):
        load_pattern(tmp_path)


SHIPPED = {
    "Qwen2.5-Coder-0.5B-Instruct": ((24, 2), (64, 1024), {"full", "found", "streaming"}),
    "Qwen2.5-Coder-1.5B-Instruct": ((28, 2), (64, 1024), {"full", "found", "random"}),
    "SmolLM2-135M-Instruct": ((30, 3), (64, 256), {"full", "found", "random", "streaming"}),
}


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_patterns_come_with_their_evidence(name: str) -> None:
    shape, window, judged = SHIPPED[name]
    assert list_patterns() == list(SHIPPED)
    pattern = load_pattern(name)
    assert tuple(pattern.scores.shape) == shape
    assert (pattern.sink_size, pattern.recent_size) == window
    folder = sources.SHIPPED / name
    for sparsity in (0.25, 0.5, 0.75):
        mask = np.loadtxt(folder / f"mask_sparsity_{100 * sparsity:g}.tsv")
        assert mask.tolist() == pattern.binarize(sparsity=sparsity).retrieval.float().tolist()
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["settings"] == pattern.provenance["settings"]
    assert {row["heads"] for row in summary["results"]} == judged
