import pytest

from duo_id.evaluate.metrics import METRICS, first_answer, lines, rules


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
    right = "says 北京12" if metric == "rules" else "北京12"
    assert METRICS[metric]("北京12", [right]) == 1
    assert METRICS[metric]("", [right]) == 0


def test_lines_are_judged_one_by_one_whatever_their_order() -> None:
    assert lines("b\nA.\n d", ["a", "b", "c", "d"]) == [True, True, False, True]
    assert METRICS["lines"]("b\nA.\n d", ["a", "b", "c", "d"]) == 0.75
    assert lines("", ["a"]) == [False]


def kept(text: str, *references: str) -> list[bool]:
    return rules(text, references)


def test_rules_by_hand() -> None:
    assert kept('{"a": 1}', "json a", "json b") == [True, False]
    assert kept('```json\n{\n "a": "x"\n}\n```', "json a") == [True]
    assert kept('{"a": 1, "b": 2}', "json a") == kept('It is {"a": 1}', "json a") == kept('["a"]', "json a") == [False]
    assert kept("[" * 10**5, "json a") == [False]
    assert kept(" Buenas tardes, Ida.", "begins Buenas tardes", "begins Hola") == [True, False]
    assert kept("It was red. tunina.\nWhat else?", "ends tunina") == kept("red\ntunina", "ends tunina") == [True]
    assert kept("tunina is red", "ends tunina") == [False]
    assert kept("IT WAS TUNINA", "says tunina", "avoids ruby", "capitals") == [True, True, True]
    assert kept("A Ruby", "avoids ruby", "capitals") == [False, False]
    assert kept(" ...\n", "avoids ruby", "capitals", "says a") == [False] * 3, "silence keeps no rule"
