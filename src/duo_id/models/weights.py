"""Which file of a model's weights is damaged, where reading them ends in an error of another kind."""

from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open

from duo_id.common.errors import UserError, first_line

DAMAGED = (SafetensorError, RuntimeError, KeyError, EOFError)  # what transformers lets through of a damaged file


def damage(name: str, source: str, revision: str | None, error: Exception) -> UserError | None:
    """The error to show for one of `DAMAGED`, which names the file; None if the files of the weights are whole.

    Args:
        name: of the model, as the override has it.
        source: the folder or the hub id that it was read from.
        revision: on the hub.
        error: what transformers raised.
    """
    cached = try_to_load_from_cache(source, "config.json", revision=revision) if not Path(source).is_dir() else None
    folder = Path(cached).parent if isinstance(cached, str) else Path(source)
    again = "copy it there again" if folder == Path(name) else f"remove {folder} and it is made again"
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "pt") as file:
                for key in file.keys():  # noqa: SIM118
                    file.get_slice(key).get_shape()
        except (SafetensorError, OSError, KeyError) as found:
            return UserError(f"model.id={name}: {path} is damaged ({str(found) or 'it is empty'}): {again}")
    if isinstance(error, SafetensorError) or "size mismatch" in str(error) or "mismatched" in str(error):
        reason = f"the weights in {folder} do not fit its config.json ({reason_of(error)})"
        return UserError(f"model.id={name}: {reason}: {again}")
    if isinstance(error, KeyError):  # a name that transformers looks up, such as a kind of rotary embedding
        return UserError(f"model.id={name}: {folder / 'config.json'} does not describe a model ({error!r}): {again}")
    return None


def reason_of(error: Exception) -> str:
    """The first line of an error, or of what lies behind a failed check of a config."""
    cause = error.__cause__ if isinstance(error, StrictDataclassError) else None
    return first_line(cause or error)
