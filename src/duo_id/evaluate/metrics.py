"""How right a generated answer is: from the answer and its references to a number from 0 to 1."""

import re
import string
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from functools import cache
from types import ModuleType

from rapidfuzz.distance import LCSseq
from rapidfuzz.fuzz import ratio

from duo_id.common.errors import UserError

Metric = Callable[[str, Sequence[str]], float]

CLOSING = ".,;:!?…"
PUNCTUATION = frozenset(string.punctuation)
LETTERS = "ABCD"


def judge(metric: str, text: str, references: Sequence[str]) -> float:
    """The score of a generated answer.

    Args:
        metric: a key of `METRICS`.
        text: the answer, cut where it ends; see `cut`.
        references: what the metric compares with, at least one.

    Raises:
        UserError: the metric needs a package that is not installed.
    """
    return METRICS[metric](text, references)


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


def qa_f1(text: str, references: Sequence[str]) -> float:
    """F1 of the words that answer and reference share, of the best reference.

    Words are compared without case, punctuation and articles (SQuAD: Rajpurkar et al. 2016, arXiv 1606.05250, section
    6.1), as LongBench does for English question answering (Bai et al. 2023, arXiv 2308.14508, section 3).
    """
    return max(_f1(_words(text), _words(reference)) for reference in references)


def qa_f1_zh(text: str, references: Sequence[str]) -> float:
    """`qa_f1` over the words that jieba finds in Chinese text (LongBench, arXiv 2308.14508, section 3)."""
    return max(_f1(_chinese_words(text), _chinese_words(reference)) for reference in references)


def rouge_l(text: str, references: Sequence[str]) -> float:
    """ROUGE-L, the F1 of the longest common subsequence of words, of the best reference.

    Lin 2004 (aclanthology.org/W04-1013, section 3.1) with equal weight for precision and recall; words are what blanks
    separate. LongBench's metric for summaries (arXiv 2308.14508, section 3); docs/benchmarks.md says what differs.
    """
    return max(_rouge_l(text.split(), reference.split()) for reference in references)


def rouge_l_zh(text: str, references: Sequence[str]) -> float:
    """`rouge_l` over the words that jieba finds in Chinese text (LongBench, arXiv 2308.14508, section 3)."""
    return max(_rouge_l(_segmented(text), _segmented(reference)) for reference in references)


def classification(text: str, references: Sequence[str]) -> float:
    """1 / (classes that the answer names) if the right one is among them, else 0.

    LongBench's accuracy of few-shot classification (arXiv 2308.14508, section 3).

    Args:
        text: the answer.
        references: the right class first, then all other classes. A class whose name is part of the right one's does
            not count as named.
    """
    right, *others = references
    named = [name for name in others if name in text and name not in right]
    return 1 / (1 + len(named)) if right in text else 0.0


def numbers(text: str, references: Sequence[str]) -> float:
    """The share of the numbers in the answer that are the reference's first number, of the best reference.

    LongBench's accuracy of counting passages and of finding one (arXiv 2308.14508, section 3).
    """
    found = re.findall(r"\d+", text)
    right = [re.findall(r"\d+", reference)[:1] for reference in references]
    return max(found.count(number) for first in right for number in first or [""]) / max(1, len(found))


def code_similarity(text: str, references: Sequence[str]) -> float:
    """Edit similarity of the answer's first line of code and the reference, of the best reference.

    LongBench's metric for code completion (arXiv 2308.14508, section 3): a line with a backtick or a comment is passed
    over. The similarity of two strings is 2 x (longest common subsequence) / (sum of lengths), in characters.
    """
    lines = (line for line in text.lstrip("\n").split("\n") if not re.search(r"`|#|//", line))
    line = next(lines, "")
    return max(ratio(line, reference) / 100 for reference in references)


def choice(text: str, references: Sequence[str]) -> float:
    """1 if the answer chooses the right letter, else 0.

    LongBench v2's accuracy (Bai et al. 2024, arXiv 2412.15204, section 4): the letter that the answer begins with, for
    the prompt ends in "The correct answer is (", else the first one after these words. "A" may be an article: a letter
    that is followed by another word is none.
    """
    text = text.replace("*", "")
    found = re.match(rf"\W*([{LETTERS}])(?:[).,:;]|\s*$|\s*\n)", text)
    found = found or re.search(rf"correct answer is:? *\(?([{LETTERS}])\b", text)
    return float(found is not None and found[1] in references)


METRICS: dict[str, Metric] = {
    "exact": exact,
    "all": contains_all,
    "any": contains_any,
    "qa_f1": qa_f1,
    "qa_f1_zh": qa_f1_zh,
    "rouge_l": rouge_l,
    "rouge_l_zh": rouge_l_zh,
    "classification": classification,
    "retrieval": numbers,
    "count": numbers,
    "code": code_similarity,
    "choice": choice,
}


def _bare(text: str) -> str:
    return text.strip().rstrip(CLOSING).rstrip().casefold()


def _words(text: str) -> list[str]:
    kept = "".join(letter for letter in text.lower() if letter not in PUNCTUATION)
    return re.sub(r"\b(?:a|an|the)\b", " ", kept).split()


def _chinese_words(text: str) -> list[str]:
    words = ("".join(filter(str.isalnum, word)) for word in _segmented(text.lower()))
    return [word for word in words if word]


def _segmented(text: str) -> list[str]:
    return [word for word in _jieba().lcut(text) if not word.isspace()]


@cache
def _jieba() -> ModuleType:
    try:
        import jieba
    except ImportError as error:
        raise UserError(
            "the metrics for Chinese need jieba: pip install 'duo_id[longbench]', or other tasks"
        ) from error
    jieba.setLogLevel("WARNING")
    return jieba


def _f1(found: Sequence[str], wanted: Sequence[str]) -> float:
    return _balanced((Counter(found) & Counter(wanted)).total(), found, wanted)


def _rouge_l(found: Sequence[Hashable], wanted: Sequence[Hashable]) -> float:
    return _balanced(LCSseq.similarity(found, wanted), found, wanted)


def _balanced(shared: int, found: Sequence[Hashable], wanted: Sequence[Hashable]) -> float:
    """The harmonic mean of precision and recall; 0 where nothing is shared."""
    return 2 * shared / (len(found) + len(wanted)) if shared else 0.0
