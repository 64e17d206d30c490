"""Bytes, operations, memory and the time of a step, of programs whose numbers are known."""

import pytest

from mod_jax.config import DecoderConfig, ModelConfig, MoEConfig, VisionConfig
from mod_jax.rehearsal.collectives import Collective
from mod_jax.rehearsal.hardware import GENERATIONS, GIB, Hardware, hardware
from mod_jax.rehearsal.memory import refused
from mod_jax.rehearsal.program import read
from mod_jax.rehearsal.report import verdict
from mod_jax.rehearsal.roofline import Costs, attention_flops, costs, roofline
from mod_jax.rehearsal.topology import NAMES
from mod_jax.rehearsal.traffic import Traffic
from mod_jax.rehearsal.trips import Work, trips, work_of

# Six layers, whose weights lie in a stack: each turn slices one, multiplies, and writes what it
# made into a stack of results. A part of the input lies on the chip.
LAYERS = """
%sliced (stack: bf16[6,64,32], n: s32[]) -> bf16[64,32] {
  %stack = bf16[6,64,32]{2,1,0} parameter(0)
  %n = s32[] parameter(1)
  %zero = s32[] constant(0)
  %one = bf16[1,64,32]{2,1,0} dynamic-slice(%stack, %n, %zero, %zero), dynamic_slice_sizes={1,64,32}
  ROOT %flat = bf16[64,32]{1,0} bitcast(%one)
}

%written (out: f32[6,16,32], y: f32[16,32], n: s32[]) -> f32[6,16,32] {
  %out = f32[6,16,32]{2,1,0} parameter(0)
  %y = f32[16,32]{1,0} parameter(1)
  %n = s32[] parameter(2)
  %zero = s32[] constant(0)
  %up = f32[1,16,32]{2,1,0} bitcast(%y)
  ROOT %new = f32[6,16,32]{2,1,0} dynamic-update-slice(%out, %up, %n, %zero, %zero)
}

%body (t: (s32[], bf16[6,64,32], bf16[16,64], f32[6,16,32])) -> (s32[], bf16[6,64,32]) {
  %t = (s32[], bf16[6,64,32]{2,1,0}, bf16[16,64]{1,0}, f32[6,16,32]{2,1,0}) parameter(0)
  %n = s32[] get-tuple-element(%t), index=0
  %stack = bf16[6,64,32]{2,1,0} get-tuple-element(%t), index=1
  %x = bf16[16,64]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%t), index=2
  %out = f32[6,16,32]{2,1,0} get-tuple-element(%t), index=3
  %w = bf16[64,32]{1,0} fusion(%stack, %n), kind=kLoop, calls=%sliced
  %y = f32[16,32]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}, @MLP@
  %new = f32[6,16,32]{2,1,0} fusion(%out, %y, %n), kind=kLoop, calls=%written
  ROOT %next = (s32[], bf16[6,64,32]{2,1,0}) tuple(%n, %stack)
}

%condition (t: (s32[], bf16[6,64,32], bf16[16,64], f32[6,16,32])) -> pred[] {
  %t = (s32[], bf16[6,64,32]{2,1,0}, bf16[16,64]{1,0}, f32[6,16,32]{2,1,0}) parameter(0)
  ROOT %go = pred[] constant(true)
}

ENTRY %main (s: (s32[], bf16[6,64,32], bf16[16,64], f32[6,16,32])) -> s32[] {
  %s = (s32[], bf16[6,64,32]{2,1,0}, bf16[16,64]{1,0}, f32[6,16,32]{2,1,0}) parameter(0)
  %loop = (s32[], bf16[6,64,32]{2,1,0}) while(%s), condition=%condition, body=%body, @TRIPS@
  ROOT %n = s32[] get-tuple-element(%loop), index=0
}
"""
LAYERS = LAYERS.replace("@TRIPS@", 'backend_config={"known_trip_count":{"n":"6"}}').replace(
    "@MLP@", 'metadata={op_name="jit(train_step)/jvp(student)/while/body/mlp/dot_general"}'
)
W, X, Y, N = 64 * 32 * 2, 16 * 64 * 2, 16 * 32 * 4, 4


@pytest.mark.parametrize("on_chip", [True, False])
def test_slices_and_updates_in_place_count_alone(on_chip):
    program = read(LAYERS)
    traffic = Traffic(program, on_chip)
    found = {(c, i.name): traffic.of(c, i) for c, i, _ in program.located_runs()}
    total, found = sum(found.values()), {n: size for (c, n), size in found.items() if c == "body"}
    assert found["w"] == W + N + W  # a layer is read and written, not the stack
    assert found["y"] == (0 if on_chip else X) + W + Y
    assert found["new"] == 0 + Y + N + Y
    assert total == found["w"] + found["y"] + found["new"]


