"""Rules by parameter: which one applies, what a layer is, and their effect on a run."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import thorough, trained_for
from flax import linen as nn

from imgclf_jax import config as configs
from imgclf_jax.core import jaxprs, tree
from imgclf_jax.models.frozen import Frozen, apply_function
from imgclf_jax.optim import rules
from imgclf_jax.recipe import Recipe
from imgclf_jax.run import provenance
from imgclf_jax.run.provenance import DataInfo

NAMES = ["backbone/block0/kernel", "backbone/block0/bias", "backbone/block12/kernel", "head/kernel", "head/bias"]


def built(lr="", decay="", freeze="", layer_decay=0.0, names=NAMES):
    return rules.build(lr, decay, freeze, layer_decay, names)


def test_the_first_rule_that_matches_a_whole_path_counts():
    lr, decay = "head/bias=3, head/.*=1e1, .*(bias|scale) = 0.5", r"backbone/block\d{1,2}/kernel=0"
    out = built(lr, decay, "head/bias,.*0/b.*")
    assert out.lr == {"head/bias": 3.0, "head/kernel": 10.0, "backbone/block0/bias": 0.5}
    assert out.decay == {"backbone/block0/kernel": 0.0, "backbone/block12/kernel": 0.0}
    assert out.frozen == {"head/bias", "backbone/block0/bias"}
    assert not rules.Rules()
    assert out


VIT = ["patch/kernel", "cls", "positions_embedding", "block0/attn/qkv/kernel", "block0/norm1/scale",
       "block1/mlp/fc1/bias", "block2/mlp/fc1/kernel", "norm/scale"]  # fmt: skip
CONVNEXT = ["stem_conv/kernel", "stem_norm/bias", "stage0_0/dwconv/kernel", "stage0_0/gamma", "stage0_1/norm/bias",
            "downsample1_norm/scale", "downsample1_conv/kernel", "stage1_0/pwconv1/kernel", "norm/bias"]  # fmt: skip
RESNET = ["conv1/kernel", "bn1/scale", "layer1_0/conv1/kernel", "layer1_1/bn2/bias", "layer2_0/downsample_bn/scale"]
WIDE = ["conv1/kernel", "layer1_0/conv1/kernel", "layer2_0/bn1/scale", "bn1/scale"]  # whose last layer is called bn1


@pytest.mark.parametrize(
    ("names", "depths"),  # the head's last
    [
        (VIT, [0, 0, 0, 1, 1, 2, 3, 4, 4]),  # BEiT: what embeds is 0, block i is i + 1, the rest one more than the last
        (CONVNEXT, [0, 0, 1, 1, 2, 3, 3, 3, 4, 4]),
        (RESNET, [0, 0, 1, 2, 3, 4]),
        (WIDE, [0, 1, 2, 3, 3]),
        (["block0/kernel", "block1/kernel", "block1/bias", "dense/kernel"], [0, 1, 1, 2, 3]),  # no blocks of layers
        (["rnn/cell0/hf/kernel", "rnn/cell0/hi/kernel"], [0, 0, 1]),
        (["patch/kernel", "block0/fc/kernel", "lora/patch/kernel/b", "lora/block0/fc/kernel/a"], [0, 1, 0, 1, 2]),
        ([], [0]),
    ],
)
def test_layers_are_blocks_in_the_order_of_use(names, depths):
    names = [*(f"backbone/{name}" for name in names), "head/kernel"]
    assert rules.layers(names) == dict(zip(names, depths, strict=True))


# Arrays of parameters in each layer, from the stem up, counted with timm 1.0.31's `group_parameters`. The last norm of
# its ViT (2 arrays) belongs to the last block; BEiT's belongs to the layer of the head.
ARRAYS_OF_LAYERS = {
    "resnet(18)": [3, 6, 6, 9, 6, 9, 6, 9, 6, 2],
    "convnext('T')": [4, 9, 9, 9, 13, 9, 9, 13, *[9] * 8, 13, 9, 9, 4],
    "vit('Ti')": [4, *[12] * 11, 14 - 2, 2 + 2],
}


@pytest.mark.parametrize("spec", ["resnet(18)", *thorough("convnext('T')", "vit('Ti')")])
def test_layers_are_those_of_timm_and_beit(spec, fake_config):
    fake_config.model, fake_config.rules.layer_decay = spec, 0.5
    info = provenance.DataInfo(64, (64, 64, 3), ("a", "b"), "")
    run = Recipe(fake_config, info)
    from_top = [round(-math.log2(run.rules.lr.get(name, 1.0))) for name in run.parameters]
    assert np.bincount(from_top)[::-1].tolist() == ARRAYS_OF_LAYERS[spec]


class Block(nn.Module):
    """A residual block with every kind of layer that differs between training and evaluation."""

    width: int

    @nn.compact
    def __call__(self, x, train=False):
        y = nn.BatchNorm(momentum=0.5, name="bn")(nn.Dense(self.width, name="dense")(x), use_running_average=not train)
        return nn.Dropout(0.5, deterministic=not train)(nn.relu(y))


class Blocks(nn.Module):
    """A stem, three blocks and a norm, whose names are not in the order of use."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(8, name="stem")(x.reshape(x.shape[0], -1))
        x = nn.relu(nn.BatchNorm(not train, momentum=0.5, name="bn1")(x))
        for i in (10, 9, 2):
            x = Block(8, name=f"block{i}")(x, train)
        return nn.LayerNorm(name="a_norm")(x)


