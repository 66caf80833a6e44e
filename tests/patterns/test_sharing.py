"""A pattern goes to a hub and comes back, through huggingface_hub's own client; the card says what it is."""

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import constants

from duo_id import list_patterns, load_pattern
from duo_id.common.errors import UserError
from duo_id.common.integrity import SEAL, unsealed
from duo_id.patterns.needs import SpanNeeds
from duo_id.patterns.pattern import HeadPattern
from duo_id.patterns.saved import save_pattern
from duo_id.patterns.sharing import model_card, push_to_hub, write_folder
from duo_id.patterns.sources import SHIPPED, pattern_name
from tests.patterns.formats.cases import CASES
from tests.support.hub_server import Hub, running_hub

pytestmark = pytest.mark.filterwarnings("ignore::duo_id.patterns.pattern.TieWarning")  # patterns of a few equal scores

NAME = "SmolLM2-135M-Instruct"
FILES = ["README.md", "config.json", "full_attention_heads.tsv", "gates.png", "heads.json"]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with running_hub(monkeypatch, tmp_path / "cache") as found:
        yield found


def test_a_pattern_goes_up_and_comes_down(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    pattern = load_pattern(NAME)
    address = push_to_hub(pattern, "me/heads", run=NAME, sparsities=(0.5,), message="First")
    (commit,) = [name for name, files in hub.repos["me/heads"].items() if files]
    assert address == f"{constants.ENDPOINT}/me/heads/commit/{commit}"
    assert hub.messages == ["First"]
    files = hub.repos["me/heads"][commit]
    assert sorted(files) == sorted([*FILES, "mask_sparsity_50.tsv", "summary.json"])
    assert files["gates.png"].startswith(b"\x89PNG")
    known = json.loads((SHIPPED / NAME / "summary.json").read_text())
    shared = json.loads(files["summary.json"])
    assert unsealed(shared) == {key: known[key] for key in shared if key != SEAL}
    assert set(shared) >= {"model", "results", "versions", SEAL}
    assert "settings" not in shared, "they stand in heads.json"
    assert load_pattern("me/heads") == pattern
    assert set(hub.fetched) == {"heads.json", "full_attention_heads.tsv", "config.json"}
    assert pattern_name("me/heads") == "me/heads"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert load_pattern("me/heads") == pattern  # from the cache


def test_another_push_replaces_the_masks_and_the_old_one_stays_in_reach(hub: Hub) -> None:
    first = push_to_hub(CASES["random"], "me/heads").rsplit("/", 1)[1]
    second = push_to_hub(CASES["ties"], "me/heads", sparsities=(0.9,)).rsplit("/", 1)[1]
    assert [name for name in hub.repos["me/heads"][second] if "mask" in name] == ["mask_sparsity_90.tsv"]
    assert load_pattern("me/heads") == CASES["ties"]
    assert load_pattern(f"me/heads@{first}") == CASES["random"]
    push_to_hub(CASES["hybrid"], "me/heads", revision="other")
    assert load_pattern("me/heads@other") == CASES["hybrid"]
    assert load_pattern("me/heads") == CASES["ties"]


def test_a_folder_here_goes_before_the_hub(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    push_to_hub(CASES["random"], "me/heads")
    write_folder(CASES["ties"], tmp_path / "me" / "heads", "me/heads")
    monkeypatch.chdir(tmp_path)
    assert load_pattern("me/heads") == CASES["ties"]


def test_a_repo_with_a_duo_attention_folder_is_read(hub: Hub) -> None:
    hub.create("lab/published")
    files = {
        "full_attention_heads.tsv": b"1\t0.5\n",
        "config.json": b'{"sink_size": 1, "recent_size": 2}',
        "x.bin": b"",
    }
    hub.put("lab/published", "main", files)
    assert load_pattern("lab/published").scores.tolist() == [[1, 0.5]]
    assert "x.bin" not in hub.fetched


def test_what_the_hub_refuses_is_told(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.create("lab/weights")
    hub.put("lab/weights", "main", {"model.safetensors": b""})
    refused("the hub's repo lab/weights has no head pattern", load_pattern, "lab/weights")
    refused("lab/weights@v9: the hub's repo lab/weights has no such branch", load_pattern, "lab/weights@v9")
    refused("lab/nothing is not a local folder, and not a repo on the hub", load_pattern, "lab/nothing")
    refused("a/b@c is not the name of a repo: .* revision=", push_to_hub, CASES["random"], "a/b@c")
    refused("heads is not the name of a repo: pass user/repo", push_to_hub, CASES["random"], "heads")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    refused("me/heads: .*HF_TOKEN", push_to_hub, CASES["random"], "me/heads")
    assert "me/heads" not in hub.repos


def test_a_hub_that_cannot_be_reached_says_what_to_do(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # and nobody listens
        address = f"http://127.0.0.1:{closed.getsockname()[1]}"
        monkeypatch.setattr(constants, "ENDPOINT", address)
        advice = "the hub cannot be reached .* check the network, HF_ENDPOINT and HF_HUB_OFFLINE, or"
        refused(f"me/heads is not a local folder, and {advice} copy the repo's folder", load_pattern, "me/heads")
        refused(f"me/heads: {advice} upload the heads/ folder", push_to_hub, CASES["random"], "me/heads")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused("me/heads is not a local folder, and the hub cannot be reached", load_pattern, "me/heads")


def refused(message: str, command: object, *arguments: object) -> None:
    with pytest.raises(UserError, match=message) as error:
        command(*arguments)
    assert "\n" not in str(error.value)


def test_the_card_of_the_shipped_pattern(tmp_path: Path) -> None:
    write_folder(load_pattern(NAME), tmp_path, "me/heads", NAME)
    card = (tmp_path / "README.md").read_text()
    _, front, text = card.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "base_model": f"HuggingFaceTB/{NAME}",
        "library_name": "duo_id",
        "tags": ["retrieval-heads", "duo-attention", "kv-cache"],
    }
    assert text.startswith(f"\n# Retrieval heads of {NAME}\n")
    assert "![The scores, and which heads stream at 50% sparsity](gates.png)" in text
    assert "    model.generate(**inputs)\n```" in text
    assert 'duo_id.load_pattern("me/heads").binarize(sparsity=0.5)' in text
    assert "\n| full attention | 0% | 2.054 | 59.5% |\n| found | 25% | 2.050 | 59.6% |\n" in text
    summary = json.loads((SHIPPED / NAME / "summary.json").read_text())
    random = [row["answer_loss"] for row in summary["results"] if (row["heads"], row["sparsity"]) == ("random", 0.5)]
    assert f"| random | 50% | {sum(random) / len(random):.3f} |" in text
    assert "\n| method.blend | student |\n" in text
    assert "\n| method.optimizer.\\_target\\_ | torch.optim.AdamW |\n" in text
    assert "\n| data.task | mixture |\n| data.mixture.passkey | 1.0 |\n" in text
    assert all("\n\n## " in f"\n\n{part}" for part in text.split("\n\n") if part.startswith("## "))
    assert load_pattern(tmp_path) == load_pattern(NAME)


def test_a_card_says_where_there_are_needs() -> None:
    needs = SpanNeeds((8, 64, -1), torch.zeros(3, 2, 3))
    card = model_card(HeadPattern(torch.rand(3, 2), 1, 2, needs=needs), "a/b")
    assert "a single head sees only 8 or 64 tokens" in card
    assert 'load_pattern("a/b").allocate(cache=0.25,' in card
    assert "allocate" not in model_card(HeadPattern(torch.rand(3, 2), 1, 2), "a/b")


def test_the_card_of_a_pattern_without_a_past() -> None:
    card = model_card(HeadPattern(torch.rand(3, 2), 1, 2, (0, 2)), "a/b", sparsity=0.25)
    assert "# Retrieval heads of a model" in card
    assert "Only the layers 0, 2 have scores" in card
    assert "base_model" not in card
    assert "## Results" not in card
    odd = HeadPattern(torch.rand(1, 1), 1, 2, None, {"model": {"id": "/home/x"}, "note": "a | b\n# c", "seed": 3})
    card = model_card(odd, "a/b")
    assert "| note | a \\| b # c |" in card
    assert "huggingface.co" not in card


HOSTILE = "</td><script>`a` *b* __c__ [d](e) ~f~ $g$ | \\| & \u202e\x1b[31m\u2066\n# h"
ESCAPED = "&lt;/td&gt;&lt;script&gt;\\`a\\` \\*b\\* \\_\\_c\\_\\_ \\[d\\](e) \\~f\\~ \\$g\\$ \\| \\\\\\| &amp; "


@pytest.mark.parametrize(
    "provenance",
    [
        {"model": {"name": HOSTILE}},
        {"model": {"id": HOSTILE}},
        {"versions": {"torch": HOSTILE}},
        {"versions": {HOSTILE: "1"}},
        {"note": HOSTILE},
        {HOSTILE: "note"},
        {"settings": {"method": {"name": HOSTILE}}},
        {"settings": {"data": {HOSTILE: 1}}},
    ],
)
def test_what_a_pattern_says_stays_text_in_its_card(provenance: dict[str, Any]) -> None:
    card = model_card(HeadPattern(torch.rand(1, 1), 1, 2, None, provenance), "a/b")
    assert ESCAPED in card
    assert card.isascii() or all(letter.isprintable() or letter == "\n" for letter in card)
    assert "<script" not in card
    assert "\n# h" not in card


def test_no_more_of_a_summary_is_published_than_its_schema_knows(tmp_path: Path) -> None:
    rows = [{"heads": "full", "sparsity": 0.0, "answer_loss": 1.0, "token": "SECRET"}]
    told = {"auths": {"x": "SECRET"}, "results": rows, "settings": {"model": "SECRET"}, "model": {"password": "SECRET"}}
    (tmp_path / "summary.json").write_text(json.dumps(told))
    write_folder(CASES["random"], tmp_path / "made", "a/b", tmp_path)
    published = (tmp_path / "made" / "summary.json").read_text()
    assert "SECRET" not in published
    assert unsealed(json.loads(published)) == {
        "results": [{"heads": "full", "sparsity": 0.0, "answer_loss": 1.0}],
        "model": {},
    }


def test_a_summary_that_is_a_link_is_not_published(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "elsewhere.json").write_text("{}")
    (tmp_path / "run" / "summary.json").symlink_to(tmp_path / "elsewhere.json")
    refused(r"run/summary\.json is a symbolic link", write_folder, CASES["random"], tmp_path, "a/b", tmp_path / "run")


def test_evidence_that_is_none_is_named(tmp_path: Path) -> None:
    refused(r"run=.*: there is no .*summary\.json", write_folder, CASES["random"], tmp_path, "a/b", tmp_path / "run")
    refused("leaves no mask", write_folder, CASES["random"], tmp_path, "a/b", None, ())
    refused("sparsity=2", write_folder, CASES["random"], tmp_path, "a/b", None, (2,))
    assert not list(tmp_path.iterdir())
    (tmp_path / "summary.json").write_text('{"results": [3]}')
    refused(r"summary.json: results\.0=3 is no object", write_folder, CASES["random"], tmp_path, "a/b", tmp_path)


def test_every_shipped_pattern_carries_its_evidence() -> None:
    for name in list_patterns():
        summary = json.loads((SHIPPED / name / "summary.json").read_text())
        judged = {row["heads"] for row in summary["results"]}
        assert {"full", "found"} <= judged
        assert judged & {"random", "streaming"}, "what the heads are compared with"
        assert summary["settings"] == load_pattern(name).provenance["settings"]


def test_a_run_is_shared_as_it_lies(hub: Hub, tmp_path: Path) -> None:
    save_pattern(CASES["random"], tmp_path / "heads")
    (tmp_path / "summary.json").write_text(json.dumps({"results": []}))
    push_to_hub(load_pattern(tmp_path), "me/run", run=tmp_path)
    assert load_pattern("me/run") == CASES["random"]


def test_what_is_no_pattern_or_repo_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^pattern: a str is not a HeadPattern$"):
        push_to_hub("x", "me/heads")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"^5 is not the name of a repo"):
        push_to_hub(CASES["random"], 5)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"^sparsities=0\.5 must be a list"):
        write_folder(CASES["random"], tmp_path, "me/heads", sparsities=0.5)  # type: ignore[arg-type]
