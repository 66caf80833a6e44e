"""Our patterns in kvpress (github.com/NVIDIA/kvpress), which must be installed: `HeadPatternPress(heads="user/repo")`.

It runs where kvpress does, also under a transformers older than duo_id's own: it needs nothing but patterns.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvpress import DuoAttentionPress

from duo_id.patterns.files import load_pattern


@dataclass
class HeadPatternPress(DuoAttentionPress):
    """kvpress's DuoAttentionPress with the heads and windows of a pattern of ours.

    Like all of kvpress it attends in full while the context is read, and hides the entries of streaming heads
    afterwards; it frees nothing.

    Attributes:
        heads: what `duo_id.load_pattern` reads: a run folder, a shipped name, `user/repo`.
        sparsity: fraction of the KV heads of gated layers that stream: exactly those of `HeadPattern.binarize`.
    """

    heads: str | Path = ""
    sparsity: float = 0.5
    head_compression_ratio: float = field(init=False, default=0.0)  # known once the mask is
    on_the_fly_scoring: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        """Decide which heads stream."""
        self.mask = load_pattern(self.heads).binarize(sparsity=self.sparsity)
        self.sink_size, self.recent_size = self.mask.sink_size, self.mask.recent_size
        self.head_compression_ratio = float((~self.mask.retrieval).float().mean())

    def post_init_from_model(self, model: Any) -> None:
        """Put the mask beside the model; a `UserError` names both shapes if it does not fit."""
        config = model.config.get_text_config()
        name = config.name_or_path or type(model).__name__
        self.mask.check_fits(config.num_hidden_layers, config.num_key_value_heads, name)
        self.streaming_mask = ~self.mask.retrieval.to(model.device)
