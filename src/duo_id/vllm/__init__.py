"""Head masks in vLLM: a plug-in that serves a mask in an unmodified engine.

Every KV head becomes an attention layer of its own, so that vLLM's cache holds the blocks of each head separately;
those of streaming heads between sink and window are freed while a request runs. vLLM itself is imported by the modules
that subclass its classes alone.
"""

from typing import Any


def register(heads: Any, sparsity: float | None = None, threshold: float | None = None) -> None:
    """Let every engine that this process and its children start from here on serve under a head mask.

    Args:
        heads: a `HeadMask`, `HeadSpans` or `HeadPattern`, or the name or path of one as `DUO_ID_HEADS` takes it; None:
            serve without a mask again.
        sparsity: of a pattern, the fraction of its KV heads that stream.
        threshold: of a pattern of gates, below which heads stream.

    Raises:
        UserError: the heads cannot be read or served.
    """
    from duo_id.vllm.plugin import register

    register(heads, sparsity, threshold)
