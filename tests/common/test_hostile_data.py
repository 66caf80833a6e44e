"""Each value of each file that we read, made a wrong one: a line that names the file, or a reason to accept."""

import json
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file

from duo_id.benchmark.figures import plot_benchmark
from duo_id.common.config import conf_dir, parse
from duo_id.common.errors import UserError
from duo_id.common.foreign import describe_model, model_of
from duo_id.common.integrity import unsealed
from duo_id.common.record import differences, read_settings, recorded_settings
from duo_id.data.registry import make_task
from duo_id.data.settings import DataSettings
from duo_id.evaluate.contenders import contenders
from duo_id.evaluate.journal import JOURNAL, Journal
from duo_id.evaluate.peers import read_answers, write_samples
from duo_id.evaluate.tasks.ruler_files import read_ruler
from duo_id.methods.head_order import HeadOrder
from duo_id.methods.search import _read_order as read_search
from duo_id.models.loading import meta_model
from duo_id.models.settings import ModelSettings
from duo_id.models.tokenizers import byte_tokenizer
from duo_id.patterns.agreement import agreement, agreement_table
from duo_id.patterns.files import contents_of, duo_config
from duo_id.patterns.formats.options import Options
from duo_id.patterns.formats.registry import FORMATS, lost_parts, read_any
from duo_id.patterns.pattern import HeadPattern
from duo_id.patterns.saved import load_pattern
from duo_id.patterns.sharing import model_card
from duo_id.patterns.sources import SHIPPED
from duo_id.patterns.spans import HeadSpans
from duo_id.report.leaderboard import average_over_seeds, in_family_tasks, leaderboards, seconds_of
from duo_id.report.page import FigureEmbedder, _training, report
from duo_id.report.runs import merge, read_run
from duo_id.report.summary import frame, load_results
from duo_id.report.sweeps import grids, read_sweep
from duo_id.report.tables import contender_grid
from tests.benchmark import saved as benchmarks
from tests.benchmark.test_efficiency import RUN, baseline
from tests.evaluate.saved import line_up, saved_results
from tests.evaluate.test_journal import row as scored
from tests.evaluate.test_peers import ITEMS, TOLD, answer, write_answers
from tests.support.mutations import mutations

FEW = 150  # mutations of a file, drawn anew by nobody: the seed is the file's name
OPTIONS = Options(sparsity=0.5, layers=2, heads=4, kv_heads=2, sink_size=1, recent_size=2)


def heads(folder: Path) -> dict[str, Any]:
    """A small pattern with the provenance of the shipped one."""
    contents = json.loads((SHIPPED / "SmolLM2-135M-Instruct" / "heads.json").read_text())
    provenance = contents["provenance"] | {"seconds": 3.0, "budget": 0.5}
    provenance["model"] |= {"layers": 2, "gated_layers": 2, "kv_heads": 2, "heads": 4}
    small = {"layers": 2, "kv_heads": 2, "gated_layers": [0, 1], "scores": [[0.1, 0.9], [0.2, 0.3]]}
    small |= {"version": 2, "needs": {"levels": [1, 64, -1], "costs": [[[0.5, 0.25, 0.0]] * 2] * 2}}
    return contents | small | {"masks": [{"sparsity": 0.5, "retrieval": [[0, 1], [0, 1]]}], "provenance": provenance}


def use_heads(path: Path) -> None:
    """What commands do with a pattern before they need a model, and after they have one."""
    pattern = load_pattern(path)
    pattern.check_fits(2, 2, "a model")
    contenders({"a": pattern}, [0.5], 1, ["streaming"], 0)
    contents = {"a": contents_of(pattern), "b": contents_of(pattern)}
    (
        in_family_tasks(contents.values()),
        seconds_of(contents),
        average_over_seeds(contents),
        duo_config(pattern, {}),
        pattern.holds_gates,
        pattern.allocate(cache=0.75, length=1000),
        repr(pattern),
    )
    differences(recorded_settings(pattern.provenance), {"method": {"name": "duo"}, "model": {"architecture": {"x": 1}}})
    if model_of(pattern.provenance, f"heads={path}"):
        describe_model(pattern.provenance, f"heads={path}", "model=NAME")
    agreement({"a": pattern, "b": pattern}, [0.5]), agreement_table({"a": pattern, "b": pattern}, [0.5])
    model_card(pattern, "user/repo")
    for name in FORMATS:
        lost_parts(pattern, name, OPTIONS)


