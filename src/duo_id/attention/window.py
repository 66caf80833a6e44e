"""What a streaming head sees: the single definition that everything else is tested against."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from duo_id.common.documents import MOST_TOKENS
from duo_id.common.errors import UserError

if TYPE_CHECKING:  # settings have a window and are checked before torch is imported
    from torch import Tensor


@dataclass(frozen=True)
class Window:
    """What a streaming head keeps of the past (StreamingLLM, Xiao et al. 2023; DuoAttention, section 2.1).

    Attributes:
        sink_size: how many of the first tokens stay visible.
        recent_size: how many of the most recent tokens are visible, including the query's own.
    """

    sink_size: int
    recent_size: int

    def __post_init__(self) -> None:
        """Reject sizes out of range."""
        if not 0 <= self.sink_size <= MOST_TOKENS:
            raise UserError(f"method.sink_size={self.sink_size} must be from 0 to {MOST_TOKENS}")
        if not 1 <= self.recent_size <= MOST_TOKENS:
            raise UserError(
                f"method.recent_size={self.recent_size} must be from 1 (a token sees itself) to {MOST_TOKENS}"
            )

    def sees(self, query: Any, key: Any) -> Any:
        """Whether the query at one position sees the key at another.

        Args:
            query: position of the query among a sample's real tokens (int or integer tensor).
            key: position of the key, broadcast against `query`.

        Returns:
            bool or bool tensor of the broadcast shape.
        """
        return (key <= query) & ((key < self.sink_size) | (query - key < self.recent_size))

    def dense(self, queries: "Tensor", keys: "Tensor") -> "Tensor":
        """The pattern as a bool matrix (queries, keys) for two vectors of positions; for small sizes only."""
        return cast("Tensor", self.sees(queries[:, None], keys[None, :]))
