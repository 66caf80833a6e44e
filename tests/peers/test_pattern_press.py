"""Our press in kvpress itself, in the environment that `duo-id peers` installs."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from duo_id.patterns.pattern import HeadPattern
from duo_id.patterns.saved import save_pattern
from tests.peers.cases import RECENT, SINK, TOKENS, answer_logits, make_items, model_folder

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-peers/bin/python"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON.exists(), reason="duo-id peers RUN install=true creates it"),
]


def test_the_press_hides_what_streaming_heads_forget(tmp_path: Path) -> None:
    """In a model of one layer, where what a head forgets is one mask over the context."""
    model = model_folder(tmp_path / "model", num_hidden_layers=1)
    item = make_items()[0]
    question = item.questions[0]
    pattern = HeadPattern(torch.tensor([[0.9, 0.2]]), SINK, RECENT)
    save_pattern(pattern, tmp_path / "heads")
    save_pattern(HeadPattern(torch.rand(3, 4), SINK, RECENT), tmp_path / "misfit")
    asked = [*question.prompt, *question.answer[:-1]]
    given = [str(tmp_path / "model"), str(tmp_path / "heads"), str(tmp_path / "misfit"), list(item.context), asked]
    command = [PYTHON, Path(__file__).with_name("pattern_press.py"), *map(json.dumps, given)]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    finished = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    told = json.loads(finished.stdout.splitlines()[-1])
    places = torch.arange(TOKENS)
    window = (places < SINK) | (places >= TOKENS - RECENT)
    groups = model.config.num_attention_heads // model.config.num_key_value_heads
    for sparsity in (0.0, 0.5, 1.0):
        retrieval = pattern.binarize(sparsity=sparsity).retrieval
        assert told["streaming"][str(sparsity)] == (~retrieval).tolist()
        mask = (retrieval[0][:, None] | window).repeat_interleave(groups, 0)
        expected = answer_logits(model, item, question, mask)
        found = torch.tensor(told["logits"][str(sparsity)])[-len(expected) :]
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        assert told["ratio"][str(sparsity)] == pytest.approx(sparsity * (1 - (SINK + RECENT) / TOKENS))
    assert "3 layers x 4 KV heads" in told["misfit"]
    assert "1 layers x 2 KV heads" in told["misfit"]