def spans(folder: Path) -> dict[str, Any]:
    HeadSpans(torch.tensor([[-1, 8], [64, 1]]), 4).save(folder / "spans.json")
    return unsealed(json.loads((folder / "spans.json").read_text()))


def use_results(path: Path) -> None:
    results = merge([load_results(path)])[0]
    contender_grid(frame(results)), leaderboards(results)


def use_summary(path: Path) -> None:
    run = read_run(path.parent)
    _training(run, FigureEmbedder(lambda text: None))
    grids(read_sweep(path.parents[1]))


def summary(folder: Path) -> dict[str, Any]:
    (folder / ".hydra").mkdir(exist_ok=True)
    (folder / ".hydra" / "overrides.yaml").write_text("[seed=0]")
    shipped = SHIPPED / "SmolLM2-135M-Instruct"
    for name in ("heads.json", "config.json"):
        (folder / "heads").mkdir(exist_ok=True)
        (folder / "heads" / name).write_text((shipped / name).read_text())
    contents = json.loads((shipped / "summary.json").read_text())
    rows = [row | {"exact_answers": 0.5} for row in contents["results"][:2]]
    settings = {"model": {"id": "x"}, "data": {"task": "text"}, "method": {"name": "duo", "gate": "nested"}}
    numbers = {"seconds": {"load": 1.0}, "validation_loss": 1.0, "mean_gate": 0.5, "steps": 3}
    return contents | {"results": rows, "settings": settings} | numbers


def use_journal(path: Path) -> None:
    Journal(path.parent, {"seed": 0})


def journal(folder: Path) -> list[Any]:
    Journal(folder, {"seed": 0}).add([scored(0)])
    return [json.loads(line) for line in (folder / JOURNAL).read_text().splitlines()]


def answers(folder: Path) -> list[Any]:
    write_samples(folder / "samples.jsonl", TOLD, ITEMS)
    return [json.loads(line) for line in write_answers(folder, [answer()]).read_text().splitlines()]


def use_written(path: Path) -> None:
    """What a model wrote is refused before a sample is made of it."""
    make_task(DataSettings(task="self", self_path=str(path.parent)), byte_tokenizer(), "train").sample(0, 0)


def use_benchmark(path: Path) -> None:
    for axis in ("context", "retrieval"):
        plot_benchmark(path, axis)


def model(folder: Path) -> dict[str, Any]:
    tiny = OmegaConf.to_container(OmegaConf.load(conf_dir() / "model" / "tiny.yaml"))
    return heads(folder) | {"provenance": {"settings": {"model": tiny}}}


def use_model(path: Path) -> None:
    """Random weights of a described model, up to their memory."""
    described = model_of(load_pattern(path).provenance, f"heads={path}")
    if described and described.get("init") == "random":  # others would be looked for on the hub
        meta_model(parse(ModelSettings, OmegaConf.create(described)), torch.float32)


def use_settings(path: Path) -> None:
    settings, replaced = read_settings(path.parent)
    differences(settings, {"a": {"b": 2}}), differences(replaced, settings)


def search(folder: Path) -> dict[str, Any]:
    return {"shape": [1, 3], "first": [0], "last": [2], "hints": [0.1, 0.2, 0.3], "swaps": 1, "seconds": 1.5}


def use_search(path: Path) -> None:
    order, _ = read_search(path, HeadOrder((1, 3)))
    order.scores()


def results(folder: Path) -> dict[str, Any]:
    compared = line_up(sparsities=(0.5,), peers=False)
    contents = saved_results(1, ("language",), (1000,), compared)
    return contents | {"rows": [row for row in contents["rows"] if row["question"] == 0]}


GIVEN = {
    "task": "vt",
    "max_new_tokens": 9,
    "context": "A.",
    "question": "Q?",
    "answer": ["1"],
    "answer_prefix": "It is",
}
WRITTEN = {"task": "vt", "max_new_tokens": 9, "input": "A.\nQ?", "outputs": ["1"], "answer_prefix": "It is", "index": 3}
QUERY_HEADS = {f"{layer}-{head}": [0.5, 1] for layer in range(2) for head in range(4)}


def use_ruler(path: Path) -> None:
    read_ruler("vt", str(path.parent), 4096)


