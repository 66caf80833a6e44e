"""What libraries say, on one line, and packages that are missing."""

import pytest

from duo_id.common.errors import EXTRAS, NEEDS, MissingExtraError, UserError, check, first_line, naming_extras, one_line


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


def missing(name: str) -> ModuleNotFoundError:
    """What an import raises where no such module is installed."""
    return ModuleNotFoundError(f"No module named {name!r}", name=name)


@pytest.mark.parametrize(
    ("feature", "module", "extra"),
    [
        ("duo-id report", "matplotlib", "eval"),
        ("duo-id evaluate", "pandas", "eval"),
        ("duo-id train", "pandas", "train"),
        ("duo-id train", "optuna", "sweep"),
        ("duo-id benchmark", "accelerate", "train"),
        ("identify", "lightning", "train"),
        ("evaluate_pattern", "lm_eval", "lm-eval"),
    ],
)
def test_a_missing_package_is_one_line_with_the_command(feature: str, module: str, extra: str) -> None:
    with pytest.raises(MissingExtraError) as caught, naming_extras(feature):
        raise missing(module)
    assert isinstance(caught.value, UserError)
    assert isinstance(caught.value, ImportError)
    expected = f"{feature} needs {module}, which is not installed: pip install 'duo_id[{extra}]'"
    assert str(caught.value) == expected


def test_other_errors_of_imports_pass() -> None:
    for error in (missing("torch"), missing("lightning.pytorch.nowhere"), ImportError("cannot import name")):
        with pytest.raises(ImportError) as caught, naming_extras("train"):
            raise error
        assert caught.value is error


def test_features_name_extras() -> None:
    assert set(NEEDS.values()) <= set(EXTRAS.values())
