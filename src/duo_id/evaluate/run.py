"""Score head patterns, and what they are compared with, on held-out long-context tasks."""

import platform
from collections.abc import Mapping, Sequence
from glob import glob
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from duo_id import __version__
from duo_id.attention.interface import attached
from duo_id.common import cli
from duo_id.common.config import plain
from duo_id.common.errors import UserError, check
from duo_id.common.figures import save_figure
from duo_id.common.foreign import model_of, told_model
from duo_id.common.record import check_honoured, differences, keep_settings, read_settings, within
from duo_id.data.haystack import load_haystack
from duo_id.evaluate import chat
from duo_id.evaluate.contenders import check_windows, contenders
from duo_id.evaluate.items import Item
from duo_id.evaluate.journal import Journal, write_results
from duo_id.evaluate.judging import rows_of_peers
from duo_id.evaluate.peers import SAMPLES, read_answers, write_samples
from duo_id.evaluate.reading import end_tokens
from duo_id.evaluate.runner import run
from duo_id.evaluate.settings import EvaluateSettings
from duo_id.evaluate.tasks.building import SampleBuilder
from duo_id.evaluate.tasks.registry import make_items
from duo_id.evaluate.tasks.ruler_data import is_ruler_data, ruler_items
from duo_id.models.language_model import LanguageModel
from duo_id.models.loading import load_model, weights_source
from duo_id.patterns.files import contents_of, list_patterns, load_pattern, pattern_name
from duo_id.patterns.pattern import HeadPattern
from duo_id.report.figures import figures
from duo_id.report.leaderboard import leaderboards
from duo_id.report.paired import paired_grids
from duo_id.report.rows import ScoredRow
from duo_id.report.summary import SEED
from duo_id.report.tables import results_table, terminal_table

PLAIN: dict[str, Any] = {"markup": False, "highlight": False}  # how others' texts are shown
MEASURED = ("model", "data")  # settings that all scores of a run depend on
NOT_RECORDED = ("resume",)  # settings that say nothing about what was measured


def evaluate(settings: EvaluateSettings, folder: Path) -> dict[str, Any]:
    """Score a pattern's masks and what they are compared with, and write tables and figures.

    Args:
        settings: which heads, on which tasks, beside what.
        folder: the run folder.

    Returns:
        what is also written to `results.json`.

    Raises:
        UserError: something in the settings cannot work; the message names the override.
    """
    _check_resumed(settings, folder)
    name = pattern_name(settings.heads)
    check(name not in settings.patterns, f"patterns.{name}: heads={settings.heads} has this name, choose another")
    sources = {name: settings.heads} | seeds_of(settings.patterns)
    patterns = {name: load_pattern(source) for name, source in sources.items()}
    model = load_model(settings.model, "cuda" if torch.cuda.is_available() else "cpu", settings.seed)
    with attached(model.model) as layers:
        for name, pattern in patterns.items():
            try:
                pattern.check_fits(model.num_layers, layers[0].kv_heads, model.name)
            except UserError as error:
                override = "heads" if sources[name] == settings.heads else f"patterns.{name}"
                raise UserError(f"{override}={sources[name]}: {error}") from error
        description = model.describe(layers) | {"dtype": str(model.model.dtype).removeprefix("torch.")}
    items = all_items(settings, model)
    check_windows(patterns, items)
    compared = contenders(patterns, settings.sparsity, settings.random_masks, settings.baselines, settings.seed)
    asked = {key: getattr(settings, key) for key in ("split", "seed", "chat_template", "depths")}
    told = {name: contents_of(pattern) for name, pattern in patterns.items()}
    header = {"model": description, "patterns": told, "data": plain(settings.data)} | asked
    header["versions"] = {"duo_id": __version__, "python": platform.python_version()}  # whose texts samples are made of
    journal = Journal(folder, header)
    keep_settings(folder, _told(settings), {})
    if settings.peers:
        write_samples(folder / SAMPLES, _for_peers(settings, model, next(iter(patterns.values()))), items)
    read_answers(folder, items)  # what cannot be read is told before the long work
    run(model, items, compared, journal, settings.generate, settings.batch_tokens, settings.chunk_size, cli.console)
    eviction = read_answers(folder, items)
    results = {
        "model": description,
        "patterns": told,
        "contenders": _contenders_of([*(contender.describe() for contender in compared), *journal.rows, *eviction]),
        **asked,
        "samples": settings.samples,
        "settings": _told(settings),
        "versions": cli.versions() | {"device": _device()},
        "rows": journal.rows + rows_of_peers(eviction, items, model.tokenizer, end_tokens(model)),
    }
    write_results(folder, results)
    cli.console.print(results_table(results, f"{model.name} under {settings.heads}"))
    for title, grid in (leaderboards(results) | paired_grids(results)).items():
        cli.console.print(terminal_table(grid, title))
    for name, figure in figures(results).items():
        save_figure(figure, folder / "figures" / f"{name}.png")
    return results


