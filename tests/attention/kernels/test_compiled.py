"""Kernels compiled for a GPU that need not be there: what their inner loops are made of."""

import re
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
POINTERS = {"key_codes": "u8", "value_codes": "u8", "retrieval": "i32", "streaming": "i32", "lengths": "i64"}
POINTERS |= {"places": "i32", "arrived": "i32", "partial": "fp32"}


def compiled(kernel: Any, pointers: dict[str, str], constants: dict[str, Any], **options: int) -> Any:
    """A kernel for an H100: bfloat16 unless `pointers` say otherwise, floats, then integers.

    Args:
        kernel: its arguments are pointers, up to `scale`.
        pointers: the type of what some of these point to.
        constants: all that are of `tl.constexpr`.
        options: of the compiler.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    first, last = names.index("scale"), names.index("GROUP")
    assert constants.keys() == set(names[last:])
    signature = {name: "*" + pointers.get(name, "bf16") for name in names[:first]}
    signature |= {name: "fp32" if name in ("scale", "cap") else "i32" for name in names[first:last]}
    aligned = [
        place for place, name in enumerate(names[:last]) if place < first or name.startswith(("query_", "cache_"))
    ]
    hints = {(place,): [["tt.divisibility", 16]] for place in aligned}
    source = ASTSource(kernel, signature | dict.fromkeys(constants, "constexpr"), constants, hints)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def used(kernel: Any, folder: Path) -> tuple[int, int]:
    """Registers of a thread, and bytes of those that lie in memory."""
    import triton

    binary = folder / "kernel.cubin"
    binary.write_bytes(kernel.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    usage = subprocess.run([tool, "-res-usage", binary], capture_output=True, text=True, check=True).stdout
    return tuple(int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))


def test_heads_of_unequal_lengths_take_no_more_registers_and_the_same_loop(tmp_path: Path) -> None:
    from duo_id.attention.kernels.decode import DECODE_TUNING, _decode

    constants = {
        "GROUP": 4, "ROWS": 16, "DIM": 128, "COLUMNS": 128, "BLOCK": DECODE_TUNING["block"], "TILE": 32, "HEADS": 0,
        "PRECISION": "tf32",
    }  # fmt: skip
    options = {"num_warps": DECODE_TUNING["warps"], "num_stages": DECODE_TUNING["stages"]}
    kernels = [compiled(_decode, POINTERS, constants | {"RAGGED": heads}, **options) for heads in (0, 16)]
    loops = [
        [part.count("\n") for part in re.split(r"\n\$L__BB\d+_\d+:", kernel.asm["ptx"]) if part.count("mma.sync") > 16]
        for kernel in kernels
    ]
    assert len(loops[0]) == 1
    assert loops[1] == loops[0]
    assert used(kernels[1], tmp_path) == used(kernels[0], tmp_path)
    assert used(kernels[1], tmp_path)[1] == 0


@pytest.mark.parametrize("bits", [(4, 4), (8, 8)], ids=["int4", "int8"])
def test_codes_become_numbers_in_the_registers_of_tensor_cores(bits: tuple[int, int]) -> None:
    """16 bytes at a time are copied ahead, and no code is converted one by one."""
    from duo_id.attention.kernels.decode_codes import CODES_TUNING, EIGHT_BITS_TUNING, _decode_codes

    tuning = EIGHT_BITS_TUNING if bits == (8, 8) else CODES_TUNING
    constants = {
        "GROUP": 4, "ROWS": 8, "DIM": 128, "HALF": 64, "SIZE": 128, "BLOCK": tuning["block"], "TILE": 32,
        "HEADS": 0, "KEY_BITS": bits[0], "VALUE_BITS": bits[1], "FAST": True, "EVEN": True, "PRECISION": "tf32",
    }  # fmt: skip
    options = {"num_warps": tuning["warps"], "num_stages": tuning["stages"], "maxnreg": tuning["registers"]}
    kernel = compiled(_decode_codes, POINTERS, constants, **options)
    assert kernel.metadata.shared <= 227 * 1024 // tuning["programs"], "of one multiprocessor"
    assert 32 * tuning["warps"] * tuning["registers"] * tuning["programs"] <= 65536, "there, too"
    ptx = kernel.asm["ptx"]
    (loop,) = [part for part in re.split(r"\n\$L__BB\d+_\d+:", ptx) if re.search("prmt.b32 .*0x(4140|64646464)", part)]
    assert loop.count("mma.sync") == 32
    assert loop.count("cp.async.cg.shared.global") == 2 * bits[0], "16 bytes a thread each"
    assert "ld.global" not in loop
    assert "cvt.rn.f32.u" not in loop


@pytest.mark.parametrize("chunks", [False, True], ids=["decode", "mixed"])
@pytest.mark.parametrize("dim", [64, 96, 128, 256], ids=str)
def test_keys_in_blocks_are_copied_ahead_and_registers_suffice(dim: int, chunks: bool, tmp_path: Path) -> None:
    import triton

    from duo_id.attention.kernels.paged import MIXED_TUNING, SINGLE_TUNING, _paged

    tuning, padded = MIXED_TUNING if chunks else SINGLE_TUNING, triton.next_power_of_2(dim)
    constants = {
        "GROUP": 4, "DIM": dim, "COLUMNS": padded, "ROWS": 16, "CHUNK_ROWS": min(tuning["rows"], 2**14 // padded),
        "BLOCK": min(tuning["block"], 2**14 // padded), "SIZE": 16, "LEAST": 4, "TILE": 32, "SEARCH": 128,
        "CHUNKS": chunks, "CAPPED": False, "PRECISION": "tf32",
    }  # fmt: skip
    pointers = dict.fromkeys(("table", "starts", "lengths", "arrived"), "i32") | {"partial": "fp32"}
    kernel = compiled(_paged, pointers, constants, num_warps=tuning["warps"], num_stages=tuning["stages"])
    assert kernel.metadata.shared <= 227 * 1024
    assert ("wgmma" in kernel.asm["ptx"]) == chunks, "tensor cores take a chunk's queries by the warp group"
    copied = re.findall(r"cp.async.cg.shared.global \[[^]]*\], \[[^]]*\], 0x10,", kernel.asm["ptx"])
    assert len(copied) >= 2 * (1 + chunks) * constants["BLOCK"] * padded * 2 // (16 * 32 * tuning["warps"])
    registers, stack = used(kernel, tmp_path)
    assert registers <= 65536 // (32 * tuning["warps"])
    assert stack == 0, "registers in memory"
