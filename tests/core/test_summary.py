"""A model's parameters by module and its FLOPs, by hand."""

from imgclf_jax import config as configs
from imgclf_jax.core import jaxprs
from imgclf_jax.optim import rules
from imgclf_jax.recipe import Recipe
from imgclf_jax.run.provenance import DataInfo


def test_a_network_by_hand():
    """Convolutions without padding, 3x3, then 2x2 max pooling: 8 → 6 → 3 and 3 → 2 → 1, of 2x2."""
    config = configs.default_config()
    config.model = "cnn(widths=(5, 6), hidden=7, kernel=2)"
    recipe = Recipe(config, DataInfo(10, (8, 8, 3), ("a", "b"), ""))
    assert rules.parameters_by_module(recipe.parameters) == {
        "block*": 4 * 3 * 5 + 5 + 4 * 5 * 6 + 6, "dense": 6 * 7 + 7, "head": 7 * 2 + 2,
    }  # fmt: skip
    # Without the row and the column that fill no pooling window: 6 by 6 and 2 by 2 outputs.
    macs = 36 * 4 * 3 * 5 + 4 * 4 * 5 * 6 + 6 * 7 + 7 * 2
    assert jaxprs.matmul_flops(jaxprs.forward(recipe.model, (8, 8, 3))) == 2 * macs
