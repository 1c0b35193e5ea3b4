"""The work of compiled programs, against programs whose work is known."""

import math

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from grpo_jax.loop.program_cost import program_cost
from grpo_jax.sharding import make_mesh


def cost_of(function, *arrays, **jit):
    return program_cost(jax.jit(function, **jit).lower(*arrays).compile().as_text() or "")


def test_products_in_nested_loops_are_counted_as_often_as_they_run():
    def step(x, _):
        return jax.lax.fori_loop(0, 5, lambda _, x: jnp.tanh(x @ x), x), None

    x = jnp.ones((16, 16))
    assert cost_of(lambda x: jax.lax.scan(step, x, None, length=3)[0], x).flops == 3 * 5 * 2 * 16**3
    assert cost_of(lambda x, y: x @ y, x, jnp.ones((16, 4))).flops == 2 * 16 * 16 * 4


def test_a_loop_over_slices_reads_each_once():
    xs = jnp.ones((64, 32, 32))
    read = cost_of(lambda xs: jax.lax.scan(lambda x, y: (jnp.tanh(x + y), None), xs[0], xs)[0], xs).traffic
    assert xs.nbytes < read < 5 * xs.nbytes


def test_bytes_on_the_wire():
    mesh = make_mesh(data=1, fsdp=8)
    rows, whole = NamedSharding(mesh, P("fsdp")), NamedSharding(mesh, P())
    x = jax.device_put(jnp.ones((64, 32)), rows)
    gathered = cost_of(lambda x: x * 2, x, out_shardings=whole)
    assert gathered.collectives == {"all-gather": x.nbytes}
    assert gathered.wire == x.nbytes
    assert gathered.runs == {("all-gather", 8): 1}
    summed = cost_of(lambda x: x.sum(0), x, out_shardings=whole)
    assert summed.wire == 2 * summed.collectives["all-reduce"] == 2 * 32 * 4


TPU = """HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  %b = f32[]{:T(128)} parameter(1)
  ROOT %sum = f32[]{:T(128)} add(%a, %b)
}

%all-reduce-scatter.1 (input: bf16[64,32]) -> bf16[8,32] {
  %input = bf16[64,32]{1,0:T(8,128)(2,1)} parameter(0)
  %all-reduce.1 = bf16[64,32]{1,0:T(8,128)(2,1)} all-reduce(%input), channel_id=1, replica_groups={{0,1}}, to_apply=%add
  %zero = s32[] constant(0)
  ROOT %slice = bf16[8,32]{1,0:T(8,128)(2,1)} dynamic-slice(%all-reduce.1, %zero, %zero), dynamic_slice_sizes={8,32}
}

%fused (p.0: bf16[64,32], p.1: bf16[32,16]) -> bf16[64,16] {
  %p.0 = bf16[64,32]{1,0:T(8,128)(2,1)} parameter(0)
  %p.1 = bf16[32,16]{1,0:T(8,128)(2,1)S(1)} parameter(1)
  ROOT %product = bf16[64,16]{1,0:T(8,128)(2,1)} convolution(%p.0, %p.1), dim_labels=bf_io->bf
}

%condition (state: (s32[], bf16[64,32])) -> pred[] {
  %state = (s32[]{:T(128)}, bf16[64,32]{1,0:T(8,128)(2,1)}) parameter(0)
  %bound = s32[]{:T(128)} constant(6)
  %count = s32[]{:T(128)} get-tuple-element(%state), index=0
  ROOT %less = pred[]{:T(512)} compare(%count, %bound), direction=LT
}

%body (state.1: (s32[], bf16[64,32])) -> (s32[], bf16[64,32]) {
  %state.1 = (s32[]{:T(128)}, bf16[64,32]{1,0:T(8,128)(2,1)}) parameter(0)
  %count.1 = s32[]{:T(128)} get-tuple-element(%state.1), index=0
  %x = bf16[64,32]{1,0:T(8,128)(2,1)} get-tuple-element(%state.1), index=1
  %weights = bf16[32,16]{1,0:T(8,128)(2,1)S(1)} custom-call(), custom_call_target="AllocateBuffer"
  %y = bf16[64,16]{1,0:T(8,128)(2,1)} fusion(%x, %weights), kind=kOutput, calls=%fused
  %scattered = bf16[8,32]{1,0:T(8,128)(2,1)} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %out = (s32[]{:T(128)}, bf16[64,32]{1,0:T(8,128)(2,1)}) tuple(%count.1, %x)
}

ENTRY %main (param: bf16[64,32]) -> bf16[64,32] {
  %param = bf16[64,32]{1,0:T(8,128)(2,1)} parameter(0)
  %start = s32[]{:T(128)} constant(0)
  %tuple = (s32[]{:T(128)}, bf16[64,32]{1,0:T(8,128)(2,1)}) tuple(%start, %param)
  %while = (s32[]{:T(128)}, bf16[64,32]{1,0:T(8,128)(2,1)}) while(%tuple), condition=%condition, body=%body
  ROOT %result = bf16[64,32]{1,0:T(8,128)(2,1)} get-tuple-element(%while), index=1
}
"""


def test_a_tpus_program():
    """Trip counts in conditions, products as convolutions, reduce-scatters as fusions, arrays in vector memory."""
    cost = program_cost(TPU)
    x, y = (2 * math.prod(shape) for shape in ((64, 32), (64, 16)))
    assert cost.flops == 6 * 2 * 64 * 32 * 16
    assert cost.collectives == {"reduce-scatter": 6 * x}
    assert cost.runs == {("reduce-scatter", 2): 6}
    assert cost.traffic == 6 * (x + y + 2 * x)
    assert cost.wire == 6 * x


