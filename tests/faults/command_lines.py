"""Bad command lines, drawn by seed from a grammar of the settings.

A line with a value that means nothing must end in one line that names its override; other lines may run.
"""

import random
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice, zip_longest
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.faults import places, settings
from tests.faults.settings import Domain
from tests.faults.worker import Ended, Worker, fresh, worker

Outcome = tuple[str, str, str, str]  # name, command that reproduces it, outcome, detail
FRESH = 20  # one line in so many is run in a process of its own
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@dataclass(frozen=True)
class Line:
    """A command line.

    Attributes:
        module: of `python -m`, or a file.
        base: arguments that are fine.
        bad: those that are tried.
        blames: what an error may name, one of these at least; for a line that may run too.
        refused: whether it must be.
    """

    module: str
    base: tuple[str, ...]
    bad: tuple[str, ...]
    blames: tuple[str, ...]
    refused: bool = True

    @property
    def name(self) -> str:
        return f"{'data_gen' if self.module.endswith('.py') else self.module.rpartition('.')[2]}: {' '.join(self.bad)}"

    @property
    def typed(self) -> str:
        """As one types it."""
        start = ["python", self.module] if self.module.endswith(".py") else ["python", "-m", self.module]
        return shlex.join([*start, *self.base, *self.bad])


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")


def singles(module: str, base: Iterable[str], domains: Mapping[str, Domain]) -> Iterator[Line]:
    """Each setting with each of its wrong and odd values."""
    base = tuple(base)
    for key, domain in domains.items():
        for refused, given in ((True, domain.wrong), (False, domain.odd)):
            for value in given:
                bare = key.lstrip("+")
                kept = tuple(one for one in base if _key(one) != bare)
                yield Line(module, kept, (f"{key}={value}",), (bare,), refused)


def together(module: str, base: Iterable[str], pairs: Iterable[str], choices: bool = True) -> Iterator[Line]:
    """Overrides that are wrong only together."""
    for pair in pairs:
        bad = tuple(pair.split())
        keys = {_key(one) for one in bad}
        yield Line(module, tuple(one for one in base if _key(one) not in keys), bad, tuple(keys))


TRAIN_PAIRS = """
data.length_min=900 data.length_max=800
method.sink_size=400 method.recent_size=400
data.depth_min=0.9 data.depth_max=0.1
data.curriculum=4 data.num_lengths=1
data.length_min=5000 data.length_max=6000
data.num_passkeys=50 data.passkey_words=50
step.shape=paper step.memory=auto
step.cuda_graphs=true data.batch_size=2
data.task=disk data.path=null
data.task=disk data.path=EMPTY
data.task=disk data.path=FILE
data.task=mixture data.mixture={}
data.task=mixture data.mixture={passkey:0}
data.haystack.source=file data.haystack.path=null
data.haystack.source=file data.haystack.path=not/there
data.haystack.source=file data.haystack.path=EMPTY
data.haystack.source=file data.haystack.path=RUN
data.haystack.source=hub data.haystack.id=null
data.haystack.source=hub data.haystack.id=abc/abc
data.haystack.source=library data.haystack.split=train
model.init=random model.architecture={}
model.id=EMPTY model.init=pretrained
model.id=FILE model.init=pretrained
model.id=not/there model.init=pretrained
step.sequence_parallel=3 trainer.devices=1
step.sequence_parallel=2 trainer.devices=2
model.architecture.num_attention_heads=4 model.architecture.num_key_value_heads=3
trainer.accelerator=gpu trainer.devices=1
model.architecture.hidden_size=33 model.architecture.head_dim=null
""".strip().splitlines()
GATE_PAIRS = """
method.target_sparsity=0.5 method.penalty=l1
method.penalty=target method.target_sparsity=null
method.penalty=target method.target_sparsity=0.5 method.reg_weight=0
method.blend=teacher method.objective=next_token
method.gate=nested method.reg_weight=1
method.gate=nested method.budgets=[1,1] method.reg_weight=0
trainer.max_steps=1 +trainer.max_epochs=1
repeats=2 seed=4294967295
step.cuda_graphs=true trainer.accelerator=cpu
""".strip().splitlines()
SEARCH_PAIRS = """
method.max_swaps=2 method.swap_at=null
method.swap_at=0.5 method.max_swaps=0
method.swap_at=0.5 method.max_swaps=1 repeats=2
method.between=[0.2,0.8] method.start=null
method.start=OTHER_HEADS method.between=[0.2,0.8]
""".strip().splitlines()
EVALUATE_PAIRS = """
lengths=[5000] tasks=[short,needle-words]
lengths=[10] tasks=[needle-words]
depths=1000000 tasks=[needle-words]
heads=HEADS model=smollm2-135m
heads=HEADS patterns={a:OTHER_HEADS}
heads=HEADS patterns={HEADS:RUN}
tasks=[ruler-data/niah_single_1] data.path=EMPTY
tasks=[ruler-data/vt] data.path=FILE
tasks=[ruler-data/vt] data.path=not/there
data.haystack.source=file data.haystack.path=EMPTY
chat_template=true model=tiny
write=3
resume=EVALUATION seed=3
resume=EVALUATION split=development
""".strip().splitlines()
BENCHMARK_PAIRS = """
task=decode trainer.devices=2
task=decode compare=STEPS
task=train_step compare=BENCHMARK
task=train_step step.cuda_graphs=true
task=train_step heads=HEADS
task=train_step context=[10]
task=train_step context=[64] sink_size=60 recent_size=8
task=decode heads=OTHER_HEADS
task=decode context=[100000]
task=train_step step.sequence_parallel=2
""".strip().splitlines()
DATA_GEN_PAIRS = """
n=0 n_validation=0 n_test=0
data.length_min=900 data.length_max=800
data.task=disk data.path=DATASET
data.haystack.source=library n=1
""".strip().splitlines()


