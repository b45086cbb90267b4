"""Rotary embedding of the pairs (j, j + turned / 2) of a head. A program takes some heads of a token.

``turned`` is the number of columns of a head that are rotated, R in rlhf_fast/ops/rotary_embedding.py.

formula         x_j cos_j - x_k sin_j and x_k cos_k + x_j sin_k, k = j + turned / 2, in float32; one rounding.
                backward: the transpose of that, with -sin_k for sin_j and -sin_j for sin_k
bytes a number  of b bytes: b read, b written; and a token's cosines and sines
passes          one each way
error           1 ulp of float32, before the rounding
"""

import triton
import triton.language as tl

from .hidden import BLOCK, WARPS, load_floats, store_rounded
from .launch import kernel, launch
from .records import RotaryEmbedding


@kernel(general=("length", "heads"))
def _turn(
    x, x_sequence, x_head, x_token, cos, sin, angle_sequence, angle_token, out, out_sequence, out_head, out_token,
    heads, length, width, half, HEADS: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """Rotates HEADS heads of up to PAIRS pairs each, and copies up to REST further columns of each."""
    sequence = tl.program_id(0).to(tl.int64) // length
    token = tl.program_id(0).to(tl.int64) % length
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    x += sequence * x_sequence + token * x_token
    out += sequence * out_sequence + token * out_token
    angle = sequence * angle_sequence + token * angle_token
    from_x = head.to(tl.int64) * x_head
    to_out = head.to(tl.int64) * out_head

    j = tl.arange(0, PAIRS)[None, :]
    paired = j < half
    first_cos = load_floats(cos + angle, j, paired)
    second_cos = load_floats(cos + angle + half, j, paired)
    if BACKWARD:
        first_sin = -load_floats(sin + angle + half, j, paired)
        second_sin = -load_floats(sin + angle, j, paired)
    else:
        first_sin = load_floats(sin + angle, j, paired)
        second_sin = load_floats(sin + angle + half, j, paired)
    inside = (head < heads) & paired
    first = load_floats(x, from_x + j, inside)
    second = load_floats(x, from_x + half + j, inside)
    store_rounded(out, to_out + j, first * first_cos - second * first_sin, inside)
    store_rounded(out, to_out + half + j, second * second_cos + first * second_sin, inside)
    if REST:
        column = 2 * half + tl.arange(0, REST)[None, :]
        inside = (head < heads) & (column < width)
        tl.store(out + to_out + column, tl.load(x + from_x + column, mask=inside), mask=inside)


def rotary_embedding(a: RotaryEmbedding) -> None:
    programs = a.sequences * a.length
    if programs * a.heads * a.width == 0:
        return
    half, rest = a.turned // 2, a.width - a.turned
    pairs = triton.next_power_of_2(max(half, 1))
    heads = min(max(BLOCK // pairs, 1), triton.next_power_of_2(a.heads))
    launch(
        _turn,
        (programs, triton.cdiv(a.heads, heads)),
        x=a.x.data,
        x_sequence=a.x.sequence_stride,
        x_head=a.x.head_stride,
        x_token=a.x.token_stride,
        cos=a.angles.cos,
        sin=a.angles.sin,
        angle_sequence=a.angles.sequence_stride,
        angle_token=a.angles.token_stride,
        out=a.out.data,
        out_sequence=a.out.sequence_stride,
        out_head=a.out.head_stride,
        out_token=a.out.token_stride,
        heads=a.heads,
        length=a.length,
        width=a.width,
        half=half,
        HEADS=heads,
        PAIRS=pairs,
        REST=triton.next_power_of_2(rest) if rest else 0,
        BACKWARD=a.backward,
        num_warps=WARPS,
    )
