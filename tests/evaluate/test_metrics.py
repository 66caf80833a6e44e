import pytest

from duo_id.evaluate.metrics import METRICS, first_answer


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
    ],
)
def test_scores_worked_out_by_hand(metric: str, text: str, references: list[str], score: float) -> None:
    assert METRICS[metric](text, references) == pytest.approx(score)


@pytest.mark.parametrize("metric", METRICS)
def test_every_metric_is_at_its_ends_where_it_should_be(metric: str) -> None:
    assert METRICS[metric]("北京12", ["北京12"]) == 1
    assert METRICS[metric]("", ["北京12"]) == 0
