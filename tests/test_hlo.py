"""Reading compiled programs: on text written by hand."""

# ruff: noqa: E501 (programs have long lines)

import pytest

from fuyu_jax.parallel.chips import CHIPS, links
from fuyu_jax.parallel.hlo import Program, Shape, first_group

PROGRAM = """HloModule jit_step, is_scheduled=true

%add (a: bf16[], b: bf16[]) -> bf16[] {
  %a = bf16[] parameter(0)
  %b = bf16[] parameter(1)
  ROOT %sum = bf16[] add(%a, %b)
}

%fused (p0: bf16[8,64], p1: bf16[64,32]) -> bf16[8,32] {
  %p0 = bf16[8,64]{1,0:T(8,128)(2,1)} parameter(0)
  %p1 = bf16[64,32]{1,0:T(8,128)(2,1)} parameter(1)
  ROOT %product = bf16[8,32]{1,0} convolution(%p0, %p1), dim_labels=bf_io->bf
}

%slices (stack: f32[36,16,32], at: s32[]) -> f32[1,16,32] {
  %stack = f32[36,16,32]{2,1,0} parameter(0)
  %at = s32[] parameter(1)
  ROOT %slice = f32[1,16,32]{2,1,0} dynamic-slice(%stack, %at), dynamic_slice_sizes={1,16,32}
}

%cond (state: (s32[], bf16[8,64])) -> pred[] {
  %limit = s32[]{:T(128)} constant(36), metadata={op_name="while/cond"}
  %state = (s32[]{:T(128)}, bf16[8,64]{1,0}) parameter(0)
  %turn = s32[]{:T(128)} get-tuple-element(%state), index=0
  ROOT %less = pred[]{:T(512)} compare(%turn, %limit), direction=LT
}

%body (state.1: (s32[], bf16[8,64])) -> (s32[], bf16[8,64]) {
  %state.1 = (s32[]{:T(128)}, bf16[8,64]{1,0}) parameter(0)
  %part = bf16[16,32]{1,0} fusion(%state.1), kind=kLoop, calls=%slices
  %whole = bf16[64,32]{1,0} all-gather(%part), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  %kernel = (bf16[8,64]{1,0}) custom-call(%whole), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{}"
}}, metadata={op_name="kernel"}
  %y = bf16[8,32]{1,0} fusion(%kernel, %whole), kind=kOutput, calls=%fused
  %part.1 = bf16[16,32]{1,0} reduce-scatter(%whole), replica_groups=[2,4]<=[8], dimensions={0}, to_apply=%add
  ROOT %next = (s32[]{:T(128)}, bf16[8,64]{1,0}) tuple(%state.1, %y)
}

%cond.1 (s: (s32[], s32[])) -> pred[] {
  %s = (s32[], s32[]) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %n = s32[] get-tuple-element(%s), index=1
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%body.1 (s.1: (s32[], s32[])) -> (s32[], s32[]) {
  %s.1 = (s32[], s32[]) parameter(0)
  %x = f32[4,8]{1,0} constant({...})
  %w = f32[8,16]{1,0} constant({...})
  %xw = f32[4,16]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %same = (s32[], s32[]) tuple(%s.1)
}

ENTRY %main (p: f32[36,16,32]) -> (f32[100], f32[100]) {
  %p = f32[36,16,32]{2,1,0} parameter(0)
  %start = (s32[], bf16[8,64]) tuple(%p)
  %layers = (s32[], bf16[8,64]{1,0}) while(%start), condition=%cond, body=%body, metadata={op_name="while"}
  %chunks = (s32[], s32[]) while(%start), condition=%cond.1, body=%body.1
  %g = f32[100]{0} constant({...})
  ROOT %sums = (f32[100]{0}, f32[100]{0}) all-reduce(%g, /*index=1*/%g), replica_groups=mesh['a'=2,'b'=4] {'a'}, to_apply=%add
}
"""


