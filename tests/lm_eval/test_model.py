import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from duo_id.common.errors import UserError
from duo_id.deploy.install import dual_cache, duo_attention
from duo_id.models.loading import byte_tokenizer
from duo_id.patterns.pattern import HeadMask, HeadPattern
from duo_id.patterns.saved import save_pattern
from tests.deploy.cases import short_groups

lm_eval = pytest.importorskip("lm_eval")

from lm_eval.api.registry import get_model  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

import duo_id.lm_eval.__main__  # noqa: E402
from duo_id.lm_eval.model import DuoLM, register  # noqa: E402

TOKENIZER = byte_tokenizer()
DOCUMENTS = [  # of different lengths, so that every batch is padded
    {"text": "Red is a colour, and so is blue. The sky is", "choices": [" blue", " seven tall trees"], "right": 0},
    {"text": "One, two, three, four, five, six and then comes", "choices": [" a", " seven"], "right": 1},
    {"text": "Short", "choices": [" story", " cut"], "right": 0},
]
SHARED = (
    "dataset_path: json\ndataset_kwargs: {{data_files: {{test: {file}}}}}\ntest_split: test\n"
    "doc_to_text: '{{{{text}}}}'\n"
)
CHOICES = (
    "task: choices\noutput_type: multiple_choice\ndoc_to_choice: choices\ndoc_to_target: right\ntarget_delimiter: ''\n"
)
WRITING = (
    "task: writing\noutput_type: generate_until\ndoc_to_target: '{{choices[right]}}'\n"
    'generation_kwargs: {until: ["\\n\\n"], max_gen_toks: 12}\n'
)


@pytest.fixture(scope="module")
def pattern() -> HeadPattern:
    """Half of the heads of a tiny model stream, over windows far shorter than the documents."""
    scores = torch.tensor([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7]])
    return HeadPattern(scores, sink_size=2, recent_size=5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, pattern: HeadPattern) -> Path:
    """Tasks, their data and a pattern."""
    folder = tmp_path_factory.mktemp("harness")
    (folder / "tasks").mkdir()
    (folder / "data.jsonl").write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))
    for name, text in (("choices", CHOICES), ("writing", WRITING)):
        (folder / "tasks" / f"{name}.yaml").write_text(text + SHARED.format(file=folder / "data.jsonl"))
    save_pattern(pattern, folder / "heads")
    return folder


@pytest.fixture(autouse=True)
def _no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval asks the hub for a model's commit, and where there is no network, waits."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise ConnectionError

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", refuse)


@pytest.fixture
def saved(make_model: Callable[..., PreTrainedModel], tmp_path: Path) -> tuple[PreTrainedModel, Path]:
    """A tiny model with strong attention, and where it lies."""
    model = make_model("llama", vocab_size=258, bos_token_id=256, eos_token_id=257, pad_token_id=257)
    model.save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    return model, tmp_path / "model"


def samples(model: Any, folder: Path, task: str, **arguments: Any) -> list[dict[str, Any]]:
    """What lm-eval logs of each document."""
    results = lm_eval.simple_evaluate(
        model=model,
        model_args=arguments or None,
        tasks=[task],
        task_manager=TaskManager(include_path=str(folder / "tasks"), include_defaults=False),
        batch_size=3,
        device="cpu",
        bootstrap_iters=0,
    )
    return sorted(results["samples"][task], key=lambda sample: sample["doc_id"])


@torch.no_grad()
def by_hand(model: PreTrainedModel, mask: HeadMask, text: str, choice: str, kv: str = "exact") -> float:
    """Log-likelihood of `choice` after `text`, of the model under the mask, alone; with codes token by token."""
    context, answer = TOKENIZER(text)["input_ids"], TOKENIZER(choice, add_special_tokens=False)["input_ids"]
    ids = torch.tensor([context + answer])[:, :-1]
    with duo_attention(model, mask, kv=kv):
        cache = None if kv == "exact" else dual_cache(model)
        parts = [ids] if cache is None else ids.split(1, 1)
        options = {"use_cache": cache is not None, "past_key_values": cache}
        chances = torch.cat([model(part, **options).logits for part in parts], 1).log_softmax(-1)[0, len(context) - 1 :]
    return float(chances.gather(1, torch.tensor(answer)[:, None]).sum())


