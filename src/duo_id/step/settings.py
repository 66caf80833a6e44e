"""Settings of a training step: see conf/step/.

What imports torch is imported where it is used, so that mistakes in settings are answered at once.
"""

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, TypeAdapter, ValidationError

from duo_id.attention.choices import FULL_BACKENDS, STREAMING_BACKENDS
from duo_id.common.config import (
    Positive,
    Text,
    one_of,
    settings,
)
from duo_id.common.errors import check
from duo_id.step.budget import memory_bytes

if TYPE_CHECKING:
    from duo_id.attention.functions import Backends


def _budget(value: str) -> str:
    memory_bytes(value)
    return value


def _switch(value: Any) -> bool | str:
    """True, false or auto: pydantic would name the parts of a union in its message."""
    if value == "auto":
        return value
    try:
        return TypeAdapter(bool).validate_python(value)
    except ValidationError as error:
        raise ValueError(" must be true, false or auto") from error


@settings("step")
class StepSettings:
    """How a training step is computed: see conf/step/."""

    shape: Literal["fast", "paper"] = "fast"  # paper: teacher and student in one batch, as DuoAttention's code has it
    memory: Annotated[Text, AfterValidator(_budget)] = "auto"  # auto: what the GPU has; a budget such as 60GiB;
    # outputs or least: see duo_id.step.recompute
    compile: bool = False  # norms, MLP, projections and blends of all layers
    full_backend: Annotated[Text, one_of(FULL_BACKENDS)] = "auto"
    streaming_backend: Annotated[Text, one_of(STREAMING_BACKENDS)] = "auto"
    cuda_graphs: Annotated[bool | Literal["auto"], BeforeValidator(_switch)] = (
        "auto"  # replay the step as one graph per length; auto: lengths of which that is faster
    )
    length_multiple: Positive = 1024  # tokens, to which lengths are padded for CUDA graphs
    sequence_parallel: Positive = 1  # processes that share the tokens of each sample
    shard: bool = True  # with several processes, each keeps only a shard of the weights (FSDP2)

    def __post_init__(self) -> None:
        """Check that the settings go together."""
        check(
            self.shape == "fast" or self.memory == "least",
            f"step.shape=paper needs step.memory=least, not {self.memory}: step=paper_shape sets both",
        )

    @property
    def backends(self) -> "Backends":
        """Implementations of attention."""
        from duo_id.attention.functions import Backends

        return Backends(self.full_backend, self.streaming_backend, self.compile)
