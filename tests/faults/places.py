"""What valid runs leave, made once by the commands themselves, for trials that go on from there."""

import hashlib
import json
import shutil
from pathlib import Path

from tests.faults.worker import Worker

RUN_MODULE = "tests.faults.worker:run"
DATA_GEN = str(Path(__file__).parents[2] / "data_gen" / "write.py")
DATA = (
    "model=tiny data=passkey data.length_min=700 data.length_max=700 data.num_lengths=1 data.num_passkeys=1 "
    "data.passkey_words=1"
).split()
TRAIN = [
    *DATA,
    *(
        "method.sink_size=4 method.recent_size=60 trainer.accelerator=cpu trainer.max_steps=1 "
        "trainer.val_check_interval=1 comparison.samples=1 comparison.validation_samples=0 comparison.random_masks=0 "
        "sparsity=[0.5]"
    ).split(),
]
EVALUATE = (
    "model=tiny tasks=[short] lengths=[600] samples=1 depths=1 sparsity=[0.5] random_masks=0 baselines=[] "
    "data/haystack=embedded"
).split()
BENCHMARK = "model=tiny context=[64] sparsity=[0.5] sink_size=4 recent_size=8 repeats=1 warmup=0".split()
FOREIGN = {  # the file of each format of other tools
    "rlkv": "rlkv",
    "prulong": "prulong.tsv",
    "retrieval-head": "retrieval-head.json",
    "headkv": "headkv.json",
    "qrhead": "qrhead.yaml",
    "kvzip": "kvzip.pt",
}
STEP = ["task=train_step", "blend=[student]"]
MADE = {  # by the name of its folder: the module and its arguments; each may read what stands above
    "RUN": ("duo_id.train", [*TRAIN, "method=duo", "hydra.run.dir=RUN"]),
    "EVALUATION": (
        "duo_id.evaluate",
        [
            *EVALUATE,
            "heads=RUN",
            "tasks=[needle-words,short]",
            "generate=true",
            "peers=true",
            "hydra.run.dir=EVALUATION",
        ],
    ),
    "BENCHMARK": ("duo_id.benchmark", [*BENCHMARK, "hydra.run.dir=BENCHMARK"]),
    "STEPS": ("duo_id.benchmark", [*BENCHMARK, *STEP, "hydra.run.dir=STEPS"]),
    "SEARCH": (
        "duo_id.train",
        [*TRAIN, "method=search", "method.samples=1", "method.heads_per_round=3", "hydra.run.dir=SEARCH"],
    ),
    "SWEEP": ("duo_id.train", ["-m", *TRAIN, "method=random", "seed=0,1", "hydra.sweep.dir=SWEEP"]),
    "DATASET": (DATA_GEN, [*DATA, "out=DATASET", "n=2", "n_validation=1", "n_test=1"]),
}


def make(worker: Worker, folder: Path, runs: bool = True) -> Path:
    """Make all places in `folder`, which is returned, or without `runs` those that no command has to run for."""
    folder.mkdir(parents=True)
    for name, (module, arguments) in MADE.items() if runs else ():
        ended = worker.call(RUN_MODULE, module, *arguments, cwd=folder, seconds=120)
        assert ended.status == 0, f"{name}: {ended.output}"
    ended = worker.call("tests.faults.places:make_others", str(folder), cwd=folder, seconds=120)
    assert ended.status == 0, ended.output
    return folder