def test_a_loop_whose_counter_the_compiler_has_unrolled():
    text = TPU.replace(
        "ROOT %out = (s32[]{:T(128)}, bf16[64,32]{1,0:T(8,128)(2,1)}) tuple(%count.1, %x)",
        """%one = s32[]{:T(128)} constant(1)
  %next = s32[]{:T(128)} add(%count.1, %one)
  %after = s32[]{:T(128)} add(%one, %next)
  ROOT %out = (s32[]{:T(128)}, bf16[64,32]{1,0:T(8,128)(2,1)}) tuple(%after, %x)""",
    )
    assert program_cost(text).flops == program_cost(TPU).flops / 2


ASYNC = """HloModule jit_step

%begin (p.0: bf16[8,32]) -> (bf16[8,32], bf16[64,32]) {
  %p.0 = bf16[8,32] parameter(0)
  %all-gather.1 = bf16[64,32] all-gather(%p.0), channel_id=7, dimensions={0}
  ROOT %tuple.0 = (bf16[8,32], bf16[64,32]) tuple(%p.0, %all-gather.1)
}

%meanwhile (p.1: bf16[8,32], p.2: bf16[64,32], p.3: f32[16,16]) -> (f32[16,16], bf16[64,32]) {
  %p.1 = bf16[8,32] parameter(0)
  %p.2 = bf16[64,32] parameter(1)
  %p.3 = f32[16,16] parameter(2)
  %all-gather.2 = bf16[64,32] all-gather(%p.1), channel_id=7, dimensions={0}
  %doubled = f32[16,16] add(%p.3, %p.3)
  ROOT %tuple.1 = (f32[16,16], bf16[64,32]) tuple(%doubled, %p.2)
}

ENTRY %main (param: bf16[8,32], other: f32[16,16]) -> f32[16,16] {
  %param = bf16[8,32] parameter(0)
  %other = f32[16,16] parameter(1)
  %started = (bf16[8,32], bf16[64,32]) fusion(%param), calls=%begin, output_to_operand_aliasing={{0}: (0, {})}
  %gathered = bf16[64,32] get-tuple-element(%started), index=1
  %fused = (f32[16,16], bf16[64,32]) fusion(%param, %gathered, %other), calls=%meanwhile, IN_PLACE
  ROOT %result = f32[16,16] get-tuple-element(%fused), index=0
}
""".replace("IN_PLACE", "output_to_operand_aliasing={{1}: (1, {})}")


def test_a_collective_in_several_steps_is_one():
    assert program_cost(ASYNC).collectives == {"all-gather": 2 * 64 * 32}


def test_an_operand_that_stays_where_it_is_is_not_moved():
    elsewhere = program_cost(ASYNC.replace("output_to_operand_aliasing={{1}: (1, {})}", "metadata={}"))
    assert elsewhere.traffic - program_cost(ASYNC).traffic == 2 * 2 * 64 * 32


@pytest.mark.parametrize(
    ("window", "size", "out", "terms"),
    [
        ("window={size=3 pad=1_1}", 3, 4, 10 / 4),  # of 12 places, two are outside
        ("window={size=4 pad=3_3 rhs_reversal=1}", 4, 7, 16 / 7),
        ("window={size=1}", 1, 4, 1),
    ],
)
def test_places_of_a_window_outside_of_its_operand_are_no_products(window, size, out, terms):
    text = f"""HloModule m

ENTRY %main (x: f32[2,4,8], y: f32[{size},8,16]) -> f32[2,{out},16] {{
  %x = f32[2,4,8]{{2,1,0}} parameter(0)
  %y = f32[{size},8,16]{{2,1,0}} parameter(1)
  ROOT %out = f32[2,{out},16]{{2,1,0}} convolution(%x, %y), {window}, dim_labels=b0f_0io->b0f
}}
"""
    assert program_cost(text).flops == pytest.approx(2 * 2 * out * 16 * 8 * terms)


def test_a_loop_over_chunks_of_experts_runs_as_often_as_its_scope_says():
    def chunks(x, count):
        with jax.named_scope("likely_turns_3"):
            return jax.lax.fori_loop(0, count, lambda _, x: jnp.tanh(x @ x), x)

    assert cost_of(chunks, jnp.ones((16, 16)), jnp.int32(7)).flops == 3 * 2 * 16**3


def test_products_of_a_tpu_with_groups_of_rows_are_counted_by_their_kernels():
    kernel = """HloModule program

ENTRY %main (x: bf16[32,16], y: bf16[4,16,8]) -> bf16[32,8] {
  %x = bf16[32,16]{1,0} parameter(0)
  %y = bf16[4,16,8]{2,1,0} parameter(1)
  ROOT %out = bf16[32,8]{1,0} custom-call(%x, %y), custom_call_target="tpu_custom_call", metadata={op_name="NAME"}, \
backend_config={"custom_call_config":{"cost_estimate":{"flops":"8192","bytes_accessed":"9"}}}
}
"""
    assert program_cost(kernel.replace("NAME", "jit(f)/ragged_dot_general/ragged-dot-none")).flops == 8192
    assert program_cost(kernel.replace("NAME", "jit(f)/jit(tgmm)/pallas_call")).flops == 8192
    assert program_cost(kernel.replace("NAME", "jit(f)/splash/pallas_call")).flops == 0
