"""The settings of `python -m duo_id.evaluate`: see conf/evaluate.yaml and the presets of conf/evaluation/."""

from dataclasses import dataclass, field

from omegaconf import MISSING

from duo_id.config import HaystackSettings, ModelSettings, check_seed, fractions, require
from duo_id.evaluation.items import SPLITS

BASELINES = ("streaming", "window")


@dataclass
class EvaluationDataSettings:
    """The text that generated tasks are made of, and where published benchmarks lie."""

    haystack: HaystackSettings = field(default_factory=HaystackSettings)
    path: str | None = None  # a folder with the files of a published benchmark; null: the hub


@dataclass
class EvaluateSettings:
    """Which heads, on which tasks, beside what."""

    heads: str = MISSING  # a run folder, its heads/ folder or a shipped name
    model: ModelSettings = MISSING
    data: EvaluationDataSettings = MISSING
    tasks: list[str] = MISSING  # tasks and groups of tasks
    lengths: list[int] = MISSING  # tokens
    samples: int = MISSING  # contexts of each task and length
    depths: int = MISSING  # needles of a context, in the tasks that go over a grid
    sparsity: list[float] = MISSING  # fractions of KV heads that stream
    random_masks: int = MISSING  # at each sparsity
    baselines: list[str] = field(default_factory=list)  # streaming, window: at the bytes of each sparsity
    patterns: dict[str, str] = field(default_factory=dict)  # other head patterns, by the name they get
    split: str = "test"  # development | test
    generate: bool = True  # let the model answer, beside scoring the right answer
    chat_template: bool = False  # put context and question into the model's chat template
    batch_tokens: int | None = None  # of all contexts that are held at the same time; null: what fits
    chunk_size: int = 32768  # tokens of a forward
    peers: bool = False  # write samples.jsonl for `make peers`
    seed: int = 0
    resume: str | None = None  # a run folder to go on with

    def __post_init__(self) -> None:
        """Check ranges; what depends on the model is checked where it is known."""
        self.sparsity = fractions(self.sparsity)
        check_seed(self.seed)
        require(bool(self.tasks), "tasks=[] must name at least one task")
        require(bool(self.lengths), "lengths=[] must name at least one length, such as lengths=[2048]")
        self.lengths = sorted(set(self.lengths))
        for name, least in (("samples", 1), ("depths", 1), ("random_masks", 0), ("batch_tokens", 1), ("chunk_size", 1)):
            value = getattr(self, name)
            require(value is None or value >= least, f"{name}={value} must be at least {least}")
        require(self.lengths[0] >= 1, f"lengths={self.lengths} must be positive")
        require(self.split in SPLITS, f"split={self.split}: choose {' or '.join(SPLITS)}")
        for name in self.baselines:
            require(name in BASELINES, f"baselines={self.baselines}: choose among {', '.join(BASELINES)}")
        taken = {"full", "random", *BASELINES}
        for name in self.patterns:
            require(name not in taken, f"patterns.{name}: {name} means something else here, choose another name")