def make_others(folder: str) -> None:
    """Make what no command writes: head patterns, models, answers of peers, others' scores, texts and benchmarks."""
    import pandas as pd
    import torch
    import zstandard

    from duo_id.models.loading import byte_tokenizer
    from duo_id.patterns.formats.options import Options
    from duo_id.patterns.formats.registry import FORMATS
    from duo_id.patterns.pattern import HeadPattern
    from duo_id.patterns.saved import save_pattern
    from tests.models.test_wheels import write_gguf
    from tests.patterns.formats.cases import CASES
    from tests.support.tiny import tiny_model

    place = Path(folder)
    (place / "FILE").write_text("hello\n")
    (place / "EMPTY").mkdir()
    model = {"name": "tiny", "id": "tiny", "layers": 3, "kv_heads": 2, "heads": 4}
    scores = torch.tensor([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7]])
    save_pattern(HeadPattern(scores, 4, 60, provenance={"model": model}), place / "HEADS", [0.5])
    other = HeadPattern(scores[:, :1], 4, 60, provenance={"model": model | {"kv_heads": 1}})
    save_pattern(other, place / "OTHER_HEADS", [0.5])
    tiny_model("llama", vocab_size=258, num_hidden_layers=1).save_pretrained(place / "WEIGHTS")
    byte_tokenizer().save_pretrained(place / "WEIGHTS")
    info = place / "WHEEL" / "duo_id_test_weights-1.2.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: duo-id-test-weights\nVersion: 1.2\n")
    (info / "RECORD").write_text("tiny.gguf,,\nduo_id_test_weights-1.2.dist-info/RECORD,,\n")
    write_gguf(place / "WHEEL" / "tiny.gguf")
    if (place / "EVALUATION").is_dir():
        shutil.copytree(place / "EVALUATION", place / "ANSWERS")
        _write_answers(place / "ANSWERS")
    (place / "FOREIGN").mkdir()
    options = Options(sparsity=0.5, sink_size=4, recent_size=60, heads=6)
    for name, file in FOREIGN.items():
        FORMATS[name].write(CASES["random"], place / "FOREIGN" / file, options)
    (place / "FOREIGN" / "rlkv" / "heads.json").unlink()
    shutil.copytree(place / "HEADS", place / "DUO")
    (place / "DUO" / "heads.json").unlink()
    texts = [f"The {number}th mill stands by the river. " * 30 for number in range(20)]
    rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (place / "TEXTS").mkdir()
    (place / "TEXTS" / "text.txt").write_text("\n\n".join(texts))
    (place / "TEXTS" / "text.jsonl").write_text(rows)
    (place / "TEXTS" / "text.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(rows.encode()))
    pd.DataFrame({"text": texts}).to_parquet(place / "TEXTS" / "text.parquet")
    needle = {"input": f"{texts[0]}\nWhich number?", "outputs": ["7"], "answer_prefix": ""}
    (place / "RULER" / "2000" / "niah_single_1").mkdir(parents=True)
    (place / "RULER" / "2000" / "niah_single_1" / "test.jsonl").write_text(json.dumps(needle) + "\n")
    pd.DataFrame([needle | {"task": "vt"}]).to_parquet(place / "RULER" / "2000" / "test.parquet")
    (place / "TASKS").mkdir()
    (place / "TASKS" / "task.jsonl").write_text(
        json.dumps({"text": "The sky is", "choices": [" blue", " red"], "right": 0})
    )
    (place / "TASKS" / "task.yaml").write_text(
        "task: sky\ndataset_path: json\ndataset_kwargs: {data_files: {test: TASKS/task.jsonl}}\ntest_split: test\n"
        "output_type: multiple_choice\ndoc_to_text: '{{text}}'\ndoc_to_choice: choices\ndoc_to_target: right\n"
        "target_delimiter: ''\n"
    )


def _write_answers(folder: Path) -> None:
    """What a peer would have answered, all of it wrong."""
    samples = (folder / "samples.jsonl").read_bytes()
    header, *items = map(json.loads, samples.decode().splitlines())
    digest = hashlib.sha256(samples).hexdigest()
    lines = [{"schema": "duo_id/answers", "version": 1, "samples": digest, "press": "snapkv", "note": "window 64"}]
    for item in items:
        measured = {"loss": 1.5, "kl": 0.25, "correct": 0, "full_loss": 1.0, "bytes": 300, "full_bytes": 400}
        questions = [
            {"question": number, "tokens": len(one["answer"]), "generated": None if one["place"] else [9]} | measured
            for number, one in enumerate(item["questions"])
        ]
        sample = {key: item[key] for key in ("task", "length", "index")}
        lines.append(sample | {"sparsity": header["sparsities"][0], "questions": questions})
    (folder / "answers-snapkv.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def lay_out(places: Path, into: Path, words: str) -> None:
    """Copy the places that a text mentions into the folder of a trial."""
    for place in places.iterdir():
        if place.name in words:
            (shutil.copytree if place.is_dir() else shutil.copy)(place, into / place.name)
