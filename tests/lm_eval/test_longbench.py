"""lm-eval's own LongBench tasks, prompts and metrics as they are, on made-up rows in the place of the hub's."""

import json
import logging
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from duo_id.deploy.install import duo_attention
from duo_id.models.loading import byte_tokenizer
from duo_id.patterns.pattern import HeadPattern
from duo_id.patterns.saved import save_pattern

lm_eval = pytest.importorskip("lm_eval")

from lm_eval.tasks import TaskManager  # noqa: E402

import duo_id.lm_eval.__main__  # noqa: E402
from duo_id.lm_eval.model import DuoLM  # noqa: E402

TASKS = Path(lm_eval.__file__).parent / "tasks"
TOKENIZER = byte_tokenizer()  # a token is a byte of text
END = 257
PATTERN = HeadPattern(torch.tensor([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7]]), sink_size=2, recent_size=5)
MASK = PATTERN.binarize(sparsity=0.5)
HUB = {"longbench": "Xnhyacinth/LongBench", "longbench2": "recursal/longbench-v2"}
QUESTION = {"question": "Who built it?", "answers": ["Ada"], "all_classes": ["Place", "Person"], "context": "Ada did."}
STORIES = ["Ada built a mill. " * 9, "Ada built a mill and Eve the barn. " * 3]


