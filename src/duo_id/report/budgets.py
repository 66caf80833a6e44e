"""What contenders are asked to keep: a share of the heads that see everything, or a share of the cache's bytes."""

from dataclasses import dataclass
from functools import cache as cached

import numpy as np
import pandas as pd

from duo_id.common.errors import UserError


@dataclass(frozen=True)
class Budget:
    """What a contender is asked for: one of the two, the other is None. Ordered from much to little, sparsities first.

    Attributes:
        sparsity: fraction of the KV heads that stream.
        cache: share of the full cache's bytes, at the length that is judged.
    """

    sparsity: float | None = None
    cache: float | None = None

    def __str__(self) -> str:
        return f"{100 * self.share:.4g}% {'stream' if self.cache is None else 'of cache'}"

    @property
    def share(self) -> float:
        """The number that was asked for."""
        share = self.sparsity if self.cache is None else self.cache
        assert share is not None
        return share

    @property
    def heading(self) -> str:
        """Of a table's column, in two lines."""
        return str(self).replace("% ", "%\n")

    @property
    def in_words(self) -> str:
        """For titles."""
        return f"{100 * self.share:.4g}% of {'the KV heads stream' if self.cache is None else 'the cache is kept'}"

    @property
    def columns(self) -> dict[str, float]:
        """Its numbers as columns of a table."""
        return {"sparsity": np.nan if self.sparsity is None else self.sparsity, "cache": self.cache or np.nan}

    def __lt__(self, other: "Budget") -> bool:
        return self._order < other._order

    @property
    def _order(self) -> tuple[bool, float]:
        return self.cache is not None, self.share if self.cache is None else -self.share


def with_budgets(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows with a column `budget`, made of their columns `sparsity` and `cache`, of which one is NaN.

    Raises:
        UserError: a row has both or neither.
    """
    if (rows["sparsity"].isna() == rows["cache"].isna()).any():
        raise UserError("these results are damaged: a row must have either a sparsity or a share of the cache")
    pairs = zip(rows["sparsity"], rows["cache"], strict=True)
    return rows.assign(budget=pd.Series([_budget(*pair) for pair in pairs], rows.index, dtype=object))


def budgets_of(rows: pd.DataFrame) -> list[Budget]:
    """The budgets of all contenders except full attention, in order."""
    return sorted(rows.loc[rows["kind"] != "full", "budget"].unique())


@cached
def _budget(sparsity: float, cache: float) -> Budget:
    return Budget(sparsity=sparsity) if np.isnan(cache) else Budget(cache=cache)
