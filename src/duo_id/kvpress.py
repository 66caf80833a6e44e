"""Our patterns in kvpress (github.com/NVIDIA/kvpress), which must be installed: `HeadPatternPress(heads="user/repo")`.

It runs wherever kvpress does, even with a transformers older than duo_id requires, because it only reads patterns.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvpress import DuoAttentionPress

from duo_id.patterns.saved import load_pattern


@dataclass
class HeadPatternPress(DuoAttentionPress):
    """kvpress's DuoAttentionPress with the heads and the window of one of our patterns.

    Like all of kvpress it uses full attention while it reads the context, and hides the entries of streaming heads
    afterwards; it frees no memory.

    Attributes:
        heads: anything that `duo_id.load_pattern` reads: a run folder, a shipped name, `user/repo`.
        sparsity: fraction of the KV heads of gated layers that stream: exactly those of `HeadPattern.binarize`.
    """

    heads: str | Path = ""
    sparsity: float = 0.5
    head_compression_ratio: float = field(init=False, default=0.0)  # set with the mask
    on_the_fly_scoring: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        """Decide which heads stream."""
        self.mask = load_pattern(self.heads).binarize(sparsity=self.sparsity)
        self.sink_size, self.recent_size = self.mask.sink_size, self.mask.recent_size
        self.head_compression_ratio = float((~self.mask.retrieval).float().mean())

    def post_init_from_model(self, model: Any) -> None:
        """Move the mask to the model's device; a `UserError` names both shapes if they differ."""
        config = model.config.get_text_config()
        name = config.name_or_path or type(model).__name__
        self.mask.check_fits(config.num_hidden_layers, config.num_key_value_heads, name)
        self.streaming_mask = ~self.mask.retrieval.to(model.device)
