"""What devices send: bytes, axes and modules, of programs whose numbers are computed by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from mod_jax.config import MeshConfig
from mod_jax.rehearsal.collectives import collectives
from mod_jax.rehearsal.groups import axes_of, groups_of
from mod_jax.rehearsal.places import place_of
from mod_jax.rehearsal.program import read
from mod_jax.rehearsal.traffic import Traffic
from mod_jax.sharding import AXES, make_mesh

OPTIMIZED = True  # reads what the compiler makes
MESH = {"data": 1, "fsdp": 4, "expert": 2, "tensor": 1}


def collective(groups):
    """An all-reduce with these groups."""
    text = f"""
ENTRY %main (x: f32[8]) -> f32[8] {{
  %x = f32[8]{{0}} parameter(0)
  ROOT %r = f32[8]{{0}} all-reduce(%x), channel_id=1, {groups}, to_apply=%add
}}
"""
    return read(text).computations["main"][1]


EVENS = [[0, 2, 4, 6], [1, 3, 5, 7]]


@pytest.mark.parametrize(
    ("written", "groups"),
    [
        ("replica_groups={{0,2,4,6},{1,3,5,7}}", EVENS),
        ("replica_groups={}", [range(8)]),
        ("use_global_device_ids=true", [range(8)]),
        ("replica_groups=[2,4]<=[8]", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", EVENS),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}", EVENS),
        ("replica_groups=mesh['a'=4,'b'=2] {'a','b'}", [range(8)]),
        # [[0, 2, 4, 6], [1, 3, 5, 7]] are the numbers of this mesh
        ("replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}", EVENS),
        ("replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}", "neighbours"),
        ("replica_groups=mesh['a'=8] {'a':(2)4}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=mesh['a'=8] {'a':(1)4}", EVENS),
        ("replica_groups=mesh['a'=8] {'a':(4)2}", "neighbours"),
    ],
)
def test_groups_are_read_in_all_their_forms(written, groups):
    if groups == "neighbours":
        groups = [[0, 1], [2, 3], [4, 5], [6, 7]]
    found = groups_of(collective(f"{written}, use_global_device_ids=true"), 8)
    assert sorted(map(sorted, found.tolist())) == sorted(map(list, groups))


def test_groups_of_another_form_are_an_error():
    with pytest.raises(ValueError, match="a form that is not known"):
        groups_of(collective("replica_groups=something[8]"), 8)


def test_axes_are_those_along_which_devices_differ():
    assert axes_of(np.array(EVENS), MESH) == ("fsdp",)
    assert axes_of(np.array([[0, 1], [2, 3]]), MESH) == ("expert",)
    assert axes_of(np.arange(8)[None], MESH) == ("fsdp", "expert")
    assert axes_of(np.arange(8)[:, None], MESH) == ()


# A loop of three turns: a gather that starts and ends apart, the all-reduce of a part that is used,
# and an exchange. Then groups of one, a permutation, and two gradients summed at once.
PROGRAM = """
%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%scattered (p: f32[64,16]) -> f32[16,16] {
  %p = f32[64,16]{1,0} parameter(0)
  %reduced = f32[64,16]{1,0} all-reduce(%p), replica_groups=@FSDP@, to_apply=%add
  %zero = s32[] constant(0)
  ROOT %part = f32[16,16]{1,0} dynamic-slice(%reduced, %zero, %zero), dynamic_slice_sizes={16,16}
}

%gathered (w: bf16[8,16]) -> bf16[32,16] {
  %w = bf16[8,16]{1,0} parameter(0)
  ROOT %whole = bf16[32,16]{1,0} all-gather(%w), replica_groups=@FSDP@, dimensions={0}
}

