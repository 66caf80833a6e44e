"""What kernels do with codes: make numbers of them in registers, and codes of numbers (`duo_id.attention.codes`)."""

import triton
import triton.language as tl

# What `numbers` adds where it is fast: the first to codes, but the second to those in the upper bits of a byte.
LOW_OFFSET, HIGH_OFFSET = tl.constexpr(1024.0), tl.constexpr(64.0)


@triton.jit
def numbers(at, inside, PLANE: tl.constexpr, BITS: tl.constexpr, EVEN: tl.constexpr, FAST: tl.constexpr, TYPE):  # type: ignore[no-untyped-def]
    """The codes of two halves as numbers; FAST: in float16 plus an offset, three instructions for four codes of 4 bits.

    The bits of a code in the mantissa of 1024 are 1024 + code; four bits further up, in that of 64, they are 64 + code.
    """
    low_bytes = tl.load(at) if EVEN else tl.load(at, inside, 0)
    if BITS == 8:
        high_bytes = tl.load(at + PLANE) if EVEN else tl.load(at + PLANE, inside, 0)
        if FAST:
            low, high = _from_bytes(low_bytes), _from_bytes(high_bytes)
        else:
            low, high = low_bytes.to(tl.float32).to(TYPE), high_bytes.to(tl.float32).to(TYPE)
    elif FAST:
        low, high = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 a, b;
            prmt.b32 a, $4, 0, 0x4140;
            prmt.b32 b, $4, 0, 0x4342;
            lop3.b32 $0, a, 0x000F000F, 0x64006400, 0xEA;
            lop3.b32 $1, b, 0x000F000F, 0x64006400, 0xEA;
            lop3.b32 $2, a, 0x00F000F0, 0x54005400, 0xEA;
            lop3.b32 $3, b, 0x00F000F0, 0x54005400, 0xEA;
            }
            """,
            "=r,=r,=r,=r,r", [low_bytes], dtype=(tl.float16, tl.float16), is_pure=True, pack=4,
        )  # fmt: skip
    else:
        low, high = (low_bytes & 15).to(tl.float32).to(TYPE), (low_bytes >> 4).to(tl.float32).to(TYPE)
    return low, high


@triton.jit
def scales_of(at, each, inside, EVEN: tl.constexpr, FAST: tl.constexpr):  # type: ignore[no-untyped-def]
    """Scales and zeros, float32, of what is numbered in `each`; FAST: of bfloat16 pairs, read as one word each."""
    if FAST:
        words = at.to(tl.pointer_type(tl.uint32)) + each
        pairs = tl.load(words) if EVEN else tl.load(words, inside, 0)
        scale, zero = (pairs << 16).to(tl.float32, bitcast=True), (pairs & 0xFFFF0000).to(tl.float32, bitcast=True)
    else:
        words = at + each[:, None] * 2 + tl.arange(0, 2)[None, :]
        pairs = tl.load(words) if EVEN else tl.load(words, inside[:, None], 0.0)
        scale, zero = tl.split(pairs.to(tl.float32))
    return scale, zero


@triton.jit
def _from_bytes(x):  # type: ignore[no-untyped-def]
    """Bytes as float16, plus 1024."""
    return tl.inline_asm_elementwise(
        """
        prmt.b32 $0, $2, 0x64646464, 0x4140;
        prmt.b32 $1, $2, 0x64646464, 0x4342;
        """,
        "=r,=r,r", [x], dtype=tl.float16, is_pure=True, pack=4,
    )  # fmt: skip


@triton.jit
def _encode(x, low, high, BITS: tl.constexpr, TYPE):  # type: ignore[no-untyped-def]
    """Codes of float32 numbers between `low` and `high`, and the scale; bit by bit as `duo_id.attention.codes`."""
    inverse: tl.constexpr = 1.0 / (2**BITS - 1)
    scale = ((high - low) * inverse).to(TYPE)
    divisor = scale.to(tl.float32)
    divisor = tl.where(divisor == 0, 1.0, divisor)
    codes = tl.floor(tl.div_rn(x - low, tl.broadcast_to(divisor, x.shape)) + 0.5)
    return tl.minimum(tl.maximum(codes, 0.0), 2**BITS - 1.0).to(tl.uint8), scale


@triton.jit
def write_keys(tail, new, codes, scales, DIM: tl.constexpr, SIZE: tl.constexpr, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Write the codes of a group of keys: the tail (SIZE, DIM) with the new token as its last."""
    token = tl.arange(0, SIZE)[:, None]
    TYPE: tl.constexpr = scales.dtype.element_ty
    for start in range(0, DIM // 2, 16):
        channel = start + tl.arange(0, 16)[None, :]
        inside = channel < DIM // 2
        at = codes + token * (DIM // 2) + channel
        packed = tl.zeros([SIZE, 16], tl.uint8)
        for part in tl.static_range(2):
            own = channel + part * (DIM // 2)
            x = tl.load(tail + token * DIM + own, (token < SIZE - 1) & inside, 0.0)
            x = tl.where(token == SIZE - 1, tl.load(new + own, inside, 0.0), x).to(tl.float32)
            low, high = tl.min(x, 0)[None, :], tl.max(x, 0)[None, :]
            numbers, scale = _encode(x, low, high, BITS, TYPE)
            tl.store(scales + own * 2, scale, inside)
            tl.store(scales + own * 2 + 1, low.to(TYPE), inside)
            if BITS == 8:
                tl.store(at + part * SIZE * (DIM // 2), numbers, inside)
            else:
                packed |= numbers << 4 * part
        if BITS == 4:
            tl.store(at, packed, inside)


@triton.jit
def write_values(  # type: ignore[no-untyped-def]
    tail, new, codes, scales, DIM: tl.constexpr, HALF: tl.constexpr, SIZE: tl.constexpr, BITS: tl.constexpr
):
    """Write the codes of a group of values, channels first; see `write_keys`."""
    channel = tl.arange(0, HALF)[:, None]
    inside = channel < DIM // 2
    TYPE: tl.constexpr = scales.dtype.element_ty
    for start in range(0, SIZE, 16):
        token = start + tl.arange(0, 16)[None, :]
        stored, last = (token < SIZE - 1) & inside, (token == SIZE - 1) & inside
        first = tl.load(tail + token * DIM + channel, stored, 0.0) + tl.load(new + channel + token * 0, last, 0.0)
        second = tl.load(tail + DIM // 2 + token * DIM + channel, stored, 0.0)
        second += tl.load(new + DIM // 2 + channel + token * 0, last, 0.0)
        first, second = first.to(tl.float32), second.to(tl.float32)
        low = tl.minimum(_least(first, inside), _least(second, inside))[None, :]
        high = -tl.minimum(_least(-first, inside), _least(-second, inside))[None, :]
        numbers, scale = _encode(first, low, high, BITS, TYPE)
        others, scale = _encode(second, low, high, BITS, TYPE)
        at = codes + channel * SIZE + token
        if BITS == 8:
            tl.store(at, numbers, inside)
            tl.store(at + SIZE * (DIM // 2), others, inside)
        else:
            tl.store(at, numbers | others << 4, inside)
        tl.store(scales + token * 2, scale)
        tl.store(scales + token * 2 + 1, low.to(TYPE))


@triton.jit
def _least(x, inside):  # type: ignore[no-untyped-def]
    """The least of each column of (HALF, tokens), of the rows that are channels."""
    return tl.min(tl.where(inside, x, float("inf")), 0)