def mistyped(module: str, base: Iterable[str], setting: str, groups: Iterable[str]) -> Iterator[Line]:
    """What is no override of a setting: wrong signs, unknown names, unknown choices, the same one twice."""
    base = tuple(base)
    plain = [
        setting,
        "=3",
        "+=3",
        "~",
        "abc=1",
        "+abc=1",
        "++abc=1",
        "~abc",
        f"{setting}.abc=1",
        f"{setting}:3",
        "a b=1",
    ]
    plain += [
        f"{setting}==3",
        f"{setting}=1,2",
        f"{setting}=[1",
        f"{setting}='1",
        f"+{setting}=1",
        "☃=1",
        "model.abc=1",
    ]
    plain += ["+model.abc=1", "++model.abc=1", "~model.abc", "~model.id", f"~{setting}=77", "abc/def=1", "abc@def=ghi"]
    plain += ["hydra.run.dir=FILE", "hydra.abc=1", "hydra.run.dir=FILE/below", "hydra.run.dir=/proc/made", "/=1", "."]
    for one in plain:
        yield Line(module, base, (one,), (_key(one), one))
    for group in groups:
        for value in ("abc", "[abc]", "1", "{}", "../train", "???", "''", "nan", "[[a]]", "a/b"):
            kept = tuple(given for given in base if _key(given) != group)
            yield Line(module, kept, (f"{group}={value}",), (group,))
    yield Line(module, base, ("model=tiny", "model=hub"), ("model",))
    yield Line(module, base, (f"{setting}=1", f"{setting}=2"), (setting,))
    yield Line(module, base, ("--abc",), ("--abc",))
    yield Line(module, base, (f"--{setting}", "3"), (f"--{setting}",))
    yield Line(module, base, ("-x",), ("-x",))