def duo(folder: Path) -> dict[str, Any]:
    (folder / "full_attention_heads.tsv").write_text("0.5\t1\n0\t0.25\n")
    return {"model_name": "someone/something", "sink_size": 4, "recent_size": 8, "gated_layers": [0, 1]}


def checkpoint(folder: Path) -> dict[str, Any]:
    layers = {
        f"model.layers.{layer}.self_attn.{name}_proj.weight": torch.ones(shape)
        for layer in range(2)
        for name, shape in {"q": (8, 8), "k": (4, 8), "v": (4, 8), "o": (8, 8)}.items()
    }
    save_file(layers, folder / "model.safetensors")
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    return sizes | {"head_dim": 2, "text_config": {"num_hidden_layers": 2}}


def use_checkpoint(path: Path) -> None:
    pattern = HeadPattern(torch.tensor([[0.1, 0.9], [0.9, 0.1]]), 1, 2)
    options = replace(OPTIONS, checkpoint=str(path.parent))
    shutil.rmtree(path.parents[1] / "sorted", ignore_errors=True)  # of the value before
    FORMATS["permuted-checkpoint"].write(pattern, path.parents[1] / "sorted", options)


@dataclass(frozen=True)
class Case:
    """A file.

    Attributes:
        name: of the file, which messages have.
        valid: makes what it holds, and what stands beside it, in a folder.
        use: what is done with the path.
        accepted: places that may hold anything, or anything of a kind, and why.
        lines: whether it has a line of JSON for each item.
        says: what messages have, a pattern; empty: the file's name.
    """

    name: str
    valid: Callable[[Path], Any]
    use: Callable[[Path], Any]
    accepted: dict[str, str] = field(default_factory=dict)
    lines: bool = False
    says: str = ""


UNSAID = {r".*=null": "not said, where the schema lets it", r".*=\{\}": "an empty group says nothing"}
MORE = {r".*=\{\"x.*": "keys that nobody looks at"}
NUMBERS = {r".*=(-1|1\.5|9007199254740993)": "another number, where the schema lets it"}
TEXTS = {r".*=\".*": "another text"}
SHOWN = {
    r"provenance\.settings\.(step|comparison|trainer|sparsity|seed|repeats)\b.*": "shown, and used for nothing",
    r"provenance\.steps=.*": "likewise",
    r"provenance\.settings\.data\.(?!task=|mixture=)\w+.*": "likewise, and mixture's weights are numbers or refused",
    r"provenance\.settings\.method\.(?!name=|gate=).*": "likewise",
    r"provenance\.settings\.model\.trust_remote_code=.*": "never taken",
    r"provenance\.settings\.model(\.\w+)?=(\"\"|\[\])": "not said",
    r"provenance\.settings\.model\.(architecture|config)\b.*=.*": "numbers and groups of them; transformers decides",
}
MASKS = {r"(patterns\.found\.)?masks\b.*": "for other tools: ours are made of the scores"}
ROW = {
    r"(samples|settings)\b.*": "shown, and used for nothing",
    r"contenders\.\d\.(seed|sparsity)=.*": "the rows are what counts",
    r"(rows\.\d|1)\.exact=true": "another answer",
    r"contenders=\[\]": "the rows are what counts",
}
UNUSED = {
    r"(settings|trainer)\b.*": "shown, and used for nothing",
    r"results\.\d\.(seed|loss|correct|tokens)=.*": "likewise",
    r"results_of=.*": "likewise",
    r"results=\[\]": "no rows",
}
RATES = r"rows\.\d\.(ms_\w+|over_floor|tokens_per_s|batch_size|speedup|memory_saving|floor_ratio)=.*|ceilings.*"
CASES = {
    "heads": Case("heads.json", heads, use_heads, UNSAID | MORE | NUMBERS | SHOWN | MASKS),
    "spans": Case("spans.json", spans, HeadSpans.from_pretrained, NUMBERS),
    "model": Case(
        "heads.json", model, use_model, UNSAID | MORE | NUMBERS | SHOWN | MASKS, says="heads.json|model=|model.arch"
    ),
    "results": Case("results.json", results, use_results, UNSAID | MORE | NUMBERS | TEXTS | MASKS | ROW),
    "summary": Case("summary.json", summary, use_summary, UNSAID | MORE | NUMBERS | UNUSED),
    "settings": Case(
        "settings.json",
        lambda folder: {"settings": {"a": {"b": 1}}, "before": {"c": 1}},
        use_settings,
        {r"(settings|before)(\..+|=\{.*)": "compared with those of today, and shown where they differ"},
    ),
    "search": Case(
        "search.json", search, use_search, NUMBERS | {r"(first|last)=\[\]": "nothing decided yet at this end"}
    ),
    "journal": Case("scores.jsonl", journal, use_journal, UNSAID | NUMBERS | TEXTS | ROW, lines=True),
    "peers": Case(
        "answers-snapkv.jsonl",
        answers,
        lambda path: read_answers(path.parent, ITEMS),
        UNSAID
        | MORE
        | NUMBERS
        | TEXTS
        | {r"1\.questions\.\d\.full_loss=.*": "not looked at", r".*=\[\]": "no answers"},
        lines=True,
    ),
    "written": Case(
        "texts.jsonl",
        lambda folder: [{"split": "train", "temperature": 0.7, "prompt": [1, 2], "written": [3]}],
        use_written,
        NUMBERS,
        lines=True,
        says="texts.jsonl|data.self_path=",
    ),
    "benchmark": Case(
        "results.json",
        lambda folder: benchmarks.decode(),
        use_benchmark,
        UNSAID | NUMBERS | TEXTS | {RATES: "for tables of the run itself"},
    ),
    "steps": Case("results.json", lambda folder: RUN, baseline, NUMBERS | UNSAID | UNUSED, says="compare="),
    "ruler": Case("4096.jsonl", lambda folder: [GIVEN], use_ruler, UNSAID | NUMBERS | TEXTS, True, "4096|lengths="),
    "ruler-scripts": Case(
        "4096.jsonl",
        lambda folder: [WRITTEN],
        use_ruler,
        UNSAID | NUMBERS | TEXTS | {r"0\.index=.*": "not looked at"},
        True,
        "4096|lengths=",
    ),
    "retrieval-head": Case(
        "scores.json", lambda folder: QUERY_HEADS, lambda path: read_any(str(path), OPTIONS), NUMBERS
    ),
    "checkpoint": Case(
        "config.json",
        checkpoint,
        use_checkpoint,
        UNSAID | {r"hidden_size=.*": "head_dim says it", r"num_hidden_layers=.*|text_config=.*": "the other says it"},
        says="/run",
    ),
    "duo-attention": Case(
        "config.json", duo, lambda path: use_heads(path.with_name("full_attention_heads.tsv")), UNSAID, says="/run"
    ),
}


