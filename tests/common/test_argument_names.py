"""What Python programs read in messages: arguments in place of overrides."""

import pytest

from duo_id.common.argument_names import argument_names, naming_arguments
from duo_id.common.errors import UserError


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("raise data.length_max", "raise lengths[1]"),
        ("data.length_max=5 must not be below data.length_min=9", "lengths[1]=5 must not be below lengths[0]=9"),
        ("lower data.length_max (lengths, in an evaluation) or", "lower lengths or"),
        ("lower trainer.max_steps", "lower steps"),
        ("method.lr=0, method.objective.kl=0", "lr=0, objective.kl=0"),
        ("method@method.prior=NAME, or method.prior=DIR", "prior=NAME, or prior=DIR"),
        ("method.name=x: choose one of", "method=x: choose one of"),
        ("(data/haystack=file data.haystack.path=FILE)", "(data.haystack.source=file data.haystack.path=FILE)"),
        ("; +model.config.sliding_window=null treats", "; sliding_window=None in the model's config treats"),
        ("step.memory, data.batch_size, trainer.max_steps_x", "step.memory, data.batch_size, trainer.max_steps_x"),
        ("method=nested and my.method.lr", "method=nested and my.method.lr"),
    ],
)
def test_overrides_become_arguments(message: str, expected: str) -> None:
    assert argument_names(message) == expected
    with pytest.raises(UserError) as caught, naming_arguments():
        raise UserError(message)
    assert str(caught.value) == expected


def test_other_errors_stay() -> None:
    with pytest.raises(KeyError, match=r"data\.length_max"), naming_arguments():
        raise KeyError("data.length_max")
