"""`python peers/run.py RUN_FOLDER key=value`: the questions of an evaluation under kvpress's token eviction.

It reads `samples.jsonl` of the run folder and writes `answers-PRESS.jsonl` beside it, which duo_id judges. It knows
duo_id by these files alone, since kvpress wants an older transformers.
"""

import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from answers import ANSWERS_SCHEMA, VERSION, Answers, Json, Mistake, load_samples
from presses import PEERS, SHARED_NOTE, Budget
from reading import compare, force, generate, read
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

USAGE = "python peers/run.py RUN_FOLDER [presses=snapkv,tova] [sparsity=0.5] [samples=4] [tasks=...] [generate=false]"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
console = Console()

Todo = list[tuple[str, float]]  # presses and sparsities


@dataclass
class Options:
    """The command line.

    Attributes:
        folder: a run folder with `samples.jsonl`.
        presses: names from `PEERS`.
        sparsity: of those in the samples' header; None: all.
        samples: only samples with a lower index; None: all.
        tasks: only these; None: all.
        generate: whether answers are generated; None: as in the samples' header.
        device: where the model runs.
    """

    folder: Path
    presses: list[str]
    sparsity: list[float] | None = None
    samples: int | None = None
    tasks: list[str] | None = None
    generate: bool | None = None
    device: str = DEVICE


def parse(arguments: Sequence[str]) -> Options:
    """The command line, checked.

    Raises:
        Mistake: it cannot be understood.
    """
    folders = [argument for argument in arguments if "=" not in argument]
    if len(folders) != 1:
        raise Mistake(f"give one run folder: {USAGE}")
    options = Options(Path(folders[0]), [name for name in PEERS if name != "kvzip"])
    readers: dict[str, Callable[[str], Any]] = {
        "presses": lambda text: text.split(","),
        "sparsity": lambda text: [float(part) for part in text.strip("[]").split(",")],
        "samples": int,
        "tasks": lambda text: text.split(","),
        "generate": lambda text: {"true": True, "false": False}[text.lower()],
        "device": str,
    }
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals:
            continue
        if key not in readers:
            raise Mistake(f"{key}= is no option, these are: {', '.join(readers)}")
        try:
            setattr(options, key, readers[key](value))
        except (ValueError, KeyError):
            raise Mistake(f"{argument} cannot be understood: {USAGE}") from None
    for name in options.presses:
        if name not in PEERS:
            raise Mistake(f"presses={name}: choose among {', '.join(PEERS)}")
    return options