REPORT = {  # arguments, and what an error may name
    "": ("FOLDER",),
    "not/there": ("not/there",),
    "FILE": ("FILE",),
    "EMPTY": ("EMPTY",),
    "DATASET": ("DATASET",),
    "HEADS": ("HEADS",),
    "BENCHMARK": ("BENCHMARK",),
    "EVALUATION/scores.jsonl": ("scores.jsonl",),
    "EVALUATION/figures": ("figures",),
    "EVALUATION abc=1": ("abc",),
    "EVALUATION out=EMPTY": ("out",),
    "EVALUATION out=FILE/below.html": ("FILE",),
    "EVALUATION out=/proc/made/page.html": ("/proc/made",),
    "EVALUATION out=": ("out",),
    "EVALUATION reference=abc": ("reference",),
    "EVALUATION reference=": ("reference",),
    "EVALUATION out=a out=b": ("out",),
    "EVALUATION not/there": ("not/there",),
    "EVALUATION --out=a": ("--out",),
    "RUN reference=abc": ("reference",),
    "EVALUATION =1": ("=1",),
    "☃": ("☃",),
}
CONVERT = {
    "": ("SRC",),
    "HEADS": ("DST",),
    "not/there made": ("not/there",),
    "FILE made": ("FILE",),
    "EMPTY made": ("EMPTY",),
    "DATASET made": ("DATASET",),
    "HEADS HEADS": ("HEADS",),
    "HEADS FILE": ("FILE",),
    "HEADS EMPTY format=kvzip lossy=true": ("EMPTY",),
    "HEADS FILE/below": ("FILE",),
    "HEADS /proc/made": ("/proc/made",),
    "HEADS made more": ("more",),
    "HEADS made format=abc": ("format",),
    "HEADS made format=": ("format",),
    "HEADS made lossy=abc": ("lossy",),
    "HEADS made format=kvzip": ("lossy",),
    "HEADS made abc=1": ("abc",),
    "HEADS made --lossy": ("--lossy",),
    "HEADS made =1": ("=1",),
    "HEADS made layers=4": ("layers",),
    "HEADS made kv_heads=5": ("kv_heads",),
    "HEADS made format=headkv lossy=true heads=5": ("heads",),
    "HEADS made format=qrhead lossy=true heads=4": ("sparsity",),
    "HEADS made format=heads format=kvzip": ("format",),
    **{
        f"HEADS made sparsity={value}": ("sparsity",)
        for value in ("nan", "inf", "-1", "2", "abc", "", "1e400", "[0.5]")
    },
    **{f"HEADS made cache={value} length=9": ("cache",) for value in ("nan", "0", "-1", "2", "abc", "", "[0.5]")},
    "HEADS made cache=0.5": ("length",),
    "HEADS made length=9": ("cache",),
    "HEADS made cache=0.5 length=0": ("length",),
    "HEADS made cache=0.5 length=1.5": ("length",),
    "HEADS made cache=0.5 length=9 sparsity=0.5": ("sparsity",),
    **{
        f"HEADS made {key}={value}": (key,)
        for key in ("heads", "sink_size", "layers")
        for value in ("nan", "-1", "1.5", "abc", "", settings.HUGE, "[1]", "true")
    },
}
LM_EVAL = {
    "sparsity=0.5": ("heads",),
    "heads=not/there": ("not/there",),
    "heads=FILE": ("FILE",),
    "heads=EMPTY": ("EMPTY",),
    "heads=": ("heads",),
    "heads=OTHER_HEADS,model=tiny": ("OTHER_HEADS", "heads"),
    "heads=HEADS,model=abc": ("model",),
    "heads=HEADS,model=": ("model",),
    "heads=HEADS,model=hub": ("model",),
    "heads=HEADS,model=tiny,pretrained=abc": ("model",),
    "heads=HEADS,pretrained=not/there": ("pretrained",),
    "heads=HEADS,pretrained=EMPTY": ("pretrained",),
    "heads=HEADS,pretrained=FILE": ("pretrained",),
    "heads=HEADS,model=tiny,abc=1": ("abc",),
    "heads=HEADS,model=tiny,dtype=abc": ("dtype",),
    "heads=HEADS,model=tiny,weights=abc": ("weights",),
    "heads=HEADS,pretrained=EMPTY,weights=int8": ("weights",),
    "heads=HEADS,model=tiny,batch_size=0": ("batch_size",),
    "heads=HEADS,model=tiny,batch_size=abc": ("batch_size",),
    "heads=HEADS,model=tiny,max_length=-1": ("max_length",),
    "heads=HEADS,model=tiny,max_length=abc": ("max_length",),
    "heads=HEADS,model=tiny,device=abc": ("device",),
    "heads=HEADS,model=tiny,revision=abc": ("revision",),
    **{
        f"heads=HEADS,model=tiny,sparsity={value}": ("sparsity",)
        for value in ("nan", "inf", "-1", "2", "abc", "", "1e400", "None", "True", "[0.5]")
    },
}


def command_lines() -> dict[str, list[Line]]:
    """All bad lines that the grammar has, by command."""
    train, evaluate, benchmark = "duo_id.train", "duo_id.evaluate", "duo_id.benchmark"
    of_train = [*places.TRAIN, "method=random"]
    of_gates = [*places.TRAIN, "method=duo"]
    lines = {
        "train": [
            *singles(train, of_train, settings.TRAIN),
            *together(train, of_train, TRAIN_PAIRS),
            *mistyped(train, of_train, "seed", ("model", "data", "method", "step", "trainer", "logger", "experiment")),
        ],
        "gates": [
            *singles(train, of_gates, settings.TRAINER),
            *together(train, of_gates, GATE_PAIRS),
            *together(train, [*places.TRAIN, "method=search", "method.samples=1"], SEARCH_PAIRS),
        ],
        "evaluate": [
            *singles(evaluate, [*places.EVALUATE, "heads=HEADS"], settings.EVALUATE),
            *together(evaluate, [*places.EVALUATE, "heads=HEADS"], EVALUATE_PAIRS),
            *mistyped(evaluate, [*places.EVALUATE, "heads=HEADS"], "seed", ("model", "evaluation")),
        ],
        "benchmark": [
            *singles(benchmark, places.BENCHMARK, settings.BENCHMARK),
            *together(benchmark, places.BENCHMARK, BENCHMARK_PAIRS),
            *mistyped(benchmark, places.BENCHMARK, "seed", ("model", "step", "preset")),
        ],
        "data_gen": [
            *singles(
                places.DATA_GEN, [*places.DATA, *"out=made n=1 n_validation=0 n_test=0".split()], settings.DATA_GEN
            ),
            *together(places.DATA_GEN, [*places.DATA, "out=made"], DATA_GEN_PAIRS),
            *mistyped(places.DATA_GEN, [*places.DATA, "out=made", "n=1"], "seed", ("model", "data")),
        ],
        "report": [Line("duo_id.report", (), tuple(words.split()), names) for words, names in REPORT.items()],
        "convert": [Line("duo_id.convert", (), tuple(words.split()), names) for words, names in CONVERT.items()],
        "lm_eval": [
            Line(
                "duo_id.lm_eval",
                tuple("--model duo_id --include_path TASKS --tasks sky --model_args".split()),
                (words,),
                names,
            )
            for words, names in LM_EVAL.items()
        ],
    }
    for name, domains in settings.METHODS.items():
        base = [*places.TRAIN, f"method={name}", *["method.samples=1"] * ("method.samples" in domains)]
        lines["gates"] += singles(train, base, domains)
    return lines


