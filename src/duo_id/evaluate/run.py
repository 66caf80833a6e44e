"""Score head patterns and baselines on held-out long-context tasks."""

import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from glob import glob
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from duo_id.attention.interface import attached
from duo_id.common import cli
from duo_id.common.config import plain
from duo_id.common.errors import UserError, check
from duo_id.common.figures import save_figure
from duo_id.common.foreign import describe_model, model_of
from duo_id.common.progress import headline
from duo_id.common.record import check_unchanged, differences, in_groups, keep_settings, read_settings
from duo_id.common.tables import print_tables
from duo_id.common.version import __version__
from duo_id.data import chat
from duo_id.data.haystack import Haystack, load_haystack, text_versions
from duo_id.evaluate.batches import check_room_to_write
from duo_id.evaluate.contenders import (
    check_shares,
    check_windows,
    contenders,
    warn_of_other_weights,
    warn_of_short_contexts,
)
from duo_id.evaluate.items import Item
from duo_id.evaluate.journal import Journal, write_results
from duo_id.evaluate.judging import peer_rows
from duo_id.evaluate.peers import SAMPLES, read_answers, write_samples
from duo_id.evaluate.runner import run
from duo_id.evaluate.settings import BASELINES, EvaluateSettings
from duo_id.evaluate.tasks.building import SampleBuilder
from duo_id.evaluate.tasks.names import is_ruler_data
from duo_id.evaluate.tasks.registry import make_items
from duo_id.evaluate.tasks.ruler_data import ruler_items
from duo_id.models.language_model import LanguageModel, end_tokens
from duo_id.models.loading import load_model, weights_source
from duo_id.patterns.files import contents_of
from duo_id.patterns.pattern import HeadPattern
from duo_id.patterns.saved import load_pattern
from duo_id.patterns.sources import list_patterns, pattern_name
from duo_id.report.figures import figures
from duo_id.report.leaderboard import leaderboards
from duo_id.report.paired import paired_grids
from duo_id.report.rows import ASKED, SCHEMA, VERSION, ScoredRow
from duo_id.report.summary import SEED, frame
from duo_id.report.tables import GENERATED_CAPTION, of_generated, results_table, terminal_table

VERBATIM: dict[str, Any] = {"markup": False, "highlight": False}  # for text from elsewhere
DATED = re.compile(r"\d{4}-\d\d-\d\d/\d\d-\d\d-\d\d")
MEASURED = ("model", "data")  # settings that all scores of a run depend on
UNCOMPARED = ("model.name", "data.haystack.sha256")  # the first measures nothing, the journal compares the second
NOT_RECORDED = ("resume",)  # settings that say nothing about what was measured


def evaluate(settings: EvaluateSettings, folder: Path) -> dict[str, Any]:
    """Score a pattern's masks and their baselines, and write tables and figures.

    Args:
        settings: which heads, on which tasks, compared with what.
        folder: the run folder.

    Returns:
        the contents of `results.json`.

    Raises:
        UserError: the settings cannot work; the message names the override.
    """
    _check_resumed(settings, folder)
    name = heads_name(settings.heads)
    check(name not in settings.patterns, f"patterns.{name}: heads={settings.heads} has this name, choose another")
    sources = {name: settings.heads} | expand_seeds(settings.patterns)
    patterns = {name: load_pattern(source) for name, source in sources.items()}
    model = load_model(settings.model, "cuda" if torch.cuda.is_available() else "cpu", settings.seed)
    keys = {key: "heads" if source == settings.heads else f"patterns.{key}" for key, source in sources.items()}
    description = describe(model, patterns, {key: f"{keys[key]}={source}" for key, source in sources.items()})
    shape = description["gated_layers"], description["kv_heads"]
    lengths = " and ".join(f"{length:,}" for length in settings.lengths)
    sizes = f"{settings.samples} x {lengths} tokens of {', '.join(settings.tasks)}"
    cli.say(headline(model.name, model.model.device, shape, f"heads of {', '.join(patterns)}", sizes, folder))
    results = score(settings, model, description, patterns, folder, cli.console)
    write_results(folder, results)
    print_tables(cli.console, results_table(results, f"{model.name} under {settings.heads}"))
    for title, grid in of_generated(frame(results)).items():
        print_tables(cli.console, terminal_table(grid, title, GENERATED_CAPTION, spreads=False))
    for title, grid in (leaderboards(results) | paired_grids(results)).items():
        print_tables(cli.console, terminal_table(grid, title))
    for name, figure in figures(results).items():
        save_figure(figure, folder / "figures" / f"{name}.png")
    return results