@torch.no_grad()
def written_by_hand(model: PreTrainedModel, mask: HeadMask, text: str) -> str:
    """Greedy text, every token with a forward of its own over all that precedes it."""
    ids: Tensor = torch.tensor([TOKENIZER(text)["input_ids"]])
    start = ids.shape[1]
    with duo_attention(model, mask):
        for _ in range(12):
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    tokens = ids[0, start:].tolist()
    end = tokens.index(257) if 257 in tokens else len(tokens)
    return TOKENIZER.decode(tokens[:end], skip_special_tokens=True).partition("\n\n")[0]


def likelihoods(logged: list[dict[str, Any]]) -> list[float]:
    return [float(answer[0]) for sample in logged for answer in sample["filtered_resps"]]


def texts(logged: list[dict[str, Any]]) -> list[str]:
    return [sample["filtered_resps"][0] for sample in logged]


def test_likelihoods_are_those_of_the_masked_model(
    folder: Path, saved: tuple[PreTrainedModel, Path], pattern: HeadPattern
) -> None:
    model, path = saved
    register()
    logged = samples(
        "duo_id", folder, "choices", heads=str(folder), sparsity=0.5, pretrained=str(path), dtype="float32"
    )
    masks = [pattern.binarize(sparsity=sparsity) for sparsity in (0.5, 0)]
    masked, full = (
        [by_hand(model, mask, document["text"], choice) for document in DOCUMENTS for choice in document["choices"]]
        for mask in masks
    )
    assert likelihoods(logged) == pytest.approx(masked, abs=1e-4)
    assert likelihoods(logged)[0] != pytest.approx(full[0], abs=1e-2), "the mask changes nothing here"


