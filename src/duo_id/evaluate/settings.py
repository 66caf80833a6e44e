"""The settings of `python -m duo_id.evaluate`: see conf/evaluate.yaml and the presets of conf/evaluation/."""

from dataclasses import field
from typing import Annotated, Literal

from duo_id.attention.choices import EVICTION_SCORES, KV_FORMATS
from duo_id.common.config import Count, Fraction, Positive, Seed, Several, Some, Text, one_of, settings
from duo_id.common.errors import check
from duo_id.data.settings import HaystackSettings
from duo_id.evaluate.tasks.names import check_tasks
from duo_id.models.settings import ModelSettings

BASELINES = ("streaming", "window")


@settings("data")
class EvaluationDataSettings:
    """The text that generated tasks are built from, and the location of RULER's published data."""

    haystack: HaystackSettings = field(default_factory=HaystackSettings)
    path: Text | None = None  # a folder with the files of ruler-data; null: the hub


@settings("")
class EvaluateSettings:
    """Which heads, on which tasks, compared with what."""

    heads: Text  # a run folder, its heads/ folder or a shipped name
    model: ModelSettings
    data: EvaluationDataSettings
    tasks: Some[Text]  # tasks and groups of tasks
    lengths: Some[Positive]  # tokens
    samples: Positive  # contexts per task and length
    depths: Positive  # needles per context, in tasks over a grid of depths
    sparsity: Several[Fraction]  # fractions of KV heads that stream
    random_masks: Count  # at each sparsity and share of the cache
    cache: Several[Fraction] = field(default_factory=list)  # shares of the full cache's bytes, at the length judged
    kv: Some[Annotated[Text, one_of(KV_FORMATS)]] = field(default_factory=lambda: ["exact"])  # of retrieval heads
    evict: Several[Annotated[Text, one_of(EVICTION_SCORES)]] = field(default_factory=list)  # from masks of those shares
    evict_split: Some[Fraction] = field(default_factory=lambda: [0.5])  # of a share c the mask keeps c^split
    baselines: Several[Literal["streaming", "window"]] = field(default_factory=list)  # at the bytes of each of both
    patterns: dict[str, Text] = field(default_factory=dict)  # other head patterns, by name
    split: Literal["development", "test"] = "test"
    generate: bool = True  # generate answers, besides scoring the right answer
    write: Count = 0  # tokens of a free text after each context, compared with what full attention writes
    chat_template: bool = False  # put context and question into the model's chat template
    batch_tokens: Positive | None = None  # of all contexts in memory at once; null: what fits
    chunk_size: Positive = 32768  # tokens per forward pass
    peers: bool = False  # write samples.jsonl for `duo-id peers`
    seed: Seed = 0
    resume: Text | None = None  # a run folder to resume

    def __post_init__(self) -> None:
        """Normalise values; what depends on the model is checked once it is loaded."""
        self.sparsity, self.lengths = sorted(set(self.sparsity)), sorted(set(self.lengths))
        self.cache, self.kv = sorted(set(self.cache), reverse=True), list(dict.fromkeys(self.kv))
        check(bool(self.sparsity or self.cache), "sparsity=[] leaves nothing to compare: give sparsity or cache")
        self.evict, self.evict_split = list(dict.fromkeys(self.evict)), sorted(set(self.evict_split))
        check(
            not self.evict or bool(self.cache),
            f"evict=[{','.join(self.evict)}]: give the shares to keep, such as cache=[0.5,0.25]",
        )
        check(
            not self.evict or "exact" in self.kv,
            f"evict=[{','.join(self.evict)}]: codes are not evicted: add exact to kv, or leave evict out",
        )
        check(0 not in self.cache, "cache=0 keeps nothing: give shares above 0")
        check(
            not self.peers or self.model.weights is None,
            f"peers=true: peers read the model's own weights: use model.weights=null, not {self.model.weights}",
        )
        check_tasks(self.tasks)
        reserved = {"full", "random", *BASELINES}
        for name in self.patterns:
            check(name not in reserved, f"patterns.{name}: {name} is a reserved name, choose another")
            check(
                not any(f" + {score}" in name for score in EVICTION_SCORES),
                f"patterns.{name}: rows of evict are called so, choose another",
            )
            kv = name.rpartition(" ")[2]
            check(
                name == kv or kv not in KV_FORMATS,
                f"patterns.{name}: rows of kv={kv} are called so, choose a name with another end",
            )