def seeds_of(sources: Mapping[str, str]) -> dict[str, str]:
    """Where patterns are, by name; a source with a `*` is all that match: NAME#0, NAME#1, ..., seeds of one contender.

    Raises:
        UserError: nothing matches.
    """
    found: dict[str, str] = {}
    for name, source in sources.items():
        matches = sorted(glob(source)) if "*" in source else [source]
        check(bool(matches), f"patterns.{name}={source}: nothing there matches")
        numbered = {f"{name}{SEED}{number}": match for number, match in enumerate(matches)}
        found |= numbered if "*" in source else {name: source}
    return found


def all_items(settings: EvaluateSettings, model: LanguageModel) -> list[Item]:
    """All that is asked: generated tasks, and those of RULER's published data."""
    template = (chat.split_chat if settings.chat_template else chat.plain)(model.tokenizer)
    published = [name for name in settings.tasks if is_ruler_data(name)]
    generated = [name for name in settings.tasks if name not in published]
    items: list[Item] = []
    if generated:
        haystack = load_haystack(settings.data.haystack, settings.split)
        builder = SampleBuilder(model.tokenizer, haystack, settings.split, template)
        sizes = settings.lengths, settings.samples, settings.seed, model.max_length, settings.depths
        items += make_items(generated, builder, *sizes)
    if published:
        where = settings.data.path, model.tokenizer, template, model.max_length
        items += ruler_items(published, *where, settings.lengths, settings.samples)
    return items


def with_model_of_pattern(config: DictConfig, given: Sequence[str]) -> DictConfig:
    """The config with the model that the pattern was found on, unless overrides say otherwise.

    Args:
        config: the composed config.
        given: the command line's overrides.
    """
    check(isinstance(config.heads, str), f"heads={config.heads}: give a run folder or one of {list_patterns()}")
    provenance, override = load_pattern(config.heads).provenance, f"heads={config.heads}"
    keys = [one.split("=")[0].lstrip("+").replace("/", ".") for one in given]
    found = None if "model" in keys else model_of(provenance, override)
    if found:
        typed = [key for key in keys if key.startswith("model.")]
        check(
            "model.id" in typed or not config.model.get("trust_remote_code"),
            f"model.trust_remote_code=true: {override} says whose code that is, model.id={found['id']}; to run it, "
            "give model.id too",
        )
        settings = OmegaConf.create({"model": found})
        for key in typed:
            OmegaConf.update(settings, key, OmegaConf.select(config, key), merge=False)
        config.model = settings.model
        if "model.id" not in typed:
            cli.console.print(told_model(provenance, override, "model=NAME"), soft_wrap=True, **PLAIN)
    return config


def _check_resumed(settings: EvaluateSettings, folder: Path) -> None:
    """Refuse to go on with scores of another model or text; what the journal's header holds is compared there."""
    if settings.resume:
        found = differences(read_settings(folder)[0], _told(settings))
        other = {key: values for key, values in found.items() if within(key, MEASURED) and key != "model.name"}
        check_honoured(other, f"resume={settings.resume}: it was made", "and its scores hold for that alone")


def _told(settings: EvaluateSettings) -> dict[str, Any]:
    return {key: value for key, value in plain(settings).items() if key not in NOT_RECORDED}


def _for_peers(settings: EvaluateSettings, model: LanguageModel, pattern: HeadPattern) -> dict[str, Any]:
    """What peers need to know beside the samples."""
    return {
        "model": weights_source(settings.model),
        "revision": settings.model.revision,
        "dtype": str(model.model.dtype).removeprefix("torch."),
        "chat_template": settings.chat_template,
        "generate": settings.generate,
        "sink_size": pattern.sink_size,
        "recent_size": pattern.recent_size,
        "sparsities": settings.sparsity,
        "shares": [pattern.binarize(sparsity=sparsity).sparsity for sparsity in settings.sparsity],
        "seed": settings.seed,
    }


def _contenders_of(rows: Sequence[ScoredRow]) -> list[dict[str, Any]]:
    """All who are named in rows, each once, with the longest of its notes."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        who = {key: row[key] for key in ("kind", "heads", "sparsity", "seed")}
        known = found.setdefault(tuple(who.values()), who | {"note": ""})
        known["note"] = max(known["note"], row.get("note", ""), key=len)  # answers inside the context have more to say
    return list(found.values())


def _device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