@pytest.fixture
def model(make_model: Callable[..., PreTrainedModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A tiny model, which lies in `model` of the working directory, beside a pattern in `heads`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *args, **kwargs: None)
    tokens = {"bos_token_id": 256, "eos_token_id": END, "pad_token_id": END}
    model = make_model("llama", vocab_size=258, max_position_embeddings=2048, **tokens)
    model.save_pretrained("model")
    TOKENIZER.save_pretrained("model")
    save_pattern(PATTERN, Path("heads"))
    return model


def copy_of_the_hub(benchmark: str, name: str, split: str, *rows: dict[str, Any]) -> None:
    """A data set's folder, of the hub's name, as `hf download --local-dir` leaves it in the working directory."""
    shutil.rmtree("cache", ignore_errors=True)  # datasets does not notice that rows have changed
    folder = Path(HUB[benchmark])
    (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / name / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    part = f"[{{split: {split}, path: {name}/rows.jsonl}}]"
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: {name}\n  data_files: {part}\n---\n")


def run(task: str, gen_kwargs: dict[str, Any] | None = None, **arguments: Any) -> list[dict[str, Any]]:
    """What lm-eval logs of each row of a task under the mask."""
    manager = TaskManager(include_path=str(TASKS / task.partition("_")[0]), include_defaults=False)
    masked = DuoLM(heads="heads", pretrained="model", dtype="float32", device="cpu", batch_size=2, **arguments)
    results = lm_eval.simple_evaluate(
        masked, tasks=[task], task_manager=manager, gen_kwargs=gen_kwargs, bootstrap_iters=0
    )
    return sorted(results["samples"][task], key=lambda sample: sample["doc_id"])


def tokens_of(text: str) -> list[int]:
    return list(TOKENIZER(text)["input_ids"])


@torch.no_grad()
def written(model: PreTrainedModel, prompt: list[int], most: int) -> str:
    """Greedy text, every token with a forward of its own over all that precedes it."""
    ids = torch.tensor([prompt])
    with duo_attention(model, MASK):
        while ids.shape[1] < len(prompt) + most and ids[0, -1] != END:
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return TOKENIZER.decode(ids[0, len(prompt) :], skip_special_tokens=True)


def prompts(samples: list[dict[str, Any]]) -> list[str]:
    return [sample["arguments"][0][0] for sample in samples]


def answers(samples: list[dict[str, Any]]) -> list[str]:
    return [sample["filtered_resps"][0] for sample in samples]


@pytest.fixture
def _metrics() -> None:
    for package in ("jieba", "fuzzywuzzy", "rouge"):
        pytest.importorskip(package)


@pytest.mark.usefixtures("_metrics")
@pytest.mark.parametrize(
    ("task", "begin", "end"),
    [
        ("qasper", "You are given a scientific article", "Who built it?\n\nAnswer:"),
        ("vcsum", "下面有一段会议记录", "\n\n会议总结\uff1a"),
    ],
)
def test_prompt_and_metric_are_those_of_lm_eval(model: PreTrainedModel, task: str, begin: str, end: str) -> None:
    rows = [QUESTION | {"context": story} for story in STORIES]
    copy_of_the_hub("longbench", task, "test", *rows)
    samples = run(f"longbench_{task}", {"max_gen_toks": 16})
    for story, prompt in zip(STORIES, prompts(samples), strict=True):
        assert story in prompt
        assert (prompt[: len(begin)], prompt[-len(end) :]) == (begin, end)
    texts = [written(model, tokens_of(prompt), 16) for prompt in prompts(samples)]
    assert answers(samples) == texts
    assert [sample["score"] for sample in samples] == [0, 0]
    copy_of_the_hub("longbench", task, "test", rows[0] | {"answers": ["Ada", texts[0]]}, rows[1])
    assert [sample["score"] for sample in run(f"longbench_{task}", {"max_gen_toks": 16})] == pytest.approx([1, 0])


@pytest.mark.usefixtures("_metrics")
@pytest.mark.parametrize("side", ["left", "middle"])
def test_long_prompts_are_truncated(
    model: PreTrainedModel, side: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.root.manager, "disable", logging.NOTSET)
    for name, logger in logging.root.manager.loggerDict.items():  # whatever an earlier test has done to them
        if isinstance(logger, logging.Logger) and name.startswith(("lm_eval", "duo_id")):
            monkeypatch.setattr(logger, "disabled", False)
            monkeypatch.setattr(logger, "handlers", [caplog.handler])
            monkeypatch.setattr(logger, "propagate", False)
            monkeypatch.setattr(logger, "level", logging.WARNING)
            logger._cache.clear()  # type: ignore[attr-defined]  # of levels that are enabled
    copy_of_the_hub("longbench", "qasper", "test", *(QUESTION | {"context": story} for story in STORIES))
    kept = 500 - 16  # tokens of a prompt, beside what the task may generate
    samples = run("longbench_qasper", {"max_gen_toks": 16}, max_length=500, truncation_side=side)
    ids = [tokens_of(prompt) for prompt in prompts(samples)]
    halves = [x[: kept // 2] + x[-kept // 2 :] for x in ids]
    expected = {"left": [x[-kept:] for x in ids], "middle": halves}[side]
    assert answers(samples) == [written(model, prompt, 16) for prompt in expected]
    warning = {
        "left": f"truncating to last {kept} tokens",
        "middle": f"middle of a prompt of {len(ids[1])} tokens is cut: the model takes {kept}",
    }
    assert warning[side] in caplog.text


@pytest.mark.usefixtures("_metrics")
def test_answers_end_before_what_ends_them(model: PreTrainedModel) -> None:
    copy_of_the_hub("longbench", "trec", "test", *(QUESTION | {"context": story} for story in STORIES))
    samples = run("longbench_trec", {"max_gen_toks": 24})
    assert [sample["arguments"][0][1]["until"] for sample in samples] == [["\n"], ["\n"]]
    texts = [written(model, tokens_of(prompt), 24) for prompt in prompts(samples)]
    assert answers(samples) == [text.partition("\n")[0] for text in texts]
    stop = next(character for character in texts[0][4:] if character.isalnum())
    samples = run("longbench_trec", {"until": [stop], "max_gen_toks": 24})
    assert answers(samples) == [text.partition(stop)[0] for text in texts]


@pytest.mark.parametrize("most", [2048, 300])
@torch.no_grad()
def test_choices_of_version_2_are_those_of_the_masked_model(model: PreTrainedModel, most: int) -> None:
    rows = [{"context": story, "question": "Who?", "choices": list("abcd"), "answer": 1} for story in STORIES]
    copy_of_the_hub("longbench2", "literary", "train", *rows)
    for sample in run("longbench2_lit_single", max_length=most, truncation_side="middle"):
        for (prompt, choice), (likelihood, _) in zip(sample["arguments"], sample["filtered_resps"], strict=True):
            ids, continuation = tokens_of(prompt), tokens_of(choice)[1:]
            room = most + 1 - len(continuation)
            ids = ids if len(ids) <= room else ids[: room // 2] + ids[room // 2 - room :]
            with duo_attention(model, MASK):
                logits = model(torch.tensor([ids + continuation[:-1]]), use_cache=False).logits
            chances = logits[0, len(ids) - 1 :].log_softmax(-1).gather(1, torch.tensor(continuation)[:, None])
            assert float(likelihood) == pytest.approx(float(chances.sum()), abs=1e-4)


def test_a_missing_package_is_one_line(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "lm_eval.tasks.longbench.metrics", raising=False)
    monkeypatch.setitem(sys.modules, "jieba", None)
    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", lambda: run("longbench_qasper"))
    with pytest.raises(SystemExit, match="2"):
        duo_id.lm_eval.__main__.main()
    *_, line = capsys.readouterr().out.splitlines()
    assert line.startswith("error: Please install")
    assert line.endswith("pip install 'duo_id[lm-eval]', or the package that the task needs")


def test_without_the_hub_the_error_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse() -> None:
        raise ConnectionError("Couldn't reach 'Xnhyacinth/LongBench' on the Hub")

    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", refuse)
    with pytest.raises(SystemExit, match="2"):
        duo_id.lm_eval.__main__.main()
    assert "on the Hub: a data set can be read from a local copy, see docs/benchmarks.md" in capsys.readouterr().out