def test_collectives_are_counted_as_often_as_their_loop_turns():
    found = {c.kind: c for c in Program(PROGRAM).collectives()}
    gather, scatter, reduce = (found[k] for k in ("all-gather", "reduce-scatter", "all-reduce"))
    assert (gather.times, gather.group, gather.in_loop) == (36, (0, 1, 2, 3), True)
    # Whole arrays of 64 × 32 bfloat16, gathered or scattered; the all-reduce is two of 100 floats.
    assert gather.bytes == scatter.bytes == 64 * 32 * 2
    assert gather.wire == 36 * gather.bytes
    assert (scatter.times, scatter.group) == (36, (0, 1, 2, 3))
    assert (reduce.times, reduce.bytes, reduce.wire, reduce.in_loop) == (1, 800, 1600, False)
    assert reduce.group == (0, 4)


def test_matrix_products_are_counted_through_fusions_and_loops():
    layers = 36 * 2 * 8 * 64 * 32
    assert Program(PROGRAM).matmul_flops() == layers + 2 * 4 * 8 * 16
    assert Program(PROGRAM, unknown_turns=5).matmul_flops() == layers + 5 * 2 * 4 * 8 * 16


def test_a_known_trip_count_goes_before_the_condition():
    told = PROGRAM.replace(
        'metadata={op_name="while"}', 'backend_config={"known_trip_count":{"n":"7"}}'
    )
    assert {c.kind: c.times for c in Program(told).collectives()}["all-gather"] == 7


def test_a_convolution_that_is_a_product_counts_no_padding():
    """As the TPU's compiler writes [4096] @ [4096, 64, 64] for 8,192 tokens."""
    text = PROGRAM.replace("bf16[8,64]{1,0:T(8,128)(2,1)} p", "bf16[8,64,1]{2,1,0} p")
    text = text.replace("bf16[64,32]{1,0:T(8,128)(2,1)} p", "bf16[64,4,8]{2,1,0} p")
    text = text.replace(
        "%product = bf16[8,32]{1,0} convolution(%p0, %p1), dim_labels=bf_io->bf",
        "%product = bf16[8,4,8]{2,1,0} convolution(%p0, %p1), "
        "window={size=4 pad=3_3 rhs_reversal=1}, dim_labels=bf0_i0o->b0f",
    )
    assert Program(text).matmul_flops() == Program(PROGRAM).matmul_flops()


def test_a_slice_of_a_stack_moves_its_own_bytes_only():
    """In 36 turns: the slice in and out, the gather, the kernel, the product, the scatter."""
    part, whole, kernel, y = 16 * 32 * 2, 64 * 32 * 2, 8 * 64 * 2, 8 * 32 * 2
    # The fusion's operand is a tuple here, whose first array is a scalar.
    slice_ = 4 + part
    body = slice_ + (part + whole) + (whole + kernel) + (kernel + whole + y) + (whole + part)
    dot = 4 * (4 * 8 + 8 * 16 + 4 * 16)
    compare = (4 + 4 + 1) * 37
    got = Program(PROGRAM).hbm_bytes()
    assert got == pytest.approx(36 * body + dot + 2 * 800, abs=compare)


@pytest.mark.parametrize(
    ("text", "group"),
    [
        ("replica_groups={{0,4},{1,5}}", (0, 4)),
        ("replica_groups=[4,2]<=[2,4]T(1,0), x", (0, 4)),
        ("replica_groups=[1,8]<=[8]", tuple(range(8))),
        ("replica_groups=mesh['x'=2,'y'=4] {'x','y'}", tuple(range(8))),
        ("source_target_pairs={{0,1},{1,2}}", (0, 1)),
        ("", (0,)),
    ],
)
def test_groups_in_every_way_to_write_them(text, group):
    assert first_group(text) == group


def test_shapes_in_bytes():
    assert Shape("bf16", (2, 3)).bytes == 12
    assert Shape("f32", ()).bytes == 4
    assert Shape("u8", (5,)).bytes == 5
    assert Shape("pred", (5,)).bytes == 5


def test_links_of_a_group_on_a_torus():
    v5p, v6e = CHIPS["v5p"], CHIPS["v6e"]
    plane = [(x, y, 0) for x in range(4) for y in range(4)]
    assert links(v5p, plane, (4, 4, 4)) == 4
    assert links(v5p, [(x, 0, 0) for x in range(2)], (2, 2, 1)) == 1  # one neighbour, no ring
    assert links(v6e, [(x, 0) for x in range(16)], (16, 16)) == 2
    assert links(v6e, [(x, 0) for x in range(8)], (8, 8)) == 1