def describe(model: LanguageModel, patterns: Mapping[str, HeadPattern], origins: Mapping[str, str]) -> dict[str, Any]:
    """What results say of the model, which is attached once to see that all patterns fit it.

    Args:
        model: under no mask.
        patterns: by name.
        origins: of each, for messages.

    Raises:
        UserError: the model cannot be attached, or a pattern is of another shape.
    """
    with attached(model.model) as layers:
        description = model.describe(layers) | {"dtype": str(model.model.dtype).removeprefix("torch.")}
    for name, pattern in patterns.items():
        try:
            pattern.check_fits(model.num_layers, layers[0].kv_heads, model.name)
        except UserError as error:
            raise UserError(f"{origins[name]}: {error}") from error
    return description


def score(
    settings: EvaluateSettings,
    model: LanguageModel,
    description: Mapping[str, Any],
    patterns: Mapping[str, HeadPattern],
    folder: Path,
    console: Console,
) -> dict[str, Any]:
    """The contents of `results.json`; scores are kept in the folder as they come, and those that are there reused.

    Args:
        settings: which tasks, compared with what.
        model: under no mask.
        description: of the model.
        patterns: by name, which fit the model.
        folder: of the run.
        console: shows the progress.
    """
    haystack = load_haystack(settings.data.haystack, settings.split, held_out=True) if _generated(settings) else None
    if haystack is not None:
        text = replace(settings.data.haystack, sha256=haystack.digest)
        settings = replace(settings, data=replace(settings.data, haystack=text))
    items = all_items(settings, model, haystack)
    check_windows(patterns, items)
    if settings.write:
        check_room_to_write(settings.write, items, model.max_length)
    check_shares(patterns, settings.cache, settings.lengths)
    warn_of_other_weights(patterns, model.weights)
    warn_of_short_contexts(patterns, settings.cache, [len(item.context) for item in items])
    evict = settings.evict, settings.evict_split
    masks = settings.random_masks, settings.baselines, settings.seed
    lineup = contenders(patterns, settings.sparsity, *masks, settings.cache, settings.kv, *evict)
    protocol = {key: getattr(settings, key) for key in ("split", "seed", "chat_template", "depths", "write")}
    saved_patterns = {name: contents_of(pattern) for name, pattern in patterns.items()}
    header = {"model": description, "patterns": saved_patterns, "data": plain(settings.data)} | protocol
    header["versions"] = {"duo_id": __version__, "python": platform.python_version()}  # samples depend on both
    journal = Journal(folder, header)
    keep_settings(folder, _recorded_settings(settings), {})
    if settings.peers:
        write_samples(folder / SAMPLES, _samples_header(settings, model, next(iter(patterns.values()))), items)
    read_answers(folder, items)  # unreadable answers fail before the long run
    sizes = settings.batch_tokens, settings.chunk_size
    run(model, items, lineup, journal, settings.generate, *sizes, console, settings.write)
    eviction = read_answers(folder, items)
    return {
        "schema": SCHEMA,
        "version": VERSION,
        "model": description,
        "patterns": saved_patterns,
        "contenders": _named_contenders([*(contender.describe() for contender in lineup), *journal.rows, *eviction]),
        **protocol,
        "samples": settings.samples,
        "text_reads": None if haystack is None else round(haystack.reads, 2),
        "settings": _recorded_settings(settings),
        "versions": cli.versions() | text_versions(settings.data.haystack, held_out=True) | {"device": _device_name()},
        "rows": journal.rows + peer_rows(eviction, items, model.tokenizer, end_tokens(model)),
    }


def heads_name(source: str) -> str:
    """What rows of tables call the heads at `source`: its name, but for a run in a dated folder its method.

    A method that shares its name with a baseline leaves the date.
    """
    name = pattern_name(source)
    if not DATED.fullmatch(name):
        return name
    settings = load_pattern(source).provenance.get("settings") or {}
    method = (settings.get("method") or {}).get("name")
    return method if method and method not in ("full", "random", *BASELINES) else name