def drawn(seed: int, n: int) -> Iterator[Line]:
    """`n` lines, of all commands in turn, those of train twice as often."""
    rng = random.Random(seed)
    lines = command_lines()
    for one in lines.values():
        rng.shuffle(one)
    turns = [lines[name] for name in ("train", "gates", "evaluate", "benchmark", "data_gen")]
    few = [*lines["report"], *lines["convert"], *lines["lm_eval"]]
    rng.shuffle(few)
    mixed = (line for turn in zip_longest(*turns, few) for line in turn if line is not None)
    yield from islice(mixed, n)


def judged(ended: Ended, blames: Iterable[str], refused: bool) -> tuple[str, str]:
    """The outcome of a trial and what to say of it.

    Args:
        ended: how it ended.
        blames: what an error may name.
        refused: whether the trial must be.
    """
    output = ESCAPES.sub("", ended.output)
    lines = [line.rstrip() for line in output.splitlines() if line.strip()]
    last = lines[-1] if lines else ""
    if ended.status is None:
        return "hang", " < ".join(line.strip() for line in lines if line.startswith('  File "'))[:800]
    if "Traceback (most recent call last)" in output or "Error executing job" in output or ended.status not in (0, 2):
        return "traceback", f"status {ended.status}: {last[:300]}" if "Traceback" in output else output[-600:]
    if ended.status == 0:
        return ("silent", f"expected an error about {', '.join(blames)}") if refused else ("ran", "")
    if not last.startswith("error: ") or sum(line.startswith("error: ") for line in lines) != 1:
        return "traceback", f"not one line of error: {' / '.join(lines[-4:])[-600:]}"
    if not any(_named(name, last) for name in blames):
        return "blames another", last
    return "refused", last


def _named(name: str, told: str) -> bool:
    """Whether an error names an override, or its group and in some other place the rest, or a file."""
    group, dot, rest = name.rpartition(".")
    whole = re.search(rf"(?<![\w.]){re.escape(name)}(?!\w)", told)
    apart = re.search(rf"\b{rest.replace('_', '[_ ]')}\b", told) if "." in group and dot else None
    return bool(whole) or (apart is not None and _named(group, told))


def tried(line: Line, place: Worker | None, made: Path, folder: Path) -> Outcome:
    """What comes of a command line, in a forked process, or without a worker in one of its own."""
    with TemporaryDirectory(dir=folder, prefix="trial-") as above:
        cwd = Path(above) / made.name  # names of runs have this one in them
        cwd.mkdir()
        places.lay_out(made, cwd, " ".join([*line.base, *line.bad]))
        if place is None:
            ended = fresh(["-m"] * (not line.module.endswith(".py")) + [line.module, *line.base, *line.bad], cwd)
        else:
            ended = place.call(places.RUN_MODULE, line.module, *line.base, *line.bad, cwd=cwd)
    return (line.name, line.typed, *judged(ended, line.blames, line.refused))


def command_line_trials(seed: int, n: int) -> Iterator[Outcome]:
    """Try `n` bad command lines.

    Returns:
        for each its name, the command that reproduces it, the outcome (refused, ran, traceback, hang, silent, blames
        another) and a detail.
    """
    with TemporaryDirectory(prefix="grammar-") as folder, worker(Path(folder)) as place:
        made = places.make(place, Path(folder) / "places")
        for number, line in enumerate(drawn(seed, n)):
            alone = number % FRESH == FRESH - 1
            yield tried(line, None if alone else place, made, Path(folder))
