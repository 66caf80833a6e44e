"""The table of docs/serving.md on attention over block tables: `python results/paged_attention.py` on a GPU.

Llama-3-8B's shape in bfloat16, medians of CUDA graphs. `--tune` tries launch settings instead. It needs no vLLM.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from itertools import product

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

from duo_id.attention.kernels.paged import Workspace, paged_attention, workspace
from duo_id.benchmark.ceilings import measure_ceilings
from duo_id.benchmark.timing import release, time_runs
from duo_id.deploy.graphs import capture_graph

KV_HEADS, GROUP, DIM, SINK, RECENT = 8, 4, 128, 64, 256
DEVICE, DTYPE = torch.device("cuda" if torch.cuda.is_available() else "cpu"), torch.bfloat16
CALLS = 10  # in a graph, so that a replay takes longer than its start


class Step:
    """A step of equal requests over a cache whose blocks lie in random order.

    Args:
        batch: requests.
        tokens: of each one's context, with the new ones.
        new: of them, its queries.
        size: tokens of a block.
    """

    def __init__(self, batch: int, tokens: int, new: int, size: int) -> None:
        blocks = -(-tokens // size)
        self.batch, self.tokens, self.new = batch, tokens, new
        self.query = torch.randn(batch * new, KV_HEADS * GROUP, DIM, device=DEVICE, dtype=DTYPE)
        self.cache = torch.empty(batch * blocks, KV_HEADS, size, 2 * DIM, device=DEVICE, dtype=DTYPE)
        for part in self.cache.split(4096):
            part.normal_()
        order = torch.randperm(batch * blocks, device=DEVICE, dtype=torch.int32)
        self.table, self.out = order.view(batch, blocks), torch.empty_like(self.query)
        self.starts = torch.arange(batch + 1, device=DEVICE, dtype=torch.int32) * new
        self.lengths = torch.full((batch,), tokens, device=DEVICE, dtype=torch.int32)

    def space(self, heads: int, **tuning: int) -> Workspace:
        """What launches of so many KV heads share."""
        given = {name: tuning[name] for name in ("programs",) if name in tuning}
        return workspace(self.batch, heads, GROUP, DIM, DEVICE, **given)

    def run(self, window: tuple[int, int | None], heads: int, space: Workspace, **tuning: int) -> None:
        """Attention of all KV heads, `heads` in a launch."""
        for first in range(0, KV_HEADS, heads):
            part = slice(first * GROUP, (first + heads) * GROUP)
            paged_attention(
                self.query[:, part], self.cache[:, first : first + heads], self.table, self.starts, self.lengths,
                self.out[:, part], DIM**-0.5, *window, longest=self.new, space=space, **tuning,
            )  # fmt: skip

    def seen(self, window: tuple[int, int | None]) -> int:
        """Keys that a request's queries see, at the most."""
        sink, recent = window
        return self.tokens if recent is None else min(self.tokens, sink + recent + self.new - 1)


def milliseconds(run: Callable[[], object]) -> float:
    """The median of several replays."""
    run()

    def calls() -> None:
        for _ in range(CALLS):
            run()

    return time_runs(capture_graph(calls, DEVICE), DEVICE, 15, warmup=2).median * 1e3 / CALLS


def sdpa(batch: int, tokens: int, new: int) -> float:
    """PyTorch's attention over contiguous keys; for single queries, those of a KV head are the rows."""
    heads, rows = (KV_HEADS, GROUP) if new == 1 else (KV_HEADS * GROUP, new)
    query = torch.randn(batch, heads, rows, DIM, device=DEVICE, dtype=DTYPE)
    keys, values = (torch.empty(batch, KV_HEADS, tokens, DIM, device=DEVICE, dtype=DTYPE) for _ in range(2))
    for part in (*keys, *values):
        part.normal_()
    if new == 1:
        return milliseconds(lambda: F.scaled_dot_product_attention(query, keys, values))
    keys, values = (x.repeat_interleave(GROUP, 1) for x in (keys, values))
    mask = causal_lower_right(new, tokens)
    return milliseconds(lambda: F.scaled_dot_product_attention(query, keys, values, attn_mask=mask))


def measure(step: Step, window: tuple[int, int | None], heads: int = KV_HEADS, **tuning: int) -> float:
    """Milliseconds of a step, `heads` KV heads in a launch."""
    space = step.space(heads, **tuning)
    return milliseconds(lambda: step.run(window, heads, space, **tuning))


