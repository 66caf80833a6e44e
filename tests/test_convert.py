"""The command: any format into any other, nothing lost in silence."""

import json
from pathlib import Path
from typing import get_args

import pytest

from duo_id import convert
from duo_id.common.documents import read_object
from duo_id.common.errors import UserError
from duo_id.patterns.files import TABLES
from duo_id.patterns.formats.options import Options
from duo_id.patterns.formats.registry import FORMATS, lost_parts
from duo_id.patterns.pattern import HeadPattern
from duo_id.patterns.saved import load_pattern, save_pattern
from duo_id.patterns.sources import SCORES
from tests.patterns.formats.cases import CASES, all_masks

pytestmark = pytest.mark.filterwarnings("ignore::duo_id.patterns.pattern.TieWarning")  # their order is what is tested

SUFFIXES = {"prulong": ".tsv", "retrieval-head": ".json", "headkv": ".json", "qrhead": ".yaml", "kvzip": ".pt"}
BACK = ["layers=6", "kv_heads=3", "sink_size=16", "recent_size=64"]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    save_pattern(CASES["trained"], tmp_path / "run" / "heads")
    return tmp_path / "run"


def refused(message: str, *arguments: object) -> None:
    with pytest.raises(UserError, match=message) as error:
        convert.main(list(map(str, arguments)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", sorted({*FORMATS} - {"permuted-checkpoint"}))  # it needs a model's weights
@pytest.mark.parametrize("given", CASES.values(), ids=CASES)
def test_there_and_back(name: str, given: HeadPattern, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if name == "headkv" and not given.scores.any():
        pytest.skip("HeadKV cannot read it, which tests/interop holds")
    save_pattern(given, tmp_path / "heads")
    target = tmp_path / f"theirs{SUFFIXES.get(name, '')}"
    asked = [f"format={name}"] + (["sparsity=0.4"] if name == "qrhead" else [])
    if name in SUFFIXES:
        refused(f"format={name} cannot hold provenance, windows .*lossy=true", tmp_path / "heads", target, *asked)
        assert not target.exists()
    convert.main([str(tmp_path / "heads"), str(target), *asked, "lossy=true"])
    assert ("lost: provenance, windows (sink_size=16, recent_size=64)" in capsys.readouterr().out) == (name in SUFFIXES)
    heads = ["heads=6"] if name == "qrhead" else []
    convert.main([str(target), str(tmp_path / "back"), *BACK, *heads])
    back = load_pattern(tmp_path / "back")
    if name not in SUFFIXES:
        assert back == given
        return
    assert (back.sink_size, back.recent_size) == (16, 64)
    if name == "qrhead":
        assert (back.scores > 0).equal(given.binarize(sparsity=0.4).retrieval)
    elif name == "headkv":
        assert back.scores.equal(given.scores.clamp(min=0))
    elif given.gated_layers == back.gated_layers:
        assert all_masks(back) == all_masks(given)
        assert name == "prulong" or back.scores.equal(given.scores)
    else:
        assert name == "prulong" or back.scores.equal(given.scores)


def test_the_command_takes_the_formats_that_there_are() -> None:
    assert get_args(convert.Format) == tuple(FORMATS)


def test_what_is_lost_is_told_exactly() -> None:
    options = Options()
    masked = Options(sparsity=0.4)
    kept = ["provenance", "windows (sink_size=16, recent_size=64)"]
    assert lost_parts(CASES["random"], "duo-attention", masked) == []
    assert lost_parts(CASES["random"], "retrieval-head", options) == kept
    assert lost_parts(CASES["random"], "prulong", options) == [*kept, "scores (their order remains)"]
    assert lost_parts(CASES["random"], "prulong", masked) == [*kept, "scores (a mask remains)"]
    assert lost_parts(CASES["ones"], "prulong", Options(sparsity=0)) == kept
    assert lost_parts(CASES["random"], "qrhead", masked) == [*kept, "scores (a mask remains)"]
    assert lost_parts(CASES["trained"], "headkv", options) == [*kept, "negative scores (they become 0)"]
    assert lost_parts(CASES["hybrid"], "kvzip", options) == [*kept, "which layers have gates"]


def test_the_sparsity_to_pass_is_printed(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = convert.main([str(source), str(tmp_path / "duo"), "format=duo-attention", "sparsity=0.5"])
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    assert "sparsify_attention_heads(heads, sparsity=0.5): exactly 9 of 18 heads stream" in printed
    config = read_object(target / "config.json")
    assert config.pop(TABLES).keys() == {SCORES}
    assert config == {"model_name": "someone/a-model", "sink_size": 16, "recent_size": 64, "gated_layers": [*range(6)]}


def test_a_shipped_pattern_is_converted(tmp_path: Path) -> None:
    convert.main(["SmolLM2-135M-Instruct", str(tmp_path / "a.json"), "format=retrieval-head", "lossy=true"])
    cells = json.loads((tmp_path / "a.json").read_text())
    best = divmod(int(load_pattern("SmolLM2-135M-Instruct").scores.argmax()), 3)  # first, with its three query heads
    assert set(list(cells)[:3]) == {f"{best[0]}-{3 * best[1] + head}" for head in range(3)}
    scores = [score for (score, *_) in cells.values()]
    assert scores == sorted(scores, reverse=True)
    assert len(cells) == 30 * 9


def test_a_table_beside_its_config_needs_no_more(source: Path, tmp_path: Path) -> None:
    convert.main([str(source / "heads" / "full_attention_heads.tsv"), str(tmp_path / "back")])
    assert load_pattern(tmp_path / "back").scores.equal(CASES["trained"].scores)


def test_mistakes_are_named(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    refused("Missing argument 'DST'; see --help for examples", source)
    refused(r"unexpected extra argument\(s\) \(.*/out\); see --help", source, target, target)
    refused("SRC and DST must not be empty", source, "")
    refused("^sink_size=99999999999 must be at most 16777216$", source, target, "sink_size=99999999999")
    refused("format=b: format is given twice", source, target, "format=a", "format=b")
    refused("--lossy: there are no options, give settings as KEY=VALUE", source, target, "--lossy")
    refused("^format=onnx: choose one of heads, duo-attention, ", source, target, "format=onnx")
    refused(r"No such option: fromat \(Possible options: format\)", source, target, "fromat=rlkv")
    refused("^lossy=yes: choose one of true, false$", source, target, "lossy=yes")
    refused("^sparsity=a must be a number$", source, target, "sparsity=a")
    refused("^sparsity=2 must be at most 1$", source, target, "sparsity=2")
    refused("^sparsity=nan must be at most 1$", source, target, "sparsity=nan")
    refused("^heads=1.5 must be a whole number$", source, target, "heads=1.5")
    refused("^heads=-1 must be at least 0$", source, target, "heads=-1")
    refused("kv_heads=4 contradicts .* which has 3", source, target, "kv_heads=4")
    refused("sink_size=0 contradicts .* which has 16", source, target, "sink_size=0")
    refused("run/heads is in the way", source / "heads", source / "heads", "format=lserve")
    refused("run is in the way: format=kvzip writes a new file", source / "heads", source, "format=kvzip", "lossy=true")
    (tmp_path / "model.bin").write_bytes(b"")
    refused(r"model\.bin has no known format: expected a folder with heads\.json", tmp_path / "model.bin", target)
    refused("no head pattern", tmp_path / "nowhere", target)
    refused("heads=5.*|5 query heads do not share 3", source, target, "format=retrieval-head", "heads=5", "lossy=true")
    assert not target.exists()


def test_a_pattern_that_does_not_fit_a_model_names_both_shapes() -> None:
    with pytest.raises(UserError, match="for 6 layers x 3 KV heads, but b has 32 layers x 8 KV heads"):
        CASES["random"].check_fits(32, 8, "b")


def test_paths_may_hold_an_equals_sign(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As all folders that DuoAttention publishes do: known by being there, or by a slash before it."""
    monkeypatch.chdir(source.parent)
    (source / "heads").rename("lr=0.02-reg=0.05")
    assert convert.main(["lr=0.02-reg=0.05", "./ctx=1000_32000", "sparsity=0.5"]) == Path("ctx=1000_32000")
    assert convert.main(["./ctx=1000_32000", "deep/er=1", "format=rlkv"]) == Path("deep/er=1")
    refused(
        "No such option: ctx; see --help for examples, and write a path that contains = as ./NAME",
        "lr=0.02-reg=0.05",
        "ctx=2",
    )
    refused("nosuch/lr=0.1", "nosuch/lr=0.1", "there")
