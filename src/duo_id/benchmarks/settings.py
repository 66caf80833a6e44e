"""Typed settings of `python -m duo_id.benchmark`."""

from dataclasses import dataclass, field
from typing import Any

import torch
from omegaconf import MISSING

from duo_id.attention.blends import BLENDS
from duo_id.config import ModelSettings, StepSettings, require

TASKS = ("decode", "prefill", "memory", "train_step")


@dataclass
class LengthSettings:
    """The length of samples, under the name that training has for it."""

    length: int | None = None  # tokens; null: `context`


@dataclass
class BenchmarkSettings:
    """`python -m duo_id.benchmark`: see conf/benchmark.yaml."""

    model: ModelSettings = MISSING
    task: str = MISSING  # decode | prefill | memory | train_step
    context: list[int] = MISSING  # tokens: in the cache before a decode step, of a prompt, or of a training step
    data: LengthSettings = field(default_factory=LengthSettings)
    chunk_size: list[int] = MISSING  # prefill: tokens a forward
    sparsity: list[float] = MISSING  # fractions of KV heads that stream
    heads: str | None = None  # a run folder, its heads/ folder or a shipped name; null: heads drawn at random
    sink_size: int = MISSING  # tokens, of random heads; a pattern brings its own
    recent_size: int = MISSING  # tokens, the query's own among them
    step: StepSettings = field(default_factory=StepSettings)  # train_step: ours
    blend: list[str] = field(default_factory=lambda: ["student"])  # train_step: student | teacher | detached
    beside: bool = True  # train_step: the step in the published shape too, on one device
    profile: bool = False  # train_step: also where the time goes
    batch_size: int = 1  # samples, of all devices together
    trainer: dict[str, Any] = field(default_factory=lambda: {"_target_": "lightning.Trainer"})  # train_step: devices
    compare: str | None = None  # train_step: a run on one device, for the efficiency of several
    compile: bool | None = None  # null: on a GPU alone
    repeats: int = MISSING  # timed runs of each row
    warmup: int = MISSING  # runs before them
    seed: int = 0  # of random weights, heads, tokens and cached numbers

    def __post_init__(self) -> None:
        """Check names and ranges."""
        require(self.task in TASKS, f"task={self.task}: choose one of {', '.join(TASKS)}")
        if self.data.length is not None:
            self.context = [self.data.length]
        known = ("_target_", "accelerator", "devices", "num_nodes", "strategy")
        for key in self.trainer:
            require(
                key in known, f"trainer.{key}: benchmarks have no trainer; of its arguments, {', '.join(known[1:])}"
            )
        if self.task != "train_step":
            devices, nodes = self.trainer.get("devices", 1), self.trainer.get("num_nodes", 1)
            require((devices, nodes) == (1, 1), f"trainer.devices={devices}: task={self.task} works on 1 device")
            require(self.compare is None, f"compare={self.compare}: it is for task=train_step")
        require(bool(self.blend), "blend=[] must name at least one value")
        self.blend = list(dict.fromkeys(self.blend))
        for name in self.blend:
            require(name in BLENDS, f"blend={name}: choose from {', '.join(BLENDS)}")
        for key in ("context", "chunk_size", "sparsity"):
            values = getattr(self, key)
            require(bool(values), f"{key}=[] must name at least one value")
            setattr(self, key, sorted(set(values)))
            for value in values:
                share = key == "sparsity"
                fits, rule = (0 <= value <= 1, "lie in [0, 1]") if share else (value >= 1, "be at least 1 token")
                require(fits, f"{key}={value} must {rule}")
        for key, least in (("batch_size", 1), ("repeats", 1), ("warmup", 0), ("sink_size", 0), ("recent_size", 1)):
            require(getattr(self, key) >= least, f"{key}={getattr(self, key)} must be at least {least}")
        require(0 <= self.seed < 2**32, f"seed={self.seed} must lie in [0, 2^32)")
        if self.task == "train_step":
            window, shortest = self.sink_size + self.recent_size, self.context[0]
            require(
                window < shortest,
                f"sink_size + recent_size = {window} must be below context={shortest}, or nothing lies outside",
            )
            require(not self.step.cuda_graphs, "step.cuda_graphs=true: task=train_step measures steps without a graph")
            require(self.heads is None, f"heads={self.heads}: task=train_step trains the gates of all heads")

    def compiles(self, device: torch.device) -> bool:
        """Whether to compile on a device: as asked for, by default on a GPU alone."""
        return self.step.compile or (device.type == "cuda" if self.compile is None else self.compile)
