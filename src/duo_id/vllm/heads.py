"""How far the heads see that vLLM is to serve: from an environment variable, which its processes inherit."""

from pathlib import Path
from typing import Any

from duo_id.common.documents import as_object, parse_json, read_object
from duo_id.common.errors import UserError
from duo_id.patterns.decided import decided
from duo_id.patterns.saved import load_pattern
from duo_id.patterns.spans import SCHEMA, HeadSpans
from duo_id.vllm.choices import VARIABLE


def read_spans(text: str) -> HeadSpans:
    """The spans that a value of `DUO_ID_HEADS` stands for.

    Args:
        text: `SOURCE@SPARSITY` with a shipped name, run, folder, file or repo of the hub, such as
            `SmolLM2-135M-Instruct@0.5`; or the path, or the contents, of a file that `HeadSpans.save` wrote.

    Raises:
        UserError: there are no such heads, or the sparsity is missing or wrong.
    """
    if text.lstrip().startswith("{"):
        return HeadSpans.from_contents(as_object(parse_json(text, VARIABLE), VARIABLE), VARIABLE)
    source, sparsity = split_sparsity(text)
    if sparsity is None and _holds_spans(source):
        return HeadSpans.from_pretrained(source)
    pattern = load_pattern(source)
    if sparsity is None:
        raise UserError(f"{VARIABLE}={text}: say how many heads stream, such as {VARIABLE}={text}@0.5")
    return as_spans(pattern, sparsity)


def split_sparsity(text: str) -> tuple[str, float | None]:
    """`SOURCE@0.5` as source and sparsity; None if what follows the last @ is no number, as a revision of the hub."""
    source, _, last = text.rpartition("@")
    try:
        return (source, float(last)) if source else (text, None)
    except ValueError:
        return text, None


def as_spans(heads: Any, sparsity: float | None = None, threshold: float | None = None) -> HeadSpans:
    """The spans of a mask, of spans, of a pattern, or of what names one; see `duo_id.vllm.register`.

    Raises:
        UserError: `heads` is none of these.
    """
    if isinstance(heads, str | Path):
        if sparsity is None and threshold is None:
            return read_spans(str(heads))
        heads = load_pattern(heads)
    mask = decided(heads, sparsity, threshold)
    return HeadSpans(mask.spans, mask.sink_size, mask.gated_layers)


def _holds_spans(source: str) -> bool:
    path = Path(source).expanduser()
    return path.suffix == ".json" and path.is_file() and read_object(path).get("schema") == SCHEMA