def windows() -> Iterator[tuple[str, tuple[int, int | None]]]:
    """What heads see, by name."""
    yield "all", (0, None)
    yield f"{SINK} + {RECENT}", (SINK, RECENT)


def pairs(step: Step, window: tuple[int, int | None]) -> int:
    """Queries and keys that see each other, of a request and head."""
    sink, recent = window
    position = torch.arange(step.tokens - step.new, step.tokens) + 1
    return int(position.sum() if recent is None else position.clamp(max=sink + recent).sum())


def table(options: argparse.Namespace) -> None:
    """Print what the page says."""
    ceilings = measure_ceilings(DEVICE, DTYPE)
    print(f"read or copy {ceilings.bandwidth / 1e12:.2f} TB/s, product {ceilings.flops / 1e12:.0f} TFLOP/s\n")
    print("decode, ms | sees | one launch | of its floor | a launch a head | floor | SDPA")
    for tokens, batch in product(options.tokens, options.batches):
        step = Step(batch, tokens, 1, options.block_size)
        for name, window in windows():
            seen = step.seen(window)
            together, apart = (measure(step, window, heads) for heads in (KV_HEADS, 1))
            floor = batch * seen * KV_HEADS * 2 * DIM * 2 / ceilings.bandwidth * 1e3
            beside = sdpa(batch, seen, 1)
            print(
                f"{tokens}, batch {batch} | {name} | {together:.4f} | {together / floor:.2f}x | {apart:.4f} | "
                f"{floor:.4f} | {beside:.4f}",
                flush=True,
            )
        del step
        release()
    step = Step(1, options.tokens[0], 1, options.block_size)
    space = step.space(1)
    step.run((SINK, RECENT), 1, space)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(CALLS):
        step.run((SINK, RECENT), 1, space)
    print(f"\nhost, without a graph: {(time.perf_counter() - start) / CALLS / KV_HEADS * 1e6:.0f} us a launch")
    print("\nchunk, ms | sees | one launch | TFLOP/s | a launch a head | SDPA")
    step = Step(1, options.past + options.chunk, options.chunk, options.block_size)
    for name, window in windows():
        together, apart = (measure(step, window, heads) for heads in (KV_HEADS, 1))
        rate = 4 * pairs(step, window) * DIM * KV_HEADS * GROUP / together / 1e9
        beside = sdpa(1, step.seen(window), options.chunk)
        print(
            f"{options.chunk} after {options.past} | {name} | {together:.3f} | {rate:.0f} | {apart:.3f} | {beside:.3f}",
            flush=True,
        )


DECODE = {"block": [32, 64, 128], "programs": [4, 8], "stages": [3, 5], "warps": [4], "least": [4]}
SHORT = {"block": [32, 64], "programs": [4], "stages": [3, 5], "warps": [2, 4], "least": [1, 2, 8]}
CHUNK = {"block": [32, 64, 128], "rows": [64, 128], "stages": [3, 5], "warps": [4, 8]}


def tune(options: argparse.Namespace) -> None:
    """Print the time of each launch setting, the fastest first."""
    long = [Step(batch, options.tokens[0], 1, options.block_size) for batch in options.batches]
    chunk = Step(1, options.past + options.chunk, options.chunk, options.block_size)
    whole, short = (window for _, window in windows())
    for label, steps, window, settings in (
        ("decode, all", long, whole, DECODE), ("decode, window", long, short, SHORT),
        ("chunk, all", [chunk], whole, CHUNK), ("chunk, window", [chunk], short, CHUNK),
    ):  # fmt: skip
        found: list[tuple[list[float], dict[str, int]]] = []
        for values in product(*settings.values()):
            tuning = dict(zip(settings, values, strict=True))
            try:
                found.append(([measure(step, window, **tuning) for step in steps], tuning))
            except Exception as error:  # more shared memory than there is
                print(label, tuning, type(error).__name__, flush=True)
        best = [min(column) for column in zip(*(times for times, _ in found), strict=True)]
        found.sort(key=lambda row: sum(time / least for time, least in zip(row[0], best, strict=True)))
        for times, tuning in found:
            print(label, [round(time, 4) for time in times], tuning, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--tokens", type=int, nargs="+", default=[32 * 1024, 128 * 1024])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--chunk", type=int, default=2048)
    parser.add_argument("--past", type=int, default=30 * 1024)
    parser.add_argument("--block-size", type=int, default=16)
    given = parser.parse_args()
    (tune if given.tune else table)(given)