PREFETCHED = """
ENTRY %main (x: f32[64,32]) -> f32[64,32] {
  %x = f32[64,32]{1,0} parameter(0)
  %s = (f32[64,32]{1,0}, f32[16,32]{1,0:T(8,128)S(1)}, s32[]{:S(2)}) slice-start(%x), slice={[0:16]}
  %part = f32[16,32]{1,0:T(8,128)S(1)} slice-done(%s)
  %c = (f32[64,32]{1,0:S(1)}, f32[64,32]{1,0}, u32[]{:S(2)}) copy-start(%x)
  %near = f32[64,32]{1,0:S(1)} copy-done(%c)
  %d = (f32[64,32]{1,0}, f32[64,32]{1,0:S(1)}, u32[]{:S(2)}) copy-start(%near)
  ROOT %back = f32[64,32]{1,0} copy-done(%d)
}
"""


def test_copies_to_the_chip_read_and_copies_back_write():
    program = read(PREFETCHED)
    traffic = Traffic(program, on_chip=True)
    found = {i.name: traffic.of("main", i) for i in program.computations["main"]}
    whole = 64 * 32 * 4
    assert (found["s"], found["c"], found["d"]) == (whole / 4, whole, whole)
    assert sum(found.values()) == whole / 4 + 2 * whole


MESH = {"data": 1, "fsdp": 1, "expert": 1, "tensor": 1}
WORK = Work(words=8, read=8, routed=8)


def test_costs_go_by_trips_and_modules():
    found = costs(read(LAYERS), MESH, WORK, slices=1, on_chip=True)
    assert found.flops == {"student mlp": 6 * 2 * 16 * 64 * 32}
    assert found.memory == {"unnamed": 6 * (2 * W + 2 * Y + 2 * N), "student mlp": 6 * (W + Y)}
    assert found.collectives == ()


def test_what_takes_longest_binds():
    sent = Collective("a", "all-reduce", ("data",), "loss", 40e9, 5e9, times=2)
    device = Hardware(16 * GIB, 200e12, 800e9, 160e9, 10e9)
    roof = roofline(Costs({"loss": 30e12}, {"loss": 200e9}, (sent,)), 10e12, device)
    assert (roof.compute, roof.memory, roof.links, roof.network) == (0.2, 0.25, 0.5, 1.0)
    assert (roof.step, roof.no_overlap, roof.binds) == (1.0, 1.95, "network")
    assert Costs({}, {}, (sent, sent)).sent("axes") == {"data": 180e9}


def test_every_topology_has_its_hardware():
    assert {hardware(name) for name in NAMES} == set(GENERATIONS.values())
    # two devices of half a chip: 192 GB, 2307 TFLOP/s, 7.38 TB/s
    half = hardware("tpu7x-16")
    assert half.devices_a_chip == 2
    assert (2 * half.flops, 2 * half.bandwidth) == (2307e12, 7380e9)


def test_attention_of_kernels():
    """By hand: 10 positions of 2 heads of 4, 3 layers; a tower of 4 + 1 features, 2 of 3 layers."""
    vision = VisionConfig(
        image_size=4, patch_size=2, hidden_size=8, num_layers=3, num_heads=2, feature_layer=-2
    )
    decoder = DecoderConfig(num_layers=3, num_heads=2, num_kv_heads=2, head_dim=4)
    model = ModelConfig(vision, decoder)
    forward = 2 * (10 * 10 / 2) * 4 * 3 * 2 * 4  # two rows; causal; two products of 2 FLOPs each
    tower = 2 * 1 * 5 * 5 * 4 * 2 * 8
    assert attention_flops(model, None, 2, 10, 1) == (1 + 1 + 2.5) * forward + tower
    assert attention_flops(model, model, 2, 10, 1) == (1 + 1 + 2.5 + 1) * forward + tower