def expand_seeds(sources: Mapping[str, str]) -> dict[str, str]:
    """The sources of patterns by name, with each `*` expanded: NAME#0, NAME#1, ..., the seeds of one contender.

    Raises:
        UserError: nothing matches.
    """
    expanded: dict[str, str] = {}
    for name, source in sources.items():
        matches = sorted(glob(source)) if "*" in source else [source]
        check(bool(matches), f"patterns.{name}={source}: nothing matches")
        numbered = {f"{name}{SEED}{number}": match for number, match in enumerate(matches)}
        expanded |= numbered if "*" in source else {name: source}
    return expanded


def all_items(settings: EvaluateSettings, model: LanguageModel, haystack: Haystack | None) -> list[Item]:
    """All samples: of generated tasks, which read the haystack, and of RULER's published data."""
    template = (chat.split_chat if settings.chat_template else chat.plain)(model.tokenizer)
    published = [name for name in settings.tasks if is_ruler_data(name)]
    items: list[Item] = []
    if haystack is not None:
        builder = SampleBuilder(model.tokenizer, haystack, settings.split, template)
        sizes = settings.lengths, settings.samples, settings.seed, model.max_length, settings.depths
        items += make_items(_generated(settings), builder, *sizes)
    if published:
        arguments = settings.data.path, model.tokenizer, template, model.max_length
        items += ruler_items(published, *arguments, settings.lengths, settings.samples)
    return items


def _generated(settings: EvaluateSettings) -> list[str]:
    return [name for name in settings.tasks if not is_ruler_data(name)]


def with_model_of_pattern(config: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """The config with the model that the pattern was identified on, unless overrides say otherwise.

    Args:
        config: the composed config.
        overrides: the command line's overrides.
    """
    check(isinstance(config.heads, str), f"heads={config.heads}: give a run folder or one of {list_patterns()}")
    override = f"heads={config.heads}"
    try:
        provenance = load_pattern(config.heads).provenance
    except UserError as error:
        raise UserError(f"{override}: {error}") from error
    overridden = [item.split("=")[0].lstrip("+").replace("/", ".") for item in overrides]
    pattern_model = None if "model" in overridden else model_of(provenance, override)
    if pattern_model:
        model_overrides = [key for key in overridden if key.startswith("model.")]
        check(
            "model.id" in model_overrides or not config.model.get("trust_remote_code"),
            f"model.trust_remote_code=true: {override} chooses whose code that is, model.id={pattern_model['id']}; to "
            "run it, give model.id too",
        )
        settings = OmegaConf.create({"model": pattern_model})
        for key in model_overrides:
            OmegaConf.update(settings, key, OmegaConf.select(config, key), merge=False)
        config.model = settings.model
        if "model.id" not in model_overrides:
            cli.console.print(describe_model(provenance, override, "model=NAME"), soft_wrap=True, **VERBATIM)
    return config


def _check_resumed(settings: EvaluateSettings, folder: Path) -> None:
    """Refuse to resume scores of another model or text; the journal compares what its header holds."""
    if settings.resume:
        changes = differences(read_settings(folder)[0], _recorded_settings(settings))
        relevant = {
            key: values for key, values in changes.items() if in_groups(key, MEASURED) and key not in UNCOMPARED
        }
        check_unchanged(relevant, f"resume={settings.resume}: it was made", "and its scores are valid for that only")


def _recorded_settings(settings: EvaluateSettings) -> dict[str, Any]:
    return {key: value for key, value in plain(settings).items() if key not in NOT_RECORDED}


def _samples_header(settings: EvaluateSettings, model: LanguageModel, pattern: HeadPattern) -> dict[str, Any]:
    """What peers need besides the samples."""
    shares = {"caches": settings.cache} if settings.cache else {}
    return shares | {
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


def _named_contenders(rows: Sequence[ScoredRow]) -> list[dict[str, Any]]:
    """All contenders named in rows, each once, with its longest note."""
    named: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        identity = {key: row.get(key) for key in ASKED}
        entry = named.setdefault(tuple(identity.values()), identity | {"note": ""})
        entry["note"] = max(entry["note"], row.get("note", ""), key=len)  # answers inside the context have longer notes
    return list(named.values())


def _device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
