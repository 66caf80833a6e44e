"""Parse a memory budget such as `60GiB`."""

import re

from duo_id.common.errors import UserError

UNITS = {"GiB": 2**30, "MiB": 2**20, "GB": 10**9, "MB": 10**6}


def memory_bytes(memory: str) -> int | None:
    """Bytes of a budget such as `60GiB`; None for `auto`, `outputs` and `least`.

    Raises:
        UserError: `memory` is neither.
    """
    if memory in ("auto", "outputs", "least"):
        return None
    match = re.fullmatch(rf"([0-9.]+) ?({'|'.join(UNITS)})", memory)
    try:
        return int(float(match[1]) * UNITS[match[2]])  # type: ignore[index]
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"step.memory={memory}: choose auto, outputs, least, or a budget such as 60GiB") from None