def loop_of(op_name, body):
    """A program with a loop whose trips depend on data, and that loop."""
    program = read(
        "%body (t: (s32[], bf16[16,8])) -> (s32[], bf16[16,8]) {\n"
        "  %t = (s32[], bf16[16,8]{1,0}) parameter(0)\n"
        f"{body}"
        "  ROOT %r = (s32[], bf16[16,8]{1,0}) tuple(%t)\n}\n\n"
        "%condition (t: (s32[], bf16[16,8])) -> pred[] {\n"
        "  %t = (s32[], bf16[16,8]{1,0}) parameter(0)\n"
        "  ROOT %go = pred[] constant(true)\n}\n\n"
        "ENTRY %main (s: (s32[], bf16[16,8])) -> (s32[], bf16[16,8]) {\n"
        "  %s = (s32[], bf16[16,8]{1,0}) parameter(0)\n"
        "  ROOT %l = (s32[], bf16[16,8]{1,0}) while(%s), condition=%condition, body=%body, "
        f'metadata={{op_name="{op_name}"}}\n}}\n'
    )
    return program, program.computations["main"][1]


LOGITS = """  %x = bf16[16,8]{1,0} get-tuple-element(%t), index=1
  %w = bf16[8,96]{1,0} constant({...})
  %logits = f32[16,96]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
"""
GROUPED = """  %x = bf16[16,8]{1,0} get-tuple-element(%t), index=1
  %w = bf16[4,8,12]{2,1,0} constant({...})
  %y = bf16[16,12]{1,0} custom-call(%x, %w), custom_call_target="tpu_custom_call"
"""


def test_loops_that_depend_on_data():
    work = Work(words=96, read=100, routed=50)
    for scopes in ("jvp(mimic)", "pair_means/while/body"):
        program, loop = loop_of(f"jit(train_step)/{scopes}/shard_map/while", LOGITS)
        assert trips(work, program)(loop) == 7  # chunks of 16 of the 100 positions
    program, loop = loop_of("jvp(student)/moe/experts/shard_map/while", GROUPED)
    assert trips(work, program)(loop) == 4  # chunks of 16 of the 50 rows
    program, loop = loop_of("jvp(student)/moe/experts/later_rounds/while", GROUPED)
    assert trips(work, program)(loop) == 0
    program, loop = loop_of("jvp(student)/attention/while", "")
    with pytest.raises(ValueError, match=r"attention/while: expected a loop of the loss or of the"):
        trips(work, program)(loop)


def test_the_work_of_a_device():
    sparse = ModelConfig(decoder=DecoderConfig(moe=MoEConfig(experts_per_token=2)))
    mesh = {"data": 1, "fsdp": 2, "expert": 2, "tensor": 4}
    assert work_of(sparse, mesh, 60, 100) == Work(151936 // 8, 2 * 60, 200)
    assert Work(1, 1, 200).filled(800) == 0.25
    assert Work(1, 1, 200).filled(100) == 1


def stage(needed, fits):
    return {"memory": {"needed": needed}, "fits": fits}


def test_the_verdict_is_about_the_largest_stage_and_a_chip():
    device = hardware("v5e-16")
    fits = [stage(2 * GIB, True), stage(3.5 * GIB, True)]
    assert verdict(fits, device) == (True, "fits: 3.50 of 15.75 GiB a chip")
    assert verdict([*fits, stage(20 * GIB, False)], device) == (
        False,
        "does not fit: 20.00 of 15.75 GiB a chip",
    )
    assert verdict(fits, hardware("tpu7x-16"))[1] == "fits: 7.00 of 189.50 GiB a chip"


REFUSED = """RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.51G of 15.75G hbm.

  Largest program allocations in hbm:

  1. Size: 4.00G
     Operator: op_name="jit(train_step)/jvp(teacher)/while/body/dense_layer/attention/dot_general"
     Shape: f32[8,28,2048,2048]{3,2,1,0:T(8,128)}
     Unpadded size: 4.00G
     Allocation type: HLO temp
     ==========================

  2. Size: 512.5M
     Shape: bf16[151936,1766]{1,0:T(8,128)(2,1)}
     ==========================
"""


def test_what_a_compiler_says_that_refuses_a_step():
    memory = refused(REFUSED, {"teacher": 4 * GIB})
    assert memory.needed == 20.51 * GIB
    assert memory.parts == {"teacher": 4 * GIB, "activations and temporaries": 16.51 * GIB}
    assert memory.largest == (
        (4 * GIB, "f32[8,28,2048,2048]", "teacher attention"),
        (512.5 * GIB / 1024, "bf16[151936,1766]", "unnamed"),
    )
    short = "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO"
    assert refused(f"{short} temporaries (200.00G) exceeds available HBM (94.75G).", {}).needed == (
        200 * GIB
    )
    assert refused("INTERNAL: something else", {}) is None
