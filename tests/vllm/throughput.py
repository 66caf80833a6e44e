"""How many requests vLLM runs side by side in a fixed cache, and how fast, without and with a head mask.

`.venv-vllm/bin/python -m tests.vllm.throughput MODEL NAME@0.5 NAME@0.75`, MODEL a local folder; docs/serving.md has
figures. Each engine runs in a process of its own; rounds alternate, so that all see the same machine. Seconds are those
of a thread on its core, which on a machine with other work are fewer than those of a clock.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from itertools import pairwise
from statistics import median
from typing import Any


def measure(options: argparse.Namespace, heads: str) -> dict[str, float]:
    """Serve random prompts once."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
    os.environ["OMP_NUM_THREADS"], os.environ["VLLM_CPU_OMP_THREADS_BIND"] = str(options.threads), "nobind"
    import random

    import vllm

    import duo_id.vllm

    duo_id.vllm.register(heads or None)
    engine = vllm.LLM(
        model=options.model,
        dtype=options.dtype,
        max_model_len=options.tokens + options.new,
        max_num_seqs=options.requests,
        max_num_batched_tokens=options.chunk,
        block_size=32,
        kv_cache_memory_bytes=options.cache * 2**20,
        enable_prefix_caching=False,
        async_scheduling=False,
        enforce_eager=True,
        skip_tokenizer_init=True,
    )
    draw, scheduler = random.Random(0), engine.llm_engine.engine_core.engine_core.scheduler
    prompts = [
        {"prompt_token_ids": [draw.randrange(3, 30000) for _ in range(options.tokens)]} for _ in range(options.requests)
    ]
    steps, schedule = [], scheduler.schedule

    def watched(*arguments: Any) -> Any:
        step = schedule(*arguments)
        steps.append((len(scheduler.running), step.total_num_scheduled_tokens, time.process_time()))
        return step

    scheduler.schedule = watched
    parameters = vllm.SamplingParams(temperature=0, max_tokens=options.new, ignore_eos=True, detokenize=False)
    start = time.perf_counter()
    engine.generate(prompts, parameters, use_tqdm=False)
    steps.append((0, 0, time.process_time()))
    spent = [(*step[:2], (after[2] - step[2]) / options.threads) for step, after in pairwise(steps)]
    decoding = [(new, seconds) for running, new, seconds in spent if running == new]  # a token each, and no prompt
    return {
        "side by side": max(running for running, _, _ in spent),
        "seconds": sum(seconds for _, _, seconds in spent),
        "decoded": sum(new for new, _ in decoding),
        "decoding": sum(seconds for _, seconds in decoding),
        "wall": time.perf_counter() - start,
        "steps": len(spent),
    }


def main() -> None:
    """Measure all masks several times and print a row for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("heads", nargs="*", help="as DUO_ID_HEADS takes them")
    parser.add_argument("--tokens", type=int, default=2048, help="of a prompt")
    parser.add_argument("--new", type=int, default=128, help="tokens generated after each")
    parser.add_argument("--requests", type=int, default=12)
    parser.add_argument("--cache", type=int, default=256, help="MiB")
    parser.add_argument("--chunk", type=int, default=512, help="tokens of a step")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one is not None:
        print("MEASURED", json.dumps(measure(options, options.one)))
        return
    found: dict[str, list[dict[str, float]]] = {heads: [] for heads in ("", *options.heads)}
    for _ in range(options.rounds):
        for heads in found:
            command = [sys.executable, "-m", "tests.vllm.throughput", *sys.argv[1:], "--one", heads]
            printed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
            (line,) = [line for line in printed.splitlines() if line.startswith("MEASURED")]
            found[heads].append(json.loads(line.removeprefix("MEASURED")))
            print(heads or "without a mask", found[heads][-1], flush=True)
    first: dict[str, float] = {}
    for heads, rows in found.items():
        asked = options.requests * options.new
        speeds = {
            "tokens/s": median(asked / row["seconds"] for row in rows),
            "tokens/s decoding": median(row["decoded"] / row["decoding"] for row in rows),
        }
        first = first or speeds
        ratios = ", ".join(f"{speed:.1f} {name} ({speed / first[name]:.2f}x)" for name, speed in speeds.items())
        print(f"{heads or 'without a mask'}: {rows[0]['side by side']:.0f} requests side by side, {ratios}")


if __name__ == "__main__":
    main()
