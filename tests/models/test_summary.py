"""The table of a model's blocks."""

import pytest
from cases import thorough

from imgclf_jax import config as configs
from imgclf_jax.models import summary
from imgclf_jax.recipe import Recipe
from imgclf_jax.run.provenance import DataInfo


def blocks(model: str, shape=(8, 8, 3)) -> list[summary.Block]:
    config = configs.default_config()
    config.model = model
    recipe = Recipe(config, DataInfo(10, shape, ("a", "b"), ""))
    return summary.summarize(recipe.model, shape, recipe.parameters)


def test_a_network_by_hand():
    """Convolutions without padding, 3x3, then 2x2 max pooling: 8 → 6 → 3."""
    first, dense, head = blocks("cnn(widths=(5,), hidden=7)")
    assert (first.name, first.output) == ("backbone/block0", (3, 3, 5))
    assert (first.parameters, first.flops) == (9 * 3 * 5 + 5, 2 * 36 * 9 * 3 * 5)
    assert (dense.output, dense.parameters, dense.flops) == ((7,), 45 * 7 + 7, 2 * 45 * 7)
    assert head == summary.Block("head", (2,), 7 * 2 + 2, 2 * 7 * 2)


@pytest.mark.parametrize(("model", "shape"), [
    ("rnn", (8, 8, 1)), *thorough(("resnet_cifar(depth=8)", (8, 8, 3)), ("vit('Ti', patch=4)", (8, 8, 3)),
                                  ("airbench", (32, 32, 3)))])  # fmt: skip
def test_every_parameter_is_in_one_block(model, shape):
    config = configs.default_config()
    config.model = model
    recipe = Recipe(config, DataInfo(10, shape, ("a", "b"), ""))
    found = summary.summarize(recipe.model, shape, recipe.parameters)
    total = 0
    for sizes in recipe.parameters.values():
        size = 1
        for n in sizes:
            size *= n
        total += size
    assert sum(block.parameters for block in found) == total
    assert summary.rows(found)[-1][2] == f"{total:,}"


def test_equal_neighbors_share_a_row():
    block = [summary.Block(f"backbone/block{i}", (4, 4), 1000, 2e6) for i in range(12)]
    other = summary.Block("backbone/norm", (4,), 8, 0)
    assert summary.rows([*block, other, summary.Block("head", (), 5, 1500)]) == [
        ("block0 … block11", "4 x 4", "12 x 1,000", "12 x 2 M"),
        ("norm", "4", "8", "0"),
        ("head", "", "5", "1.5 k"),
        ("total", "", "12,013", "24 M"),
    ]


@pytest.mark.parametrize(("number", "text"), [
    (0, "0"), (999, "999"), (1000, "1 k"), (999_600, "1 M"), (4.09e9, "4.09 G"), (2.5e13, "25 T")])  # fmt: skip
def test_amounts(number, text):
    assert summary.amount(number) == text