def test_the_order_of_use_is_that_of_the_model(fake_config):
    fake_config.model, fake_config.rules.layer_decay = f"{__name__}:Blocks", 0.5
    run = Recipe(fake_config, provenance.DataInfo(64, (12, 12, 1), tuple("abcd"), ""))
    factors = {"/".join(name.split("/")[:2]): run.rules.lr[name] for name in run.parameters}
    assert list(factors.items()) == [
        ("backbone/stem", 0.0625), ("backbone/bn1", 0.0625), ("backbone/block10", 0.125), ("backbone/block9", 0.25),
        ("backbone/block2", 0.5), ("backbone/a_norm", 1.0), ("head/kernel", 1.0), ("head/bias", 1.0)]  # fmt: skip


@pytest.mark.thorough
def test_frozen_parameters_keep_every_bit(fake_config):
    """Their values, and the batch statistics of completely frozen modules; the rest moves."""
    frozen = "backbone/stem/.*, backbone/bn1/.*, backbone/block10/.*, backbone/block9/dense/.*"
    fake_config.update_from_flattened_dict({"model": f"{__name__}:Blocks", "optimizer": "adamw(weight_decay=0.1)",
                                            "clip": 1.0, "rules.freeze": frozen})  # fmt: skip
    programs, _, _, after = trained_for(fake_config, 4)
    before = programs.init_state()
    values = zip(*map(tree.named_leaves, (before.params, after.params)), strict=True)
    assert {name for (name, a), (_, b) in values if np.array_equal(a, b)} == programs.recipe.rules.frozen
    stats = [dict(tree.named_leaves(state.model_state["batch_stats"])) for state in (before, after)]
    kept = {name for name in stats[0] if np.array_equal(stats[0][name], stats[1][name])}
    assert kept == {f"backbone/{p}/{s}" for p in ("bn1", "block10/bn") for s in ("mean", "var")}
    moments = [name for name, _ in tree.named_leaves(after.opt_state) if "/mu/" in name]
    assert len(moments) == len(programs.recipe.parameters) - len(programs.recipe.rules.frozen)


class Deterministic(nn.Module):
    @nn.compact
    def __call__(self, x, deterministic):
        return nn.Dropout(0.5)(nn.Dense(4)(x), deterministic=deterministic)


class Training(nn.Module):
    @nn.compact
    def __call__(self, x, *, training=False):
        return nn.Dropout(0.5)(nn.Dense(4)(x), deterministic=not training)


class Partly(nn.Module):
    part: Any  # a function of train to a function of the input

    @nn.compact
    def __call__(self, x, train=False):
        return nn.Dense(2, name="head")(self.part(train)(x))


@pytest.mark.parametrize("part", [
    lambda train: lambda x: Deterministic(name="part")(x, not train),
    lambda train: lambda x: Training(name="part")(x, training=train),
    lambda train: lambda x: nn.BatchNorm(name="part")(x, use_running_average=not train),
    lambda train: lambda x: nn.MultiHeadDotProductAttention(
        2, dropout_rate=0.5, deterministic=not train, name="part")(x[:, None])[:, 0],
])  # fmt: skip
def test_frozen_modules_run_as_in_evaluation_whatever_they_call_the_mode(part):
    model, x = Partly(part), jnp.asarray(np.random.default_rng(0).normal(size=(8, 6)), jnp.float32)
    variables = model.init(jax.random.key(0), x)
    names = tuple(name for name, _ in tree.named_leaves(variables["params"]))
    frozen = Frozen(model, frozenset(name for name in names if name.startswith("part")), names)
    apply = apply_function(lambda model, x: model(x, train=True), frozen, ["batch_stats"])
    y, changed = apply(variables, x, rngs={"dropout": jax.random.key(1), "params": jax.random.key(2)})
    np.testing.assert_array_equal(y, model.apply(variables, x))
    jax.tree.map(np.testing.assert_array_equal, dict(changed.get("batch_stats", {})), variables.get("batch_stats", {}))


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
