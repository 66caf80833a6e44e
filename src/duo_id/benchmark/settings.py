"""Typed settings of `python -m duo_id.benchmark`, which are checked without importing torch."""

from dataclasses import field
from typing import TYPE_CHECKING, Annotated, Literal

from duo_id.attention.choices import BLEND_NAMES, KV_FORMATS
from duo_id.common.config import LARGEST, Count, Fraction, Positive, Seed, Several, Some, Text, one_of, settings
from duo_id.common.errors import check
from duo_id.models.settings import ModelSettings
from duo_id.step.settings import StepSettings
from duo_id.train.trainer import Trainer, TrainerSettings

if TYPE_CHECKING:
    import torch

TRAINER_KEYS = ("_target_", "accelerator", "devices", "num_nodes", "strategy")  # trainer arguments that choose devices


@settings("data")
class LengthSettings:
    """The length of samples, under its name in training."""

    length: Positive | None = None  # tokens; null: `context`


@settings("")
class BenchmarkSettings:
    """`python -m duo_id.benchmark`: see conf/benchmark.yaml."""

    model: ModelSettings
    task: Literal["decode", "prefill", "memory", "train_step"]
    context: Some[Positive]  # tokens: cached before a decode step, of a prompt, or of a training step
    chunk_size: Some[Positive]  # prefill: tokens per forward pass
    sparsity: Some[Fraction]  # fractions of KV heads that stream
    sink_size: Count  # tokens, for random heads; a pattern has its own
    recent_size: Positive  # tokens, the query's own included
    repeats: Positive  # timed runs per row
    warmup: Count  # runs before them
    data: LengthSettings = field(default_factory=LengthSettings)
    spans: Several[Positive] = field(default_factory=list)  # windows of different sizes, beside the masks of `sparsity`
    shares: Several[Fraction] = field(
        default_factory=list
    )  # of the KV heads, that have each; the others see all tokens
    heads: Text | None = None  # a run folder, its heads/ folder or a shipped name; null: heads drawn at random
    kv: Some[Annotated[Text, one_of(KV_FORMATS)]] = field(default_factory=lambda: ["exact"])  # of retrieval heads
    step: StepSettings = field(default_factory=StepSettings)  # train_step: ours
    blend: Some[Annotated[Text, one_of(BLEND_NAMES)]] = field(default_factory=lambda: ["student"])  # train_step
    beside: bool = True  # full attention too, or on one device the step in the published shape
    profile: bool = False  # decode, prefill, train_step: also where the time goes
    first_context: Positive | None = None  # train_step: tokens of the first step, which compiles; null: `context`
    batch_size: Positive = 1  # samples across all devices
    trainer: Trainer = field(
        default_factory=lambda: TrainerSettings(_target_="lightning.Trainer")
    )  # train_step: devices
    compare: Text | None = None  # train_step: a run on one device, for the efficiency of several
    compile: bool | None = None  # null: on a GPU alone
    seed: Seed = 0  # of random weights, heads, tokens and cached numbers

    def __post_init__(self) -> None:
        """Normalise values, and check that they fit together."""
        if self.data.length is not None:
            self.context = [self.data.length]
        for key in self.trainer:
            check(
                key in TRAINER_KEYS,
                f"trainer.{key}: benchmarks have no trainer and use only its {', '.join(TRAINER_KEYS[1:])}",
            )
        if self.task != "train_step":
            devices, nodes = self.trainer.get("devices", 1), self.trainer.get("num_nodes", 1)
            check((devices, nodes) == (1, 1), f"trainer.devices={devices}: task={self.task} works on 1 device")
            check(self.compare is None, f"compare={self.compare}: only task=train_step uses it")
        check(
            len(self.spans) == len(self.shares) and sum(self.shares) <= 1 + 1e-6,
            f"spans={self.spans} shares={self.shares}: give each span its share of the KV heads, together at most 1",
        )
        self.blend, self.kv = list(dict.fromkeys(self.blend)), list(dict.fromkeys(self.kv))
        for key in ("context", "chunk_size", "sparsity"):
            setattr(self, key, sorted(set(getattr(self, key))))
        if self.task == "train_step":
            window, shortest = self.sink_size + self.recent_size, min(self.context[0], self.first_context or LARGEST)
            name = "first_context" if shortest < self.context[0] else "context"
            check(
                window < shortest,
                f"sink_size + recent_size = {window} must be below {name}={shortest}, or the window hides nothing",
            )
            check(
                self.step.cuda_graphs is not True,
                "step.cuda_graphs=true: task=train_step measures steps without a graph",
            )
            check(self.kv == ["exact"], f"kv={self.kv}: task=train_step has no cache")
            check(self.heads is None, f"heads={self.heads}: task=train_step trains the gates of all heads")
            check(not self.spans, f"spans={self.spans}: task=train_step has one window, sink_size and recent_size")

    def compiles(self, device: "torch.device") -> bool:
        """Whether to compile on a device: as set, by default only on a GPU."""
        return self.step.compile or (device.type == "cuda" if self.compile is None else self.compile)
