"""Rules by parameter: which one applies, what a layer is, and their effect on a run."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import thorough
from flax import linen as nn
from tolerance import rounding

from imgclf_jax.core import sharding, tree
from imgclf_jax.core.errors import UserError
from imgclf_jax.data import sources, stream
from imgclf_jax.models.frozen import Frozen, apply_function
from imgclf_jax.optim import optimizers, rules
from imgclf_jax.programs import Programs
from imgclf_jax.recipe import Recipe
from imgclf_jax.run import provenance

NAMES = ["backbone/block0/kernel", "backbone/block0/bias", "backbone/block12/kernel", "head/kernel", "head/bias"]


def built(lr="", decay="", freeze="", layer_decay=0.0, names=NAMES):
    return rules.build(lr, decay, freeze, layer_decay, names)


# --- which rule counts ---


def test_the_first_rule_that_matches_a_whole_path_counts():
    lr, decay = "head/bias=3, head/.*=1e1, .*(bias|scale) = 0.5", r"backbone/block\d{1,2}/kernel=0"
    out = built(lr, decay, "head/bias,.*0/b.*")
    assert out.lr == {"head/bias": 3.0, "head/kernel": 10.0, "backbone/block0/bias": 0.5}
    assert out.decay == {"backbone/block0/kernel": 0.0, "backbone/block12/kernel": 0.0}
    assert out.frozen == {"head/bias", "backbone/block0/bias"}
    assert not rules.Rules()
    assert out


@pytest.mark.parametrize(("keys", "message"), [
    ({"lr": "backbone=0.1"}, r"rules\.lr: 'backbone' matches no parameter by its whole path; they are backbone/block0"),
    ({"lr": "head/.*=1, head/bias=2"}, r"'head/bias' has no effect: earlier rules match all its parameters"),
    ({"lr": "head/.*"}, r"rules\.lr: 'head/\.\*' is not PATTERN=NUMBER"),
    ({"decay": "head/.*=-1"}, r"rules\.decay: 'head/\.\*=-1' is not PATTERN=NUMBER with a number of 0 or more"),
    ({"freeze": "head/(bias"}, r"rules\.freeze: 'head/\(bias' is not a regular expression: "),
    ({"freeze": ".*"}, "matches every parameter: nothing is left to train"),
])  # fmt: skip
def test_wrong_rules_are_told(keys, message):
    with pytest.raises(UserError, match=message):
        built(**keys)


# --- layers ---


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


def programs(config, **keys):
    """The Programs of Blocks on fake images, with these config keys."""
    config.model = f"{__name__}:Blocks"
    for key, value in keys.items():
        config.update_from_flattened_dict({key.replace("__", "."): value})
    data = provenance.DataInfo(64, (12, 12, 1), tuple("abcd"), "")
    return Programs(Recipe(config, data))


def trained(exp, steps=3):
    """(the state before, the state after some steps), on the host."""
    images = stream.Images(sources.open_splits(exp.recipe.config.data.source)["train"], "decode(1)")
    batch = next(iter(stream.train_batches(images, 0, exp.recipe.config.batch_size, 0, 1)))
    run = exp.init(0)
    before = jax.device_get(run["state"])
    state, sums = (sharding.put_replicated(run[name], exp.mesh) for name in ("state", "sums"))
    for _ in range(steps):
        state, sums = exp.train(state, sums, sharding.put_batch(batch, exp.mesh))
    return before, jax.device_get(state)


def test_the_order_of_use_is_that_of_the_model(fake_config):
    exp = programs(fake_config, rules__layer_decay=0.5)
    first = list(dict.fromkeys("/".join(name.split("/")[:2]) for name in exp.recipe.parameters))
    assert first == ["backbone/stem", "backbone/bn1", "backbone/block10", "backbone/block9", "backbone/block2",
                     "backbone/a_norm", "head/kernel", "head/bias"]  # fmt: skip
    factors = {name.split("/")[1]: factor for name, factor in exp.recipe.rules.lr.items()}
    assert factors == {"stem": 0.0625, "bn1": 0.0625, "block10": 0.125, "block9": 0.25, "block2": 0.5, "a_norm": 1.0,
                       "kernel": 1.0, "bias": 1.0}  # fmt: skip
    assert {name: shape for name, shape in exp.recipe.parameters.items() if "stem" in name or "head" in name} == {
        "backbone/stem/kernel": (144, 8), "backbone/stem/bias": (8,), "head/kernel": (8, 4), "head/bias": (4,)
    }  # fmt: skip


@pytest.mark.thorough
@pytest.mark.parametrize("steps", [1, 4])
def test_frozen_parameters_keep_every_bit(fake_config, steps):
    """Their values, and the batch statistics of completely frozen modules; the rest moves."""
    frozen = "backbone/stem/.*, backbone/bn1/.*, backbone/block10/.*, backbone/block9/dense/.*"
    exp = programs(fake_config, optimizer="adamw(weight_decay=0.1)", clip=1.0, rules__freeze=frozen)
    before, after = trained(exp, steps)
    still = {name for (name, a), (_, b) in zip(*map(tree.named_leaves, (before.params, after.params)), strict=True)
             if np.array_equal(a, b)}  # fmt: skip
    assert still == exp.recipe.rules.frozen
    stats = [dict(tree.named_leaves(state.model_state["batch_stats"])) for state in (before, after)]
    kept = {name for name in stats[0] if np.array_equal(stats[0][name], stats[1][name])}
    assert kept == {f"backbone/{p}/{s}" for p in ("bn1", "block10/bn") for s in ("mean", "var")}
    moments = [name for name, _ in tree.named_leaves(after.opt_state) if "/mu/" in name]
    assert len(moments) == len(exp.recipe.parameters) - len(exp.recipe.rules.frozen)
    assert not [name for name in moments if "stem" in name]


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
    """Running statistics drifted and dropout stayed on, unless the argument was called `train`."""
    model, x = Partly(part), jnp.asarray(np.random.default_rng(0).normal(size=(8, 6)), jnp.float32)
    variables = model.init(jax.random.key(0), x)
    names = tuple(name for name, _ in tree.named_leaves(variables["params"]))
    frozen = Frozen(model, frozenset(name for name in names if name.startswith("part")), names)
    apply = apply_function(lambda model, x: model(x, train=True), frozen, ["batch_stats"])
    y, changed = apply(variables, x, rngs={"dropout": jax.random.key(1), "params": jax.random.key(2)})
    np.testing.assert_array_equal(y, model.apply(variables, x))
    jax.tree.map(np.testing.assert_array_equal, dict(changed.get("batch_stats", {})), variables.get("batch_stats", {}))


def test_decay_multiplies_the_weight_decay():
    """AdamW, and SGD with PyTorch's weight decay, in NumPy; parameters without a rule have the factor 1."""
    params = {"a": np.array([1.0, -2.0]), "b": np.array([0.5]), "c": np.array([[3.0]])}
    grads = [{"a": np.array([0.1, 0.3]), "b": np.array([-0.2]), "c": np.array([[1.0]])},
             {"a": np.array([-0.4, 0.3]), "b": np.array([0.1]), "c": np.array([[-1.0]])}]  # fmt: skip
    factors = {"a": 0.0, "b": 0.25, "c": 1.0}
    ruled = rules.Rules(decay={"a": 0.0, "b": 0.25})
    for text in ("adamw(weight_decay=0.1)", "add_decayed_weights(0.1)|sgd(momentum=0.9)"):
        optimizer = optimizers.build(text, optax.constant_schedule(0.01), 0.0, ruled)
        ours = jax.tree.map(jnp.float32, params)
        state, update = jax.jit(optimizer.init)(ours), jax.jit(optimizer.update)
        for g in grads:
            updates, state = update(jax.tree.map(jnp.float32, g), state, ours)
            ours = optax.apply_updates(ours, updates)
        for name, p in params.items():
            decay, m, v = 0.1 * factors[name], 0.0, 0.0
            for n, g in enumerate(g[name] for g in grads):
                if text.startswith("adamw"):
                    m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
                    step = m / (1 - 0.9 ** (n + 1)) / (np.sqrt(v / (1 - 0.999 ** (n + 1))) + 1e-8)
                    p = p - 0.01 * (step + decay * p)
                else:
                    m = 0.9 * m + g + decay * p
                    p = p - 0.01 * m
            # Adam divides by the root of 1 - b2**n, whose relative error is 1000 times the rounding of b2 = 0.999.
            atol = 3 * rounding(2 * 12) + 0.01 * rounding(3) * 500
            np.testing.assert_allclose(ours[name], p, rtol=0, atol=atol, err_msg=f"{text} {name}")


@pytest.mark.parametrize(("text", "message"), [
    ("sgd(momentum=0.9)", r"rules\.decay: optimizer='sgd\(momentum=0\.9\)' has no weight decay to multiply; use"),
    ("adamw(weight_decay=0)", "has no weight decay to multiply"),
])  # fmt: skip
def test_decay_rules_need_a_weight_decay(text, message):
    with pytest.raises(UserError, match=message):
        optimizers.build(text, optax.constant_schedule(0.1), 0.0, rules.Rules(decay={"a": 0.0}))
