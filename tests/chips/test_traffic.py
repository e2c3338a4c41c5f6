"""Memory traffic of compiled programs: by hand, and against XLA's own count where both count the same."""

import jax
import jax.numpy as jnp
import pytest
from compilers import printed
from jax import lax
from jax._src.lib import xla_client

from imgclf_jax.core import sharding
from imgclf_jax.tools.dryrun import counts, traffic

KB = 4 * 8 * 128  # bytes of f32[8,128]
TEXT = """HloModule made_up

%row (p.0: f32[8,128], p.1: s32[]) -> f32[1,128] {
  %p.0 = f32[8,128]{1,0:T(8,128)} parameter(0)
  %p.1 = s32[]{:T(128)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  ROOT %row.1 = f32[1,128]{1,0:T(1,128)} dynamic-slice(%p.0, %p.1, %zero), dynamic_slice_sizes={1,128}
}

%put (p.2: f32[8,128], p.3: f32[1,128], p.4: s32[]) -> f32[8,128] {
  %p.2 = f32[8,128]{1,0:T(8,128)} parameter(0)
  %p.3 = f32[1,128]{1,0:T(1,128)} parameter(1)
  %p.4 = s32[]{:T(128)} parameter(2)
  %zero.2 = s32[]{:T(128)} constant(0)
  ROOT %put.1 = f32[8,128]{1,0:T(8,128)} dynamic-update-slice(%p.2, %p.3, %p.4, %zero.2)
}

%twice (p.5: f32[8,128]) -> f32[8,128] {
  %p.5 = f32[8,128]{1,0:T(8,128)} parameter(0)
  %alias = f32[8,128]{1,0:T(8,128)} fusion(%p.5), kind=kLoop, calls=%nothing
  ROOT %add = f32[8,128]{1,0:T(8,128)} add(%alias, %alias)
}

%nothing (p.6: f32[8,128]) -> f32[8,128] {
  %p.6 = f32[8,128]{1,0:T(8,128)} parameter(0)
  ROOT %same = f32[8,128]{1,0:T(8,128)} bitcast(%p.6)
}

%less (p.7: (s32[], f32[8,128])) -> pred[] {
  %n = s32[]{:T(128)} constant(3)
  %p.7 = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p.7), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %n), direction=LT
}

%body (p.8: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %p.8 = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) parameter(0)
  %j = s32[]{:T(128)} get-tuple-element(%p.8), index=0
  %x = f32[8,128]{1,0:T(8,128)} get-tuple-element(%p.8), index=1
  %y = f32[8,128]{1,0:T(8,128)} all-reduce(%x), replica_groups={}, to_apply=%sum
  ROOT %t = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) tuple(%j, %y)
}

ENTRY %main (a: f32[8,128], k: s32[]) -> f32[8,128] {
  %a = f32[8,128]{1,0:T(8,128)} parameter(0)
  %k = s32[]{:T(128)S(6)} parameter(1)
"""
END = "\n}\n"


