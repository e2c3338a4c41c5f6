"""The recurrent cells against linen's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from imgclf_jax.models import recurrent

CELLS = {"lstm": (recurrent.LSTMCell, nn.OptimizedLSTMCell), "gru": (recurrent.GRUCell, nn.GRUCell)}


@pytest.mark.thorough
@pytest.mark.parametrize("name", CELLS)
def test_a_cell_is_linens_bit_for_bit_in_float32(name):
    """Initialization, results and gradients."""
    x = jax.random.normal(jax.random.key(1), (4, 6, 5))
    found = []
    for cell in CELLS[name]:
        model = nn.RNN(cell(7, name="cell"))
        first = model.init(jax.random.key(0), x)
        # Biases begin at zero, and would not be seen.
        variables = jax.tree.map(lambda v: v + 0.1 * jnp.sin(jnp.arange(v.size)).reshape(v.shape), first)

        def loss(variables, model=model):
            y = model.apply(variables, x)
            return jnp.sum(jnp.sin(y)), y

        (_, y), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(variables)
        assert all(np.any(g) for g in jax.tree.leaves(gradients))
        found.append((first, y, gradients))
    assert jax.tree.structure(found[0]) == jax.tree.structure(found[1])
    jax.tree.map(np.testing.assert_array_equal, *found)
