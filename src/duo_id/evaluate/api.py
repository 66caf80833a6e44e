"""`duo_id.evaluate_pattern`: score a head pattern on a model that is in memory, from Python."""

import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import OmegaConf
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from duo_id.common.argument_names import naming_arguments
from duo_id.common.composing import compose, override
from duo_id.common.config import conf_dir, parse
from duo_id.common.errors import check
from duo_id.evaluate.run import describe, score
from duo_id.evaluate.settings import EvaluateSettings
from duo_id.models.in_memory import frozen, language_model_of
from duo_id.patterns.pattern import HeadPattern
from duo_id.report.summary import contenders, frame

RESERVED = ("model", "heads", "patterns", "resume", "peers")  # what a run of the command decides


@naming_arguments()
def evaluate_pattern(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    pattern: HeadPattern,
    tasks: str | Sequence[str] = "quick",
    *,
    sparsity: float | Sequence[float] | None = None,
    cache: float | Sequence[float] | None = None,
    lengths: int | Sequence[int] | None = None,
    samples: int | None = None,
    seed: int = 0,
    progress: bool = True,
    **overrides: Any,
) -> pd.DataFrame:
    """Score masks and spans of a pattern on held-out long-context tasks, beside full attention and random masks.

    Args:
        model: any causal language model of transformers, see `duo_id.identify`.
        tokenizer: of the model.
        pattern: whose masks are scored, and, if it has needs, its spans.
        tasks: a preset of conf/evaluation (quick, standard, full), or tasks and groups of tasks by name.
        sparsity: fractions of the KV heads that stream; None: a half, or none if `cache` is given.
        cache: shares of the full cache's bytes: at each length masks and spans within them are compared.
        lengths: tokens of a context with its question and answer; None: those of the preset.
        samples: contexts of each task and length; None: as many as the preset has.
        seed: of samples and random masks.
        progress: show a bar.
        overrides: other settings of conf/evaluate.yaml, such as `random_masks=3` or, for long contexts,
            `**{"data.haystack.source": "packages"}`.

    Returns:
        one row a contender, full attention first. Each metric (`loss`, `kl`, `rise`, `accuracy`, `exact`, `score`,
        `kept`, ...) is followed by the ends of its 95% interval, `loss_low` and `loss_high`; NaN where the samples are
        too few for one. `attrs["results"]` holds what a run of the command writes to `results.json`: the rows behind
        the table, the pattern and the settings; `attrs["turns"]` is the same table by turn of conversations, with a
        column `turn`, if there were any (`tasks="turns"`).

    Raises:
        UserError: something cannot work; the message names the setting.
    """
    check(isinstance(pattern, HeadPattern), f"pattern: a {type(pattern).__name__} is not a HeadPattern")
    check(isinstance(tasks, str | Iterable), f"tasks={tasks!r:.80} must be a preset's name, or names of tasks")
    for key in overrides:
        reserved = key.partition(".")[0] in RESERVED
        check(not reserved, f"{key}: evaluate_pattern scores one pattern on the model as it is, so this cannot be set")
    language_model = language_model_of(model, tokenizer)
    patterns = {"pattern": pattern}
    description = describe(language_model, patterns, {"pattern": "pattern"})
    presets = {path.stem for path in (conf_dir() / "evaluation").glob("*.yaml")}
    is_preset = isinstance(tasks, str) and tasks in presets
    config = compose("evaluate", [f"evaluation={tasks}"] if is_preset else [])
    given: dict[str, Any] = {"sparsity": sparsity, "cache": cache, "lengths": lengths, "samples": samples, "seed": seed}
    given |= ({"sparsity": 0.5 if cache is None else []} if sparsity is None else {}) | overrides
    given |= {} if is_preset else {"tasks": tasks if isinstance(tasks, str) else list(tasks)}
    model_settings = {"id": language_model.id, "name": language_model.name, "revision": language_model.revision}
    override(config, {key: value for key, value in given.items() if value is not None})
    override(config, {"heads": "pattern", "model": model_settings})
    settings = parse(EvaluateSettings, OmegaConf.to_container(config, resolve=True))  # type: ignore[arg-type]
    console = Console(quiet=not progress)
    with tempfile.TemporaryDirectory() as folder, frozen(language_model.model):
        results = score(settings, language_model, description, patterns, Path(folder), console)
    rows = frame(results)
    table, in_turns = contenders(rows), rows[rows["turn"].notna()]
    table.attrs["results"] = results
    if len(in_turns):
        table.attrs["turns"] = contenders(in_turns, ["turn"])
    return table