@pytest.mark.parametrize("kv", ["int8", "int4"])
def test_likelihoods_with_codes_are_those_of_decoding(
    kv: str, folder: Path, saved: tuple[PreTrainedModel, Path], pattern: HeadPattern, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request that is read at once would see no codes."""
    short_groups(monkeypatch)
    model, path = saved
    given = {"heads": str(folder), "sparsity": 0.5, "pretrained": str(path), "dtype": "float32", "device": "cpu"}
    coded = DuoLM(**given, batch_size=3, kv=kv)
    assert coded.get_model_info()["kv"] == kv
    logged, mask = likelihoods(samples(coded, folder, "choices")), pattern.binarize(sparsity=0.5)
    pairs = [(document["text"], choice) for document in DOCUMENTS for choice in document["choices"]]
    assert logged == pytest.approx([by_hand(model, mask, *pair, kv) for pair in pairs], abs=1e-4)
    if kv != "int8":
        exact = [by_hand(model, mask, *pair) for pair in pairs]
        assert max(abs(x - y) for x, y in zip(logged, exact, strict=True)) > 1e-3, "codes change nothing here"


def test_generated_text_with_codes_is_that_of_generate(
    folder: Path, saved: tuple[PreTrainedModel, Path], pattern: HeadPattern, monkeypatch: pytest.MonkeyPatch
) -> None:
    short_groups(monkeypatch)
    model, path = saved
    given = {"heads": str(folder), "sparsity": 0.5, "pretrained": str(path), "dtype": "float32", "device": "cpu"}
    logged = texts(samples(DuoLM(**given, batch_size=3, kv="int4"), folder, "writing"))
    wanted = []
    with duo_attention(model, pattern.binarize(sparsity=0.5), kv="int4"):
        for document in DOCUMENTS:
            ids = TOKENIZER(document["text"], return_tensors="pt")["input_ids"]
            written = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
            wanted.append(TOKENIZER.decode(written, skip_special_tokens=True).partition("\n\n")[0])
    assert logged == wanted


def test_generated_text_is_that_of_the_masked_model(
    folder: Path, saved: tuple[PreTrainedModel, Path], pattern: HeadPattern
) -> None:
    model, path = saved
    register()
    logged = samples(
        "duo_id", folder, "writing", heads=str(folder), sparsity=0.5, pretrained=str(path), dtype="float32"
    )
    mask, full = (pattern.binarize(sparsity=sparsity) for sparsity in (0.5, 0))
    wanted = [written_by_hand(model, mask, document["text"]) for document in DOCUMENTS]
    assert texts(logged) == wanted
    assert wanted != [written_by_hand(model, full, document["text"]) for document in DOCUMENTS]


def test_without_streaming_heads_it_is_plain_hflm(folder: Path, saved: tuple[PreTrainedModel, Path]) -> None:
    path = str(saved[1])
    plain = HFLM(pretrained=path, dtype="float32", device="cpu", batch_size=3)
    unmasked = DuoLM(heads=str(folder), sparsity=0, pretrained=path, dtype="float32", device="cpu", batch_size=3)
    expected, logged = (samples(model, folder, "choices") for model in (plain, unmasked))
    assert likelihoods(logged) == pytest.approx(likelihoods(expected), abs=1e-4)
    expected, logged = (samples(model, folder, "writing") for model in (plain, unmasked))
    assert texts(logged) == texts(expected)


def test_mixed_precision_is_the_masked_model_in_bfloat16(
    folder: Path, saved: tuple[PreTrainedModel, Path], pattern: HeadPattern
) -> None:
    """lm-eval's `mixed_precision_dtype` runs every forward of a float32 model under torch.autocast."""
    model, path = saved
    arguments = {"heads": str(folder), "sparsity": 0.5, "pretrained": str(path), "dtype": "float32"}
    arguments |= {"device": "cpu", "batch_size": 3, "mixed_precision_dtype": "bfloat16"}
    mixed, types = DuoLM(**arguments), []
    assert mixed.model.dtype == torch.float32
    mixed.model.lm_head.register_forward_hook(lambda module, inputs, output: types.append(output.dtype))
    logged = likelihoods(samples(mixed, folder, "choices"))
    mask = pattern.binarize(sparsity=0.5)
    pairs = [(document["text"], choice) for document in DOCUMENTS for choice in document["choices"]]
    with torch.autocast("cpu", torch.bfloat16):
        assert logged == pytest.approx([by_hand(model, mask, *pair) for pair in pairs], rel=0.02)
    assert logged == pytest.approx([by_hand(model, mask, *pair) for pair in pairs], rel=0.05)
    written = texts(samples(mixed, folder, "writing"))
    with torch.autocast("cpu", torch.bfloat16):
        wanted = [written_by_hand(model, mask, document["text"]) for document in DOCUMENTS]
    assert [text[:2] for text in written] == [text[:2] for text in wanted], "later tokens may be chosen by rounding"
    assert set(types) == {torch.bfloat16}


def test_models_are_loaded_as_the_other_commands_do(folder: Path) -> None:
    register()
    assert get_model("duo_id") is DuoLM
    model = DuoLM(heads=str(folder), sparsity="0.5", model="tiny", dtype="bfloat16", device="cpu", batch_size=2)
    assert model.model.dtype == torch.bfloat16
    assert model.batch_size == 2
    assert model.model.duo_id_deployment.mask.sparsity == 0.5
    info = model.get_model_info()
    assert (info["sparsity"], info["sink_size"], info["recent_size"]) == (0.5, 2, 5)


def test_the_default_model_is_the_patterns_own(tmp_path: Path, pattern: HeadPattern) -> None:
    architecture = {"model_type": "llama", "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    architecture |= {"hidden_size": 32, "intermediate_size": 48, "vocab_size": 258}
    settings = {"model": {"id": "own", "init": "random", "architecture": architecture}}
    described = HeadPattern(pattern.scores, 2, 5, provenance={"settings": settings})
    save_pattern(described, tmp_path / "heads")
    assert DuoLM(heads=str(tmp_path), device="cpu").model.config.intermediate_size == 48


def test_heads_of_other_weights_are_said(
    tmp_path: Path, pattern: HeadPattern, capsys: pytest.CaptureFixture[str]
) -> None:
    save_pattern(HeadPattern(pattern.scores, 2, 5, provenance={"model": {"weights": "int8"}}), tmp_path / "heads")
    DuoLM(heads=str(tmp_path), model="tiny", device="cpu")
    assert capsys.readouterr().out == "the heads were found on int8 weights, and are used on unquantised ones\n"


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({}, "heads=... is missing"),
        ({"heads": "nowhere"}, "no head pattern 'nowhere'"),
        ({"heads": "", "model": "tiny", "pretrained": "x"}, "give one of them"),
        ({"heads": "", "model": "tinny"}, "model=tinny: choose among .*smollm2-135m.*pretrained="),
        ({"heads": ""}, "add --model_args pretrained=MODEL"),
        ({"heads": "", "model": "tiny", "sparsity": 2}, r"must lie in \[0, 1\]"),
        ({"heads": "", "model": "tiny", "sparsity": "abc"}, "sparsity=abc is not a number"),
        ({"heads": "SmolLM2-135M-Instruct", "model": "tiny"}, "is for 30 layers"),
        ({"heads": "", "model": "tiny", "peft": "adapter"}, "^--model_args peft=adapter .* add pretrained=MODEL$"),
        ({"heads": "", "model": "tiny", "load_in_4bit": True}, "^--model_args load_in_4bit=True .* pretrained=MODEL$"),
        ({"heads": "", "pretrained": "./nowhere"}, r"^--model_args pretrained=\./nowhere: lm-eval cannot load it: .+$"),
        (
            {"heads": "", "model": "tiny", "mixed_precision_dtype": "bf16"},
            "^--model_args mixed_precision_dtype=bf16",
        ),
        ({"heads": "", "pretrained": "x", "mixed_precision_dtype": "auto"}, "=auto: choose bfloat16 or float16"),
        ({"heads": "", "model": "tiny", "kv": "int3"}, "^--model_args kv=int3: choose exact, int8, k8v4, int4$"),
        ({"heads": "", "model": "tiny", "truncation_side": "right"}, "truncation_side=right: choose left or middle"),
        (
            {"heads": "", "model": "tiny", "truncation_side": "middle", "truncation": True},
            "truncation_side=middle,truncation=True: give one of them",
        ),
    ],
)
def test_mistakes_are_named(folder: Path, arguments: dict[str, Any], error: str) -> None:
    if arguments.get("heads") == "":
        arguments = arguments | {"heads": str(folder)}
    with pytest.raises(UserError, match=error) as raised:
        DuoLM(**arguments, device="cpu")
    assert "\n" not in str(raised.value)


