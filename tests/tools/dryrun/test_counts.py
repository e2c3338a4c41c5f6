"""Counts of operations, bytes and collectives, against hand calculations."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from imgclf_jax.core import jaxprs, sharding
from imgclf_jax.tools.dryrun import counts


def flops(function, *shapes):
    jaxpr = jax.make_jaxpr(function)(*(jax.ShapeDtypeStruct(s, "float32") for s in shapes))
    return jaxprs.matmul_flops(jaxpr)


def test_products_and_convolutions():
    """A multiply-add is two operations."""
    assert flops(lambda a, b: a @ b, (3, 5), (5, 7)) == 2 * 3 * 5 * 7
    assert flops(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), (4, 3, 5), (4, 5, 7)) == 2 * 4 * 3 * 5 * 7

    def conv(groups, strides, x, kernel):
        numbers = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(
            x, kernel, (strides, strides), "SAME", dimension_numbers=numbers, feature_group_count=groups
        )

    assert flops(lambda x, k: conv(1, 1, x, k), (2, 8, 8, 4), (3, 3, 4, 6)) == 2 * (2 * 8 * 8 * 6) * (3 * 3 * 4)
    assert flops(lambda x, k: conv(4, 2, x, k), (2, 8, 8, 4), (3, 3, 1, 4)) == 2 * (2 * 4 * 4 * 4) * (3 * 3)


def test_loops_and_branches():
    """A loop of known length counts that often, one of unknown length once; of branches, the most expensive."""
    a = (4, 4)
    assert flops(lambda x: lax.scan(lambda c, _: (c @ c, None), x, None, length=5)[0], a) == 5 * 128
    assert flops(lambda x: lax.while_loop(lambda c: c[0, 0] > 0, lambda c: c @ c, x), a) == 128
    assert flops(lambda x: lax.cond(x[0, 0] > 0, lambda x: x @ x, lambda x: x, x), a) == 128


def test_bytes_per_device():
    mesh = sharding.make_mesh()
    whole = jax.ShapeDtypeStruct((16, 3), "float32", sharding=sharding.replicated(mesh))
    split = jax.ShapeDtypeStruct((16, 3), "bfloat16", sharding=sharding.sharded(mesh))
    assert counts.bytes_per_device({"a": whole, "b": split, "c": np.zeros(5, np.int8)}) == 16 * 3 * 4 + 2 * 3 * 2 + 5


HLO = """
  %all-reduce = f32[16,2]{1,0} all-reduce(%a), channel_id=1, replica_groups={{0,1}}, to_apply=%sum
  ROOT %both = (bf16[8]{0}, f32[]) all-reduce(%a, %b), channel_id=2, to_apply=%sum
  %start = (f32[4]{0}, f32[32]{0}) all-gather-start(%a), channel_id=3, dimensions={0}
  %done = f32[32]{0} all-gather-done(%start)
  %move = (u8[4]{0}, u8[4]{0}, u32[], u32[]) collective-permute-start(%a), source_target_pairs={{0,1}}
  %fusion = pred[64]{0} fusion(%all-reduce), kind=kLoop, calls=%fused
"""


def test_collectives_of_hlo_text():
    """Results count, and those of an asynchronous start without its operands."""

    class Compiled:
        def as_text(self):
            return HLO

    assert counts.collective_bytes(Compiled()) == {
        "all-reduce": (2, 128 + 16 + 4), "all-gather": (1, 128), "collective-permute": (1, 4)}  # fmt: skip
