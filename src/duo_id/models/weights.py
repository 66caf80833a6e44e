"""Around the reading of a model's weights: no bars in log files, and the damaged file where reading failed."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import StrictDataclassError
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars
from safetensors import SafetensorError, safe_open
from transformers.utils import logging

from duo_id.common.errors import UserError, first_line

DAMAGED = (SafetensorError, RuntimeError, KeyError, EOFError)  # what transformers raises for damaged files


@contextmanager
def quiet_without_terminal() -> Iterator[None]:
    """Let transformers and the hub's client show no bars in the block where there is no terminal to watch them on."""
    if sys.stderr.isatty() or not logging.is_progress_bar_enabled():
        yield
        return
    hub_shows_none = are_progress_bars_disabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()  # the hub's too
        if hub_shows_none:
            disable_progress_bars()


def damage_error(name: str, source: str, revision: str | None, error: Exception) -> UserError | None:
    """The error to show for one of `DAMAGED`, naming the file; None if the weight files are intact.

    Args:
        name: of the model, as in the override.
        source: the folder or hub id that it was read from.
        revision: on the hub.
        error: what transformers raised.
    """
    cached = try_to_load_from_cache(source, "config.json", revision=revision) if not Path(source).is_dir() else None
    folder = Path(cached).parent if isinstance(cached, str) else Path(source)
    advice = "copy it there again" if folder == Path(name) else f"remove {folder}, which is then created again"
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "pt") as file:
                for key in file.keys():  # noqa: SIM118
                    file.get_slice(key).get_shape()
        except (SafetensorError, OSError, KeyError) as read_error:
            return UserError(f"model.id={name}: {path} is damaged ({str(read_error) or 'it is empty'}): {advice}")
    if isinstance(error, SafetensorError) or "size mismatch" in str(error) or "mismatched" in str(error):
        reason = f"the weights in {folder} do not fit its config.json ({reason_of(error)})"
        return UserError(f"model.id={name}: {reason}: {advice}")
    if isinstance(error, KeyError):  # a failed lookup in transformers, such as the type of a rotary embedding
        return UserError(f"model.id={name}: {folder / 'config.json'} does not describe a model ({error!r}): {advice}")
    return None


def reason_of(error: Exception) -> str:
    """The first line of an error's message, or of its cause if it is a failed check of a config."""
    cause = error.__cause__ if isinstance(error, StrictDataclassError) else None
    return first_line(cause or error)