%body (t: (s32[], bf16[8,16], f32[64,16])) -> (s32[], bf16[8,16], f32[64,16]) {
  %t = (s32[], bf16[8,16]{1,0}, f32[64,16]{1,0}) parameter(0)
  %n = s32[] get-tuple-element(%t), index=0
  %shard = bf16[8,16]{1,0} get-tuple-element(%t), index=1
  %x = f32[64,16]{1,0} get-tuple-element(%t), index=2
  %start = ((bf16[8,16]{1,0}), bf16[32,16]{1,0}) async-start(%shard), calls=%gathered
  %done = bf16[32,16]{1,0} async-done(%start), calls=%gathered
  %used = f32[64,16]{1,0} fusion(%x, %done), kind=kLoop, calls=%add, @MLP@
  %all-reduce-scatter.1 = f32[16,16]{1,0} fusion(%used), kind=kCustom, calls=%scattered
  %sent = f32[2,32,16]{2,1,0} all-to-all(%used), replica_groups=@EXPERT@, dimensions={0}, @MOE@
  ROOT %next = (s32[], bf16[8,16]{1,0}, f32[64,16]{1,0}) tuple(%n, %shard, %used)
}

%condition (t: (s32[], bf16[8,16], f32[64,16])) -> pred[] {
  %t = (s32[], bf16[8,16]{1,0}, f32[64,16]{1,0}) parameter(0)
  ROOT %go = pred[] constant(true)
}

ENTRY %main (s: (s32[], bf16[8,16], f32[64,16])) -> f32[64,16] {
  %s = (s32[], bf16[8,16]{1,0}, f32[64,16]{1,0}) parameter(0)
  %loop = (s32[], bf16[8,16]{1,0}, f32[64,16]{1,0}) while(%s), condition=%condition, @TRIPS@
  %y = f32[64,16]{1,0} get-tuple-element(%loop), index=2
  %alone = f32[64,16]{1,0} all-reduce(%y), replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}
  %moved = f32[64,16]{1,0} collective-permute(%y), source_target_pairs={{0,1},{1,0},{2,2},{3,3}}
  %d_w = f32[64,16]{1,0} multiply(%y, %y), @GRADIENT@
  %d_h = f32[10]{0} slice(%y), @HEAD@
  %sums = (f32[64,16]{1,0}, f32[10]{0}) all-reduce(%d_w, %d_h), replica_groups={}, to_apply=%add
  %first = f32[64,16]{1,0} get-tuple-element(%sums), index=0
  ROOT %new = f32[64,16]{1,0} add(%first, %y), metadata={op_name="jit(train_step)/optimizer/add"}
}
"""
for mark, text in {
    "@FSDP@": "[2,4]<=[4,2]T(1,0)",
    "@EXPERT@": "{{0,1},{2,3},{4,5},{6,7}}",
    "@MLP@": 'metadata={op_name="jit(train_step)/jvp(teacher)/while/body/dense_layer/mlp/dot"}',
    "@MOE@": 'metadata={op_name="transpose(jvp(student))/sparse_layer/moe/experts/exchange"}',
    "@TRIPS@": 'body=%body, backend_config={"known_trip_count":{"n":"3"}}',
    "@GRADIENT@": 'metadata={op_name="jit(train_step)/transpose(jvp(student))/attention/dot"}',
    "@HEAD@": 'slice={[0:10]}, metadata={op_name="jit(train_step)/jvp(mimic)/head/dot"}',
}.items():
    PROGRAM = PROGRAM.replace(mark, text)


def test_bytes_axes_and_modules_of_a_program():
    found = [(c.kind, c.axes, c.module, c.links, c.times) for c in collectives(read(PROGRAM), MESH)]
    assert sorted(found) == [
        # 3 parts of 8 * 16 bfloat16; the weight has no name, so the product that reads it decides
        ("all-gather", ("fsdp",), "teacher mlp", 3 * 8 * 16 * 2, 3),
        # two operands of one all-reduce over 8 devices, each for what made it
        ("all-reduce", ("fsdp", "expert"), "loss", 2 * 7 / 8 * 10 * 4, 1),
        ("all-reduce", ("fsdp", "expert"), "student attention, gradient", 7 / 4 * 64 * 16 * 4, 1),
        ("all-to-all", ("expert",), "student experts, gradient", 1 / 2 * 64 * 16 * 4, 3),
        # 2 of 8 devices send; nothing named is near
        ("collective-permute", ("expert",), "unnamed", 2 / 8 * 64 * 16 * 4, 1),
        ("reduce-scatter", ("fsdp",), "teacher mlp", 3 / 4 * 64 * 16 * 4, 3),
    ]


ACROSS = """
ENTRY %main (w: f32[64,16]) -> token[] {
  %w = f32[64,16]{1,0} parameter(0)
  %start = token[] after-all()
  %d = f32[64,16]{1,0} multiply(%w, %w), @GRADIENT@
  %sum = f32[64,16]{1,0} all-reduce(%d), replica_groups={}, to_apply=%add
  %send = (f32[64,16]{1,0}, u32[], token[]) send(%sum, %start), is_host_transfer=true, @KIND@
  ROOT %done = token[] send-done(%send), is_host_transfer=true, @HANDLER@
}
"""
for mark, text in {
    "@GRADIENT@": 'metadata={op_name="jit(train_step)/transpose(jvp(student))/mlp/dot"}',
    "@KIND@": 'frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}',
    "@HANDLER@": 'frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime"}',
}.items():
    ACROSS = ACROSS.replace(mark, text)


def test_slices_send_to_each_other_through_their_hosts():
    """Two slices of four devices: a ring of four in each, then a ring of the two slices."""
    mesh = {"data": 2, "fsdp": 4, "expert": 1, "tensor": 1}
    within, across = collectives(read(ACROSS), mesh, slices=2)
    size, module = 64 * 16 * 4, "student mlp, gradient"
    assert (within.links, within.network) == (2 * 3 / 4 * size, 0)
    assert (across.links, across.network) == (0, 2 * 1 / 2 * size)
    assert (within.axes, across.axes) == (("fsdp",), ("data",))
    assert (across.kind, within.module, across.module) == ("all-reduce", module, module)


# A gather beside a product, as TPUs run it: begun, held by the product's fusion, and ended.
BESIDE = """
%begin (p: bf16[8,16]) -> (bf16[8,16], bf16[32,16]) {
  %p = bf16[8,16]{1,0} parameter(0)
  %g = bf16[32,16]{1,0} all-gather(%p), replica_groups=@FSDP@, dimensions={0}
  ROOT %t = (bf16[8,16]{1,0}, bf16[32,16]{1,0}) tuple(%p, %g)
}

