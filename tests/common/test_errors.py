"""What libraries say, on one line."""

import pytest

from duo_id.common.errors import UserError, check, first_line, one_line


def test_reasons_are_one_line_without_control_characters() -> None:
    assert one_line(ValueError(" a\n\x1b[2J  b ")) == "a \ufffd[2J  b"
    assert one_line(ValueError("")) == "ValueError"
    assert one_line("x" * 500, 10) == "x" * 9 + "…"
    assert one_line("x" * 5000, None) == "x" * 5000


def test_the_first_line_is_the_first_with_something_in_it() -> None:
    assert first_line(ValueError("\n\n a\x1b\nb")) == "a\ufffd"
    assert first_line(KeyError()) == first_line(KeyError("")).replace("''", "KeyError") == "KeyError"
    assert len(first_line("x" * 500)) == 400


def test_a_condition_that_does_not_hold_is_an_error() -> None:
    check(True, "never")
    with pytest.raises(UserError, match=r"^seed=-1 is no seed$"):
        check(False, "seed=-1 is no seed")
