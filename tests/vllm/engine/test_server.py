"""The OpenAI-compatible server, started as a user starts it, under the heads of a run, and a client of OpenAI's."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from duo_id import HeadPattern, save_pattern
from duo_id.models.tokenizers import byte_tokenizer
from tests.vllm.engine.cases import answers, load, save_tiny

PATTERN = HeadPattern(torch.rand(4, 4, generator=torch.Generator().manual_seed(0)), sink_size=16, recent_size=48)
TEXTS = ["a needle in a haystack, " * 30, "hay " * 100, "short"]
# What `vllm serve` runs: that command itself asks for a distribution named vllm, which a build for CPUs is not.
COMMAND = [
    sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--dtype=float32", "--max-model-len=2048",
    "--block-size=32", "--enforce-eager", "--max-num-batched-tokens=256", "--host=127.0.0.1", "--model",
]  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PreTrainedModel]:
    folder = tmp_path_factory.mktemp("server")
    save_tiny("llama", folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    save_pattern(PATTERN, folder / "run" / "heads")
    return folder, load(folder / "model")


def environment(heads: str) -> dict[str, str]:
    usual = {"DUO_ID_HEADS": heads, "VLLM_LOGGING_LEVEL": "INFO", "VLLM_NO_USAGE_STATS": "1"}
    return {name: text for name, text in os.environ.items() if name != "VLLM_ENABLE_V1_MULTIPROCESSING"} | usual


@pytest.fixture(scope="module")
def server(model: tuple[Path, PreTrainedModel]) -> Iterator[tuple[str, list[str]]]:
    """The server's address, and what it printed until it was ready."""
    folder = model[0]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [*COMMAND, folder / "model", f"--port={port}", "--served-model-name=tiny"]
    with subprocess.Popen(
        list(map(str, command)),
        env=environment(f"{folder / 'run'}@0.5"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        printed = []
        for line in process.stdout:
            printed.append(line)
            if "Application startup complete" in line:
                break
        try:
            assert process.poll() is None, "".join(printed)
            yield f"http://127.0.0.1:{port}/v1", printed
        finally:
            process.terminate()
            process.communicate(timeout=60)


def test_clients_side_by_side_are_told_what_duo_attention_says(
    server: tuple[str, list[str]], model: tuple[Path, PreTrainedModel]
) -> None:
    openai = pytest.importorskip("openai")
    tokenizer = byte_tokenizer()
    client = openai.OpenAI(base_url=server[0], api_key="none")

    def ask(text: str) -> list[int]:
        extra = {"ignore_eos": True, "return_token_ids": True}
        answer = client.completions.create(model="tiny", prompt=text, max_tokens=12, temperature=0, extra_body=extra)
        return answer.choices[0].token_ids

    with ThreadPoolExecutor(3) as clients:
        said = list(clients.map(ask, TEXTS))
    prompts = [tokenizer(text).input_ids for text in TEXTS]
    assert said == answers(model[1], PATTERN.binarize(sparsity=0.5), prompts, new=12)
    assert said != answers(model[1], None, prompts, new=12)


def test_the_server_says_what_it_serves(server: tuple[str, list[str]]) -> None:
    lines = [line for line in server[1] if "serving under a head mask" in line]
    assert any("HeadSpans(4 layers x 4 KV heads, sink_size=16, 8 x all, 8 x 48)" in line for line in lines)


def test_a_mistake_ends_the_command_with_one_line_that_names_it(model: tuple[Path, PreTrainedModel]) -> None:
    command = [*COMMAND, model[0] / "model", "--kv-cache-dtype=fp8"]
    done = subprocess.run(
        list(map(str, command)), env=environment(f"{model[0] / 'run'}@0.5"), capture_output=True, text=True
    )
    assert done.returncode != 0
    last = done.stderr.rstrip().splitlines()[-1]
    assert last.endswith("--kv-cache-dtype=fp8: streaming heads read numbers of the model's type alone, give auto")


def test_other_processes_serve_what_was_registered_here(
    model: tuple[Path, PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's engine runs in a process of its own unless told otherwise."""
    script = """
import json, sys
import duo_id, duo_id.vllm, vllm

if __name__ == "__main__":
    duo_id.vllm.register(sys.argv[1], sparsity=0.5)
    engine = vllm.LLM(sys.argv[2], dtype="float32", max_model_len=2048, block_size=32, enforce_eager=True)
    parameters = vllm.SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    print("SAID", json.dumps([list(x.outputs[0].token_ids) for x in engine.generate(sys.argv[3:], parameters)]))
"""
    folder = model[0]
    (folder / "script.py").write_text(script)
    command = [sys.executable, folder / "script.py", folder / "run", folder / "model", *TEXTS]
    done = subprocess.run(list(map(str, command)), env=environment(""), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("SAID")]
    prompts = [byte_tokenizer()(text).input_ids for text in TEXTS]
    assert json.loads(line.removeprefix("SAID")) == answers(model[1], PATTERN.binarize(sparsity=0.5), prompts, new=12)