def test_options_that_change_nothing_pass(folder: Path) -> None:
    options = {"peft": None, "parallelize": False, "trust_remote_code": True, "max_length": 64, "batch_size": 2}
    assert DuoLM(heads=str(folder), model="tiny", device="cpu", **options).max_length == 64


def test_the_command_registers_the_model_and_hands_over(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []
    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", lambda: seen.append(get_model("duo_id")))
    duo_id.lm_eval.__main__.main()
    assert seen == [DuoLM]


def test_the_command_shows_a_mistake_as_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", lambda: DuoLM(device="cpu"))
    with pytest.raises(SystemExit, match="2"):
        duo_id.lm_eval.__main__.main()
    monkeypatch.setitem(sys.modules, "lm_eval.__main__", None)
    with pytest.raises(SystemExit, match="2"):
        duo_id.lm_eval.__main__.main()
    mistake, missing = capsys.readouterr().out.splitlines()
    assert mistake.startswith("error: --model_args heads=... is missing")
    assert "pip install 'duo_id[lm-eval]'" in missing


@pytest.mark.slow  # lm-eval's command line reads all its tasks
def test_the_command_line_is_that_of_lm_eval(folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "duo_id.lm_eval", "--model", "duo_id", "--tasks", "choices", "--batch_size", "2"]
    command += ["--include_path", str(folder / "tasks"), "--device", "cpu", "--output_path", str(tmp_path / "out")]
    command += ["--model_args", f"heads={folder},sparsity=0.5,model=tiny"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "|choices|" in done.stdout
    (written,) = (tmp_path / "out").rglob("results_*.json")
    assert json.loads(written.read_text())["config"]["model_args"]["sparsity"] == 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": None}, "sparsity=None is not a number"),
        ({"sparsity": [0.5]}, r"sparsity=\[0.5\] is not a number"),
        ({"sparsity": True}, "sparsity=True is not a number"),
        ({"dtype": "abc"}, "dtype=abc: choose auto, float32"),
        ({"max_length": "abc"}, "max_length=abc must be a whole number"),
        ({"max_length": 0}, "max_length=0 must be a whole number"),
        ({"device": "abc"}, "device=abc: give --device instead"),
    ],
    ids=["none", "list", "true", "dtype", "length", "zero", "device"],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], message: str, folder: Path) -> None:
    model_args = {"heads": str(folder / "heads"), "model": "tiny"} | arguments
    with pytest.raises(UserError, match=f"--model_args {message}"):
        DuoLM.create_from_arg_obj(model_args, {"device": "cpu", "batch_size": 1})
