"""Patterns, other tools' files and reports serve where transformers and Lightning are of any release, or missing."""

import subprocess
import sys
from pathlib import Path

from duo_id.patterns.formats.registry import FORMATS
from tests.evaluate.saved import a_pattern, line_up, save, saved_results

BLOCKED = """
import runpy, sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("transformers", "lightning", "pytorch_lightning"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
"""
WORK = """
def command(name, *arguments):
    sys.argv = [name, *arguments]
    runpy.run_module(f"duo_id.{name}", run_name="__main__")

import duo_id

name = "SmolLM2-135M-Instruct"
assert name in duo_id.list_patterns()
pattern = duo_id.load_pattern(name)
assert isinstance(pattern, duo_id.HeadPattern)
assert isinstance(pattern.binarize(sparsity=0.5), duo_id.HeadMask)
duo_id.save_pattern(pattern, "saved")
assert duo_id.load_pattern("saved").scores.equal(pattern.scores)
endings = {"prulong": ".tsv", "retrieval-head": ".json", "headkv": ".json", "qrhead": ".yaml", "kvzip": ".pt"}
windows = ["sink_size=16", "recent_size=64", "lossy=true"]
shape = ["layers=30", "heads=9", "kv_heads=3"]
for format in sys.argv[1:]:
    file = format + endings.get(format, "")
    command("convert", name, file, f"format={format}", "heads=9", "lossy=true", "model=of/mine", "sparsity=0.5")
    back = [] if format in ("heads", "duo-attention", "lserve", "rlkv") else windows + shape
    command("convert", file, f"back-{format}", *back)
    assert duo_id.load_pattern(f"back-{format}").scores.shape == pattern.scores.shape
command("report", "run")
assert not {"transformers", "lightning", "pytorch_lightning"} & sys.modules.keys()
"""


def test_patterns_conversion_and_reports_need_neither_transformers_nor_lightning(tmp_path: Path) -> None:
    save(tmp_path / "run", saved_results(1, contenders=line_up()[:6], patterns={"found": a_pattern()}))
    formats = [name for name in FORMATS if name != "permuted-checkpoint"]  # it needs weights
    command = [sys.executable, "-c", BLOCKED + WORK, *formats]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "<html" in (tmp_path / "run" / "report.html").read_text()


TRAIN = """
import os
import hydra.main, torch._dynamo, torch.distributed.fsdp

for overrides in ([], ["logger=wandb"], ["~logger"]):
    if not (child := os.fork()):
        sys.argv = ["train", "model=tiny", "hydra.run.dir=run", *overrides]
        runpy.run_module("duo_id.train", run_name="__main__")
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def test_training_without_lightning_names_the_extra_in_one_line(tmp_path: Path) -> None:
    """With each kind of logger, in processes forked from one that has torch already."""
    command = [sys.executable, "-c", BLOCKED + TRAIN]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300)
    message = "error: duo-id train needs lightning, which is not installed: pip install 'duo_id[train]'\n"
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{message}2\n" * 3, "")
