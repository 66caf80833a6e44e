"""What a resumed run may change: its results so far must be those of today's settings."""

from pathlib import Path
from typing import Any

from duo_id.common.config import plain
from duo_id.common.errors import check
from duo_id.common.record import check_unchanged, differences, in_groups, read_settings, recorded_settings
from duo_id.methods.search import SEARCH_FILE
from duo_id.methods.span_prices import PRICES_FILE
from duo_id.patterns.pattern import HeadPattern
from duo_id.patterns.saved import load_pattern
from duo_id.patterns.sources import HEADS
from duo_id.train.checkpoints import CHECKPOINT
from duo_id.train.settings import TrainSettings

EarlierSettings = tuple[dict[str, Any], dict[str, Any]]  # settings, and values that they replaced, by override
MAX_STEPS = "trainer.max_steps"
CHANGEABLE = (
    "comparison",
    "sparsity",
    "repeats",
    "model.name",
    "data.num_workers",
    "data.self_path",
)  # used again on resume, or without effect on the heads
STEP_SETTINGS = ("step", "trainer")  # a resumed run may change them for the steps to come; provenance records it
NOT_RECORDED = (
    "logger",
    "resume",
    "checkpoint_seconds",
)  # settings that do not affect the heads


def check_resumed(settings: TrainSettings, folder: Path) -> EarlierSettings:
    """Refuse to resume a run under settings that differ from those of its results so far.

    Returns:
        the settings of the earlier part, and the values that they replaced in parts before it; both empty if there is
        no progress to continue from, since everything is then computed under today's settings.
    """
    if not settings.resume:
        return {}, {}
    (earlier, replaced), requested = read_settings(folder), plain(settings)
    has_heads = (folder / "heads" / HEADS).is_file()
    started_folders = [
        run_folder for run_folder in (folder, *sorted(folder.glob("seed-*"))) if _has_progress(run_folder)
    ]
    if has_heads or started_folders:
        method, repeats = earlier.get("method"), earlier.get("repeats", settings.repeats)
        name = method.get("name") if isinstance(method, dict) else None
        reason = f"resume={settings.resume} is a run of"
        check(
            name in (None, settings.method.name),
            f"method={settings.method.name}: {reason} method={name}; leave out resume",
        )
        check(
            (repeats == 1) == (settings.repeats == 1),
            f"repeats={settings.repeats}: {reason} repeats={repeats}, whose heads would be replaced; leave out resume",
        )
    if settings.repeats > 1:
        for seed in range(settings.seed, settings.seed + settings.repeats):
            if ((run_folder := folder / f"seed-{seed}") / "heads" / HEADS).is_file():
                load_seed_pattern(run_folder, settings)
    if not started_folders:
        return {}, {}
    changeable = [*NOT_RECORDED, *CHANGEABLE, *STEP_SETTINGS, "method.prior_weight", "method.batch_tokens"]
    prior_started = any((run_folder / "prior" / SEARCH_FILE).is_file() for run_folder in started_folders)
    if not prior_started or not isinstance(requested["method"]["prior"], dict):
        changeable.append("method.prior")  # computed or read again
    changed = {key: values for key, values in differences(earlier, requested).items() if not in_groups(key, changeable)}
    check_unchanged(changed, f"resume={settings.resume}: it was made", "and its results so far depend on that")
    return earlier, replaced


def _has_progress(folder: Path) -> bool:
    """Whether a run folder, or that of a seed, holds results that a resumed run would not compute again."""
    saved = [folder / name / file for name in (".", "prior", "start") for file in (SEARCH_FILE, PRICES_FILE)]
    is_finished_seed = folder.name.startswith("seed-") and (folder / "heads" / HEADS).is_file()
    return is_finished_seed or any(path.is_file() for path in (folder / CHECKPOINT, *saved))


def finished_settings(earlier: EarlierSettings, requested: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The `STEP_SETTINGS` of a finished run, which stay, since no step is taken under today's."""
    settings = earlier[0]
    has_heads, max_steps = (folder / "heads" / HEADS).is_file(), requested["trainer"]["max_steps"]
    is_finished = has_heads and settings.get("trainer", {}).get("max_steps") == max_steps
    return {group: settings[group] for group in STEP_SETTINGS if is_finished and group in settings}


def replaced_settings(earlier: EarlierSettings, requested: dict[str, Any]) -> dict[str, Any]:
    """The values of a resumed run's first part that today's settings replace, by override."""
    settings, replaced = earlier
    changed = {key: old for key, (old, _) in differences(settings, requested).items() if in_groups(key, STEP_SETTINGS)}
    return changed | replaced if settings else {}


def load_seed_pattern(folder: Path, settings: TrainSettings) -> HeadPattern:
    """The pattern of a seed from an earlier part of the run; its settings must be those of the other seeds."""
    pattern = load_pattern(folder)
    changed = {
        key: values
        for key, values in differences(recorded_settings(pattern.provenance), plain(settings)).items()
        if key == MAX_STEPS or not in_groups(key, [*NOT_RECORDED, *CHANGEABLE, *STEP_SETTINGS])
    }
    description = f"resume={settings.resume}: {folder.name} was found"
    check_unchanged(changed, description, "and averaging both would be meaningless")
    return pattern