%async_collective_fusion.1 (p: bf16[8,16], q: bf16[32,16], x: f32[4,4]) -> (f32[4,4], bf16[32,16]) {
  %p = bf16[8,16]{1,0} parameter(0)
  %q = bf16[32,16]{1,0} parameter(1)
  %x = f32[4,4]{1,0} parameter(2)
  %g = bf16[32,16]{1,0} all-gather(%p), replica_groups=@FSDP@, dimensions={0}
  %y = f32[4,4]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %t = (f32[4,4]{1,0}, bf16[8,16]{1,0}, bf16[32,16]{1,0}) tuple(%y, %p, %q)
}

%end (p: bf16[8,16], q: bf16[32,16]) -> bf16[32,16] {
  %p = bf16[8,16]{1,0} parameter(0)
  %q = bf16[32,16]{1,0} parameter(1)
  %g = bf16[32,16]{1,0} all-gather(%p), replica_groups=@FSDP@, dimensions={0}
  ROOT %same = bf16[32,16]{1,0} bitcast(%q)
}

ENTRY %main (w: bf16[8,16], x: f32[4,4]) -> bf16[32,16] {
  %w = bf16[8,16]{1,0} parameter(0)
  %x = f32[4,4]{1,0} parameter(1)
  %async-collective-start = (bf16[8,16]{1,0}, bf16[32,16]{1,0}) fusion(%w), calls=%begin
  %p = bf16[8,16]{1,0} get-tuple-element(%async-collective-start), index=0
  %q = bf16[32,16]{1,0} get-tuple-element(%async-collective-start), index=1
  %f = (f32[4,4]{1,0}, bf16[8,16]{1,0}, bf16[32,16]{1,0}) fusion(%p, %q, %x), @ALIAS@
  %r = bf16[8,16]{1,0} get-tuple-element(%f), index=1
  %s = bf16[32,16]{1,0} get-tuple-element(%f), index=2
  ROOT %async-collective-done = bf16[32,16]{1,0} fusion(%r, %s), @END@
}
"""
for mark, text in {
    "@FSDP@": "[2,4]<=[4,2]T(1,0)",
    "@ALIAS@": "output_to_operand_aliasing={{1}: (0, {}), {2}: (1, {})}, calls="
    '%async_collective_fusion.1, metadata={op_name="jvp(teacher)/attention/dot_general"}',
    "@END@": "output_to_operand_aliasing={{}: (1, {})}, calls=%end, "
    'metadata={op_name="jvp(teacher)/mlp/all_gather"}',
}.items():
    BESIDE = BESIDE.replace(mark, text)


def test_a_collective_beside_fusions_counts_once():
    program = read(BESIDE)
    (found,) = collectives(program, MESH)
    assert (found.kind, found.sent) == ("all-gather", 3 * 8 * 16 * 2)
    assert found.module == "teacher mlp"  # where it ends, not beside whose product it runs
    traffic = Traffic(program, on_chip=True)
    moved = {i.name: traffic.of("main", i) for i in program.computations["main"]}
    assert moved["f"] == 2 * 4 * 4 * 4  # the product's, not those of the gather


STARTED_ON_GPU = """
ENTRY %main (w: bf16[8,16], r: bf16[32,16]) -> bf16[32,16] {
  %w = bf16[8,16]{1,0} parameter(0)
  %r = bf16[32,16]{1,0} parameter(1)
  %s = (bf16[8,16]{1,0}, bf16[32,16]{1,0}) all-gather-start(%w), replica_groups=[2,4]<=[4,2]T(1,0)
  %d = bf16[32,16]{1,0} all-gather-done(%s), metadata={op_name="jvp(vision_tower)/attention"}
  %o = s64[2]{0} constant({0, 0})
  %x = bf16[32,16]{1,0} ragged-all-to-all(%d, %r, %o, %o, %o, %o), replica_groups=[4,2]<=[8]
  ROOT %y = bf16[32,16]{1,0} add(%x, %d), metadata={op_name="jvp(student)/moe/experts/add"}
}
"""


def test_programs_of_gpus():
    found = {c.kind: c for c in collectives(read(STARTED_ON_GPU), MESH)}
    assert found["all-gather"].sent == 3 * 8 * 16 * 2
    assert found["all-gather"].module == "student experts"
    # what is received into and the offsets are not sent
    assert found["ragged-all-to-all"].sent == 1 / 2 * 32 * 16 * 2
    assert found["ragged-all-to-all"].axes == ("expert",)


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("jit(train_step)/jvp(vision_tower)/while/body/attention/dot", "vision tower"),
        ("jit(train_step)/jvp(teacher)/embedding/gather", "teacher embedding"),
        (
            "transpose(jvp(student))/checkpoint/rematted_computation/moe/experts/x",
            "student experts, recomputed",
        ),
        ("transpose(jvp(mimic))/shard_map/gather_head/all_gather", "loss, gradient"),
        ("jit(train_step)/jvp(student)/while/body/dynamic_slice", "student"),
        ("jit(train_step)/pair_means/while/body/shard_map/gather_head/all_gather", "loss"),
        ("jit(train_step)/pair_means/while/body/student/mlp/dot_general", "student mlp"),
        ("jit(train_step)/reduce_sum", "None"),
    ],
)
def test_places_by_name(name, place):
    assert str(place_of(name)) == place


def test_a_gather_that_a_compiler_makes():
    """Eight CPU devices: a weight f32[64,48], split over fsdp, that every device reads whole."""
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, expert=2))
    rows = NamedSharding(mesh, PartitionSpec(("fsdp", "expert")))
    weights = NamedSharding(mesh, PartitionSpec("fsdp"))

    def product(x, w):
        with jax.named_scope("student/mlp"):
            return jax.lax.with_sharding_constraint(jnp.tanh(x @ w), rows)

    step = jax.jit(product, in_shardings=(rows, weights), out_shardings=rows)
    shapes = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((16, 64), (64, 48)))
    program = read(step.lower(*shapes).compile().as_text())
    (found,) = collectives(program, dict(zip(AXES, mesh.devices.shape)))
    assert (found.kind, found.axes, found.module) == ("all-gather", ("fsdp",), "student mlp")
    assert found.sent == 3 * 16 * 48 * 4
