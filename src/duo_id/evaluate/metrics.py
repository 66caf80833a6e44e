"""How right a generated answer is: from the answer and its references to a number from 0 to 1."""

import re
from collections.abc import Callable, Sequence

Metric = Callable[[str, Sequence[str]], float]

CLOSING = ".,;:!?…"


def first_answer(text: str, stop: str | None) -> str:
    """A generated answer from its first line that is not blank, up to before `stop` (None: all of it)."""
    text = re.sub(r"\A(?:[^\S\n]*\n)+", "", text)
    return text if stop is None else text.partition(stop)[0]


def exact(text: str, references: Sequence[str]) -> float:
    """1 if the answer is one of the references, but for case, blanks around it and closing punctuation; else 0."""
    return float(_bare(text) in map(_bare, references))


def contains_all(text: str, references: Sequence[str]) -> float:
    """The share of references that occur in the answer, whatever the case.

    RULER's recall of all outputs (Hsieh et al. 2024, arXiv 2404.06654, section 4), in its code `string_match_all`.
    """
    text = text.casefold()
    return sum(reference.casefold() in text for reference in references) / len(references)


def contains_any(text: str, references: Sequence[str]) -> float:
    """1 if at least one reference occurs in the answer, whatever the case; else 0.

    RULER's metric for question answering (arXiv 2404.06654, section 4), in its code `string_match_part`.
    """
    text = text.casefold()
    return float(any(reference.casefold() in text for reference in references))


METRICS: dict[str, Metric] = {"exact": exact, "all": contains_all, "any": contains_any}


def _bare(text: str) -> str:
    return text.strip().rstrip(CLOSING).rstrip().casefold()