@dataclass
class Examiner:
    """Asks a model the questions of items.

    Args:
        model: the language model.
        tokenizer: its tokenizer.
        header: of the samples.
        generates: whether answers are generated.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    header: Json
    generates: bool

    def reference(self, item: Json) -> dict[int, tuple[list[Tensor], int]]:
        """Of full attention: logits of each question's answer and bytes of the cache, by the context's length."""
        found = {}
        for tokens, questions in contexts(item).items():
            held = read(self.model, item["context"][:tokens], None)
            logits = [force(self.model, held, prompt, asked["answer"]) for _, prompt, asked in questions]
            found[tokens] = logits, held.bytes
        return found

    def answer(self, item: Json, name: str, sparsity: float, reference: dict[int, tuple[list[Tensor], int]]) -> Json:
        """The line of one item, press and sparsity."""
        share = self.header["shares"][self.header["sparsities"].index(sparsity)]
        windows = self.header["sink_size"], self.header["recent_size"]
        answered: dict[int, Json] = {}
        for tokens, questions in contexts(item).items():
            budget = Budget(tokens, share, *windows, self.header["chat_template"])
            held = read(self.model, item["context"][:tokens], PEERS[name].make(budget), PEERS[name].eager)
            full, full_bytes = reference[tokens]
            for (number, prompt, asked), logits in zip(questions, full, strict=True):
                measured = compare(force(self.model, held, prompt, asked["answer"]), logits, asked["answer"])
                generated = None
                if self.generates and item["max_new_tokens"] and asked["place"] is None:
                    limits = item["max_new_tokens"], item["stop"]
                    generated = generate(self.model, self.tokenizer, held, prompt, *limits)
                sizes = {"bytes": held.bytes, "full_bytes": full_bytes}
                answered[number] = {"question": number} | measured | {"generated": generated} | sizes
        return _origin(item, sparsity) | {"questions": [answered[number] for number in sorted(answered)]}


def contexts(item: Json) -> dict[int, list[tuple[int, list[int], Json]]]:
    """The questions by the length of the context that is read before them: number, prompt and question.

    Where an answer stands inside the context, only what is before it is read, and the last token of that is the prompt.
    """
    found: dict[int, list[tuple[int, list[int], Json]]] = {}
    for number, asked in enumerate(item["questions"]):
        place, context = asked["place"], item["context"]
        tokens = len(context) if place is None else place - 1
        if tokens < 1:
            raise ValueError(f"question {number} leaves no context to read")
        found.setdefault(tokens, []).append((number, asked["prompt"] if place is None else [context[tokens]], asked))
    return found


def examine(examiner: Examiner, todo: Sequence[tuple[Json, Todo]], files: dict[str, Answers]) -> int:
    """Answer all items; the number of failures, each of which is told and leaves the others alone."""
    failures, told = 0, set()
    columns = (BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TextColumn("left:"), TimeRemainingColumn())
    with Progress(TextColumn("{task.description}"), *columns, console=console, transient=True) as progress:
        bar = progress.add_task("", total=sum(len(item["context"]) * len(missing) for item, missing in todo))
        for item, missing in todo:
            reference = None
            for name, sparsity in missing:
                progress.update(bar, description=f"{item['task']} at {item['length']}: {name}")
                reason = ""
                try:
                    reference = reference or examiner.reference(item)
                    line = examiner.answer(item, name, sparsity, reference)
                except Exception as error:  # whatever a press may raise, and what does not fit the memory
                    reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
                if reason:
                    failures += 1
                    torch.cuda.empty_cache()  # here no traceback holds tensors any more
                    line = _origin(item, sparsity) | {"error": reason}
                    if (name, reason) not in told:
                        told.add((name, reason))
                        console.print(f"{name} failed on {item['task']} at {item['length']}: {escape(reason)}")
                files[name].add(line)
                progress.advance(bar, len(item["context"]))
    return failures


def _origin(item: Json, sparsity: float) -> Json:
    return {key: item[key] for key in ("task", "length", "index")} | {"sparsity": sparsity}


def load_model(header: Json, device: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and tokenizer that the samples were made for.

    Raises:
        Mistake: they cannot be loaded.
    """
    source, options = header["model"], {"revision": header["revision"]}
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        dtype, target = getattr(torch, header["dtype"]), {"": torch.device(device)}
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, device_map=target, **options)
    except (OSError, ValueError, RuntimeError) as error:
        raise Mistake(f"the model {source} cannot be loaded on {device}: {' '.join(str(error).split())}") from None
    return model.eval().requires_grad_(False), tokenizer


def run(options: Options) -> int:
    """Answer what is not answered yet; the number of failures."""
    header, items, digest = load_samples(options.folder, options.tasks, options.samples)
    for value in options.sparsity or []:
        if value not in header["sparsities"]:
            raise Mistake(f"sparsity={value} is not among those of the samples: {header['sparsities']}")
    sparsities = options.sparsity or header["sparsities"]
    generates = header["generate"] if options.generate is None else options.generate
    versions = {name: version(name) for name in ("kvpress", "transformers", "torch")}
    files = {}
    for name in options.presses:
        peer = PEERS[name]
        shared = {"schema": ANSWERS_SCHEMA, "version": VERSION, "samples": digest, "press": name}
        notes = {"settings": peer.settings(), "note": f"{SHARED_NOTE}; {peer.note}", "versions": versions}
        files[name] = Answers(options.folder / f"answers-{name}.jsonl", shared | notes)
    todo: list[tuple[Json, Todo]] = []
    for item in items:
        pairs = [(name, sparsity) for name in files for sparsity in sparsities]
        missing = [pair for pair in pairs if not files[pair[0]].has(item, pair[1], generates)]
        if missing:
            todo.append((item, missing))
    if not todo:
        return 0
    return examine(Examiner(*load_model(header, options.device), header, generates), todo, files)


def main(arguments: Sequence[str]) -> int:
    """Run the command; the exit status: 2 for a mistake of the user, 130 after Ctrl-C."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("kvpress").setLevel(logging.ERROR)
    try:
        options = parse(arguments)
        failures = run(options)
    except Mistake as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        return 2
    except OSError as error:  # a full disk
        print(f"error: {error}; the same command goes on", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130
    lost = f", {failures} failed" if failures else ""
    console.print(f"answers: {options.folder}/answers-*.jsonl{lost}", soft_wrap=True)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
