"""The codes kernel compiled for a GPU that need not be there: what its inner loop is made of."""

import re
from importlib.util import find_spec

import pytest

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
POINTERS = {"key_codes": "u8", "value_codes": "u8", "retrieval": "i32", "streaming": "i32", "lengths": "i64"}
POINTERS |= {"arrived": "i32", "partial": "fp32"}


@pytest.mark.parametrize("bits", [(4, 4), (8, 8)], ids=["int4", "int8"])
def test_codes_become_numbers_in_the_registers_of_tensor_cores(bits: tuple[int, int]) -> None:
    """16 bytes at a time are copied ahead, and no code is converted one by one."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from duo_id.attention.kernels.decode_codes import CODES_TUNING, EIGHT_BITS_TUNING, _decode_codes

    tuning = EIGHT_BITS_TUNING if bits == (8, 8) else CODES_TUNING

    names = _decode_codes.arg_names
    first, last = names.index("scale"), names.index("GROUP")
    signature = {name: "*" + POINTERS.get(name, "bf16") for name in names[:first]}
    signature |= {"scale": "fp32"} | dict.fromkeys(names[first + 1 : last], "i32")
    constants = {
        "GROUP": 4, "ROWS": 8, "DIM": 128, "HALF": 64, "SIZE": 128, "BLOCK": tuning["block"], "TILE": 32,
        "HEADS": 0, "KEY_BITS": bits[0], "VALUE_BITS": bits[1], "FAST": True, "EVEN": True, "PRECISION": "tf32",
    }  # fmt: skip
    assert constants.keys() == set(names[last:])
    aligned = {(place,): [["tt.divisibility", 16]] for place in range(first)}
    source = ASTSource(_decode_codes, signature | dict.fromkeys(constants, "constexpr"), constants, aligned)
    options = {"num_warps": tuning["warps"], "num_stages": tuning["stages"]}
    options["maxnreg"] = tuning["registers"]
    kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert kernel.metadata.shared <= 227 * 1024 // tuning["programs"], "of one multiprocessor"
    assert 32 * tuning["warps"] * tuning["registers"] * tuning["programs"] <= 65536, "there, too"
    ptx = kernel.asm["ptx"]
    (loop,) = [part for part in re.split(r"\n\$L__BB\d+_\d+:", ptx) if re.search("prmt.b32 .*0x(4140|64646464)", part)]
    assert loop.count("mma.sync") == 32
    assert loop.count("cp.async.cg.shared.global") == 2 * bits[0], "16 bytes a thread each"
    assert "ld.global" not in loop
    assert "cvt.rn.f32.u" not in loop
