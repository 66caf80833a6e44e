import builtins
import random
from collections.abc import Sequence

import pytest

from duo_id.common.errors import UserError
from duo_id.evaluate import metrics
from duo_id.evaluate.metrics import METRICS, first_answer, judge


@pytest.mark.parametrize(
    ("text", "stop", "answer"),
    [
        (" amber\nThe next", "\n", " amber"),
        ("\n \t\n amber\n", "\n", " amber"),
        ("one\n\ntwo\n", None, "one\n\ntwo\n"),
        ("\n\none\ntwo", None, "one\ntwo"),
        ("one. two", ".", "one"),
        ("\n\n", "\n", ""),
        ("", "\n", ""),
    ],
)
def test_an_answer_ends_before_its_stop(text: str, stop: str | None, answer: str) -> None:
    assert first_answer(text, stop) == answer


@pytest.mark.parametrize(
    ("metric", "text", "references", "score"),
    [
        ("exact", " Amber Door. ", ["amber door"], 1),
        ("exact", "amber door", ["oak", "Amber door!"], 1),
        ("exact", "amber door, of course", ["amber door"], 0),
        ("exact", "the amber door", ["amber door"], 0),
        ("exact", "", ["amber"], 0),
        ("all", "It is 17 and 29.", ["17", "29", "31", "37"], 1 / 2),
        ("all", "AMBER, oak", ["amber", "Oak"], 1),
        ("any", "in PARIS, France", ["Rome", "Paris"], 1),
        ("any", "in Oslo", ["Rome", "Paris"], 0),
        # 2 words shared (old, mill), 3 found, 4 wanted; articles and punctuation are gone
        ("qa_f1", "The old mill, burnt", ["an old grey mill house"], 4 / 7),
        ("qa_f1", "the the mill mill", ["mill"], 2 / 3),
        ("qa_f1", "barn", ["mill", "a barn"], 1),
        ("qa_f1", "", ["mill"], 0),
        # the longest common subsequence is "the cat the mat"
        ("rouge_l", "the cat lay on the mat", ["the black cat sat under the mat"], 8 / 13),
        ("rouge_l", "mat the cat", ["cat the mat"], 2 / 6),
        ("rouge_l", "", ["cat"], 0),
        ("classification", "Type: City", ["City", "Country", "Food"], 1),
        ("classification", "Type: City or Food", ["City", "Country", "Food"], 1 / 2),
        ("classification", "Type: Food", ["City", "Country", "Food"], 0),
        ("classification", "Mountain range", ["Mountain range", "Mountain", "Range"], 1),
        ("classification", "Mountain", ["Mountain range", "Mountain"], 0),
        ("retrieval", "Paragraph 12", ["Paragraph 12"], 1),
        ("retrieval", "Paragraph 12, or perhaps 3", ["Paragraph 12"], 1 / 2),
        ("retrieval", "Paragraph 1", ["Paragraph 12"], 0),
        ("retrieval", "段落12", ["段落12"], 1),
        ("retrieval", "no paragraph", ["Paragraph 12"], 0),
        ("count", "7", ["7"], 1),
        ("count", "7 of 17 of 7 of 1", ["7"], 1 / 2),
        ("code", "\n# a comment\nreturn ab\nmore", ["return ab"], 1),
        # the longest common subsequence has 8 of 9 and 8 characters
        ("code", "return ab", ["return b"], 16 / 17),
        ("code", "```python\nx = 1\n```", ["x = 1"], 1),
        ("code", "// nothing but a comment", ["x = 1"], 0),
        ("choice", "The correct answer is (B)", ["B"], 1),
        ("choice", "**The correct answer is C**. A is wrong", ["C"], 1),
        ("choice", " (D) because A", ["D"], 1),
        ("choice", "B) because\n\nQuestion: another?\nThe correct answer is (C)", ["B"], 1),
        ("choice", "C)\nThe correct answer is (B)", ["B"], 0),
        ("choice", "A more careful reading shows (C) is right", ["A"], 0),
        ("choice", "A\nmore", ["A"], 1),
        ("choice", "B) so it is", ["B"], 1),
        ("choice", "Alas, B", ["B"], 0),
        ("choice", "Because", ["B"], 0),
        ("choice", "The correct answer is (A), not B", ["B"], 0),
    ],
)
def test_scores_worked_out_by_hand(metric: str, text: str, references: list[str], score: float) -> None:
    assert judge(metric, text, references) == pytest.approx(score)


@pytest.mark.parametrize(
    ("metric", "text", "references", "score"),
    [
        ("qa_f1_zh", "我爱北京", ["我爱上海"], 2 / 3),  # 我, 爱, 北京 and 我, 爱, 上海
        ("rouge_l_zh", "我爱北京", ["北京爱我"], 1 / 3),
        ("rouge_l_zh", "我爱北京", ["上海", "我爱北京"], 1),
    ],
)
def test_chinese_is_scored_by_words(metric: str, text: str, references: list[str], score: float) -> None:
    pytest.importorskip("jieba")
    assert judge(metric, text, references) == pytest.approx(score)


def test_punctuation_does_not_count_in_chinese() -> None:
    pytest.importorskip("jieba")
    assert judge("qa_f1_zh", "北京。", ["《北京》"]) == 1


def test_without_jieba_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def without_jieba(name: str, *args: object, **kwargs: object) -> object:
        if name == "jieba":
            raise ImportError
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_jieba)
    metrics._jieba.cache_clear()
    with pytest.raises(UserError, match=r"pip install 'duo_id\[longbench\]'"):
        judge("rouge_l_zh", "北京", ["北京"])
    metrics._jieba.cache_clear()


def longest_common(left: Sequence[str], right: Sequence[str]) -> int:
    """The textbook recursion, as a table."""
    table = [[0] * (len(right) + 1) for _ in range(len(left) + 1)]
    for i, a in enumerate(left):
        for j, b in enumerate(right):
            table[i + 1][j + 1] = table[i][j] + 1 if a == b else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


def test_rouge_l_and_code_similarity_equal_a_slow_reference() -> None:
    rng = random.Random(0)
    for _ in range(50):
        left, right = (rng.choices("abcd", k=rng.randint(1, 12)) for _ in range(2))
        wanted = 2 * longest_common(left, right) / (len(left) + len(right))
        assert judge("rouge_l", " ".join(left), [" ".join(right)]) == pytest.approx(wanted)
        assert judge("code", "".join(left), ["".join(right)]) == pytest.approx(wanted)


@pytest.mark.parametrize("metric", METRICS)
def test_every_metric_is_at_its_ends_where_it_should_be(metric: str) -> None:
    if metric.endswith("_zh"):
        pytest.importorskip("jieba")
    reference = "B" if metric == "choice" else "北京12"
    assert judge(metric, reference, [reference]) == 1
    assert judge(metric, "", [reference]) == 0