def problems(case: Case, folder: Path, few: int | None) -> list[str]:
    """What goes wrong, or is accepted for no reason, of a file's mutations: all, or `few` of them."""
    wrong: list[str] = []
    path = folder / "run" / case.name
    path.parent.mkdir(exist_ok=True)
    valid = case.valid(path.parent)

    def write(contents: Any) -> None:
        lines = contents if case.lines and isinstance(contents, list) else [contents]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))

    write(valid)
    case.use(path)
    changed = list(mutations(valid))
    if few is not None:
        changed = random.Random(case.name).sample(changed, min(few, len(changed)))
    for key, new, contents in changed:
        mutation = f"{key}={json.dumps(new)}"
        write(contents)
        try:
            case.use(path)
        except UserError as error:
            message = str(error)
            named = re.search(case.says or re.escape(case.name), message) is not None
            if not named or not message.isprintable() or len(message) > 700:
                wrong.append(f"{mutation}: says {message!r}")
        except Exception as error:
            wrong.append(f"{mutation}: {type(error).__name__}: {error}")
        else:
            if not any(re.fullmatch(pattern, mutation) for pattern in case.accepted):
                wrong.append(f"{mutation}: accepted")
    return wrong


@pytest.mark.parametrize("name", CASES)
def test_wrong_values_are_one_line_that_names_the_file(name: str, tmp_path: Path) -> None:
    assert problems(CASES[name], tmp_path, FEW) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_every_wrong_value_is_one_line_that_names_the_file(name: str, tmp_path: Path) -> None:
    assert problems(CASES[name], tmp_path, None) == []


@pytest.mark.slow
def test_pages_are_whole_or_refused(tmp_path: Path) -> None:
    """Pages take seconds, so only some of what tables accept, or refuse, is put on one."""
    page = replace(CASES["results"], use=lambda path: report([read_run(path.parent)]))
    assert problems(page, tmp_path, 60) == []
