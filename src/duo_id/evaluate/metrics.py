"""How right a generated answer is: from the answer and its references to a number from 0 to 1."""

import json
import re
from collections.abc import Callable, Sequence

Metric = Callable[[str, Sequence[str]], float]
Pieces = Callable[[str, Sequence[str]], list[bool]]  # whether each reference is met

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


def lines(text: str, references: Sequence[str]) -> list[bool]:
    """For each reference, whether it is a line of the answer, but for case, blanks around it and closing punctuation.

    Where it stands does not count: a line left out costs one piece, not all that follow.
    """
    written = set(map(_bare, text.split("\n")))
    return [_bare(reference) in written for reference in references]


def rules(text: str, references: Sequence[str]) -> list[bool]:
    """For each rule, a name of `RULES` with its argument, whether the answer keeps it. One without words keeps none."""
    kept = []
    for rule in references:
        name, _, argument = rule.partition(" ")
        kept.append(bool(re.search(r"\w", text)) and RULES[name](text, argument))
    return kept


def _is_json(text: str, key: str) -> bool:
    """Whether the answer, or the code block that it is, begins with a JSON object of that single key."""
    start = re.sub(r"\A\s*```\w*", "", text).strip()
    try:
        contents, _ = json.JSONDecoder().raw_decode(start)
    except (ValueError, RecursionError):
        return False
    return isinstance(contents, dict) and list(contents) == [key]


def _ends(text: str, word: str) -> bool:
    """Whether the answer or its first line, as models without a chat template write on, ends with a word."""
    return any(_bare(part).endswith(word.casefold()) for part in (text, text.strip().partition("\n")[0]))


RULES: dict[str, Callable[[str, str], bool]] = {
    "json": _is_json,
    "begins": lambda text, words: text.strip().casefold().startswith(words.casefold()),
    "ends": _ends,
    "says": lambda text, words: words.casefold() in text.casefold(),
    "avoids": lambda text, words: words.casefold() not in text.casefold(),
    "capitals": lambda text, _: text.strip().partition("\n")[0].isupper(),
}
PIECEWISE: dict[str, Pieces] = {"lines": lines, "rules": rules}


def _share_of(pieces: Pieces) -> Metric:
    """The metric that is the share of references met."""

    def share(text: str, references: Sequence[str]) -> float:
        return sum(pieces(text, references)) / len(references)

    return share


METRICS: dict[str, Metric] = {"exact": exact, "all": contains_all, "any": contains_any}
METRICS |= {name: _share_of(pieces) for name, pieces in PIECEWISE.items()}


def _bare(text: str) -> str:
    return text.strip().rstrip(CLOSING).rstrip().casefold()
