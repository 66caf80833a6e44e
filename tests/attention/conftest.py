"""Token ids that tests of whole models share."""

import pytest
import torch
from torch import Tensor

TOKENS = 70


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(3, 96, (2, TOKENS), generator=torch.Generator().manual_seed(1))