@pytest.mark.parametrize(("lines", "expected"), [
    ("ROOT %b = f32[8,128]{1,0:T(8,128)} add(%a, %a)", 3 * KB),
    ("ROOT %b = f32[8,128]{1,0:T(8,128)S(1)} negate(%a)", KB),  # written to on-chip memory
    ("ROOT %b = f32[8,128]{1,0S(1)} negate(%a)", 2 * KB),  # no tiles: a GPU, which has other spaces
    ("ROOT %b = f32[1,128]{1,0:T(1,128)} fusion(%a, %k), kind=kLoop, calls=%row", 2 * KB // 8),
    ("%r = f32[1,128]{1,0:T(1,128)} fusion(%a, %k), kind=kLoop, calls=%row\n"
     "  ROOT %b = f32[8,128]{1,0:T(8,128)} fusion(%a, %r, %k), kind=kLoop, calls=%put", 4 * KB // 8),
    ("ROOT %b = f32[8,128]{1,0:T(8,128)} fusion(%a), kind=kLoop, calls=%twice", 2 * KB),
    ("%c = (f32[8,128]{1,0:T(8,128)S(1)}, f32[8,128]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%a)\n"
     "  ROOT %b = f32[8,128]{1,0:T(8,128)S(1)} copy-done(%c)", KB),
    ('ROOT %b = (f32[8,128]{1,0}, u8[1000]{0}) custom-call(%a, %a), custom_call_target="__cudnn$convForward"',
     3 * KB),
    ('ROOT %b = f32[8,128]{1,0:T(8,128)} custom-call(), custom_call_target="AllocateBuffer"', 0),
    ("%z = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) tuple(%k, %a)\n  ROOT %b = (s32[]{:T(128)}, f32[8,128]"
     "{1,0:T(8,128)}) while(%z), condition=%less, body=%body", 3 * 2 * KB),
    ("%z = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) tuple(%k, %a)\n  ROOT %b = (s32[]{:T(128)}, f32[8,128]"
     '{1,0:T(8,128)}) while(%z), condition=%less, body=%body, backend_config={"known_trip_count":{"n":"7"}}',
     7 * 2 * KB),
])  # fmt: skip
def test_by_hand(lines, expected):
    """Reads and writes: not of on-chip values, a slice where only a slice is used, a loop as often as it runs."""
    assert traffic.Module(TEXT + "  " + lines + END).traffic() == expected


def test_collectives_of_a_loop():
    loop = (
        "  %z = (s32[], f32[8,128]{1,0}) tuple(%k, %a)\n"
        "  ROOT %b = (s32[], f32[8,128]{1,0}) while(%z), condition=%less, body=%body"
    )
    assert traffic.Module(TEXT + loop + END).collectives() == {"all-reduce": (3, 3 * KB)}


def test_a_loop_counts_as_often_as_it_runs():
    """By this machine's compiler: traffic and collectives of a matmul over eight devices, in a loop."""
    mesh = sharding.make_mesh()
    rows = jax.ShapeDtypeStruct((64, 256), "float32", sharding=sharding.sharded(mesh))
    weights = jax.ShapeDtypeStruct((256, 256), "float32", sharding=sharding.replicated(mesh))

    def of(length):
        def program(w, x):
            def step(w, _):
                return w - jax.grad(lambda w: jnp.sum(jnp.sin(x @ w)))(w), None

            return lax.scan(step, w, None, length=length)[0]

        jitted = jax.jit(program, out_shardings=sharding.replicated(mesh))
        return counts.count_program(jitted.lower(weights, rows).compile())

    few, many = of(5), of(25)
    assert many.bytes == pytest.approx(5 * few.bytes, rel=0.2)  # not what surrounds the loop
    size = 4 * 256 * 256
    assert (few.collectives["all-reduce"], many.collectives["all-reduce"]) == ((5, 5 * size), (25, 25 * size))


def test_beside_xlas_own_count():
    """A program without loops and library kernels."""

    def loss(weights, x):
        for w in weights:
            x = jax.nn.relu(x @ w)
        return jnp.mean((x - x.mean(0)) ** 2)

    shapes = [jax.ShapeDtypeStruct((256, 256), "float32")] * 3, jax.ShapeDtypeStruct((512, 256), "float32")
    compiled = jax.jit(jax.grad(loss)).lower(*shapes).compile()
    [module] = compiled.runtime_executable().hlo_modules()
    client = jax.devices("cpu")[0].client
    xla = xla_client._xla.hlo_module_cost_analysis(client, module)["bytes accessed"]
    assert counts.count_program(compiled).bytes == pytest.approx(xla, rel=0.05)


PROGRAM = """
from imgclf_jax.config import load_file

config, found = load_file("configs/fashion_mnist.py"), []
config.batch_size = int(sys.argv[2]) * chips.count
data = DataInfo(60_000, (28, 28, 1), tuple(map(str, range(10))), "")
mesh = sharding.make_mesh(topology.devices(chips))
for config.accumulate in (1, 4):
    counted = counts.count_program(Programs(Recipe(config, data), mesh).traced_train.lower().compile())
    found.append([counted.bytes, sum(n for _, n in counted.collectives.values())])
print(json.dumps(found))
"""


@pytest.mark.chips
@pytest.mark.parametrize(("chips", "images"), [("v5e:2x2", 128), ("h100:2", 128)])
def test_a_batch_in_parts_takes_as_much_traffic(chips, images):
    """Each microbatch reads the parameters again; the total size of the images' arrays is the same."""
    (whole, summed), (parts, summed_of_parts) = printed(PROGRAM, chips, str(images))
    assert 0.8 * whole < parts < 1.3 * whole
    assert summed <= summed_of_parts <= 4.1 * summed
