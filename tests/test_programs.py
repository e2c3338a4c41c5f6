"""Programs are traced for the platform of the mesh and compiled once."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import thorough, trained_for
from flax import linen as nn
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from imgclf_jax import recipe, step
from imgclf_jax.core import platform, sharding
from imgclf_jax.core.errors import UserError
from imgclf_jax.data import stream
from imgclf_jax.losses import Task
from imgclf_jax.programs import Programs
from imgclf_jax.recipe import Recipe
from imgclf_jax.run.provenance import DataInfo

DATA = DataInfo(64, (12, 12, 1), tuple("abcd"), "made up")
ELSEWHERE = {"gpu": ("NVIDIA H100", "cuda"), "tpu": ("TPU v5 lite", "tpu")}


def described_mesh(kind, name):
    """A mesh of eight absent devices."""
    return AbstractMesh((8,), ("data",), (AxisType.Auto,), abstract_device=AbstractDevice(kind, 1, name))


@pytest.mark.parametrize("place", ["device", *thorough("host")])
@pytest.mark.parametrize("name", ["tpu", *thorough(*(name for name in ELSEWHERE if name != "tpu"))])
def test_programs_are_lowered_for_devices_that_are_not_here(name, place, fake_config):
    """In the form of their platform, decided by the mesh alone, not by the machine that traces."""
    fake_config.model, fake_config.data.placement = "cnn(widths=(8, 8), hidden=8)", place
    fake_config.batch_size, fake_config.accumulate = 32, 2
    kind, lowered_for = ELSEWHERE[name]
    mesh = described_mesh(kind, lowered_for)
    assert platform.platform_of(mesh) == name
    programs = Programs(Recipe(fake_config, DATA), mesh)
    for traced in (programs.traced_train, programs.traced_eval):
        text = traced.lower(lowering_platforms=(lowered_for,)).as_text()
        assert "stablehlo.convolution" in text
        assert "mhlo.num_partitions = 8" in text
    here = Programs(Recipe(fake_config, DATA), sharding.make_mesh())
    assert platform.platform_of(here.mesh) == jax.devices()[0].platform == "cpu"
    for traced in (here.traced_train, here.traced_eval):
        assert "stablehlo.convolution" not in traced.lower().as_text()
    assert platform.current() == ""


@pytest.mark.parametrize("lr", ["", "head/.*=2"])
def test_a_part_that_cannot_be_traced_is_named_with_its_key(lr, fake_config):
    fake_config.model, fake_config.rules.lr = "mlp(widths=('wide',))", lr
    with pytest.raises(UserError, match=r"^model=\"mlp\(widths=\('wide',\)\)\" fails on images \[12, 12, 1\]: "):
        _ = Programs(Recipe(fake_config, DATA)).traced_train


def table(steps, total, peak=0.1):
    values = jnp.linspace(peak, 0.0, total)
    return lambda step: values[step]


def noisy(learning_rate):
    return optax.chain(optax.add_noise(0.01, 0.55, jax.random.key(0)), optax.sgd(learning_rate))


@pytest.mark.parametrize(("key", "function"), [("schedule", "table"), ("optimizer", "noisy")])
@pytest.mark.parametrize("lr", ["", "head/.*=2"])  # rules read the names of the parameters before all else
def test_factories_run_outside_of_any_trace(key, function, lr, fake_config):
    fake_config.model, fake_config.rules.lr = "mlp(widths=(4,))", lr
    fake_config[key] = f"{__name__}:{function}"
    programs = Programs(Recipe(fake_config, DATA))
    programs.check_size()
    programs.traced_train.lower()
    programs.init_state()


class Computed(nn.Module):
    """Fails if its layer is computed and not traced."""

    features = 4

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(self.features)(x.reshape(len(x), -1))
        assert isinstance(x, jax.core.Tracer)
        return x


def test_rules_compute_no_part_of_the_model(fake_config):
    """They need the shapes of its parameters alone. To compute them took a minute for a network of fifty layers."""
    fake_config.model, fake_config.rules.lr = f"{__name__}:Computed", "head/.*=2"
    Programs(Recipe(fake_config, DATA)).check_size()


@pytest.mark.parametrize(
    ("asked", "attribute"), [("float32", "HIGHEST"), ("bfloat16", ""), *thorough(("tensorfloat32", "HIGH"))]
)
def test_matmul_precision_have_the_bits_that_the_config_says(asked, attribute, fake_config):
    """On accelerators, whose default is lower, in training, evaluation and prediction; CPU always has float32."""
    fake_config.matmul_precision = asked
    programs = Programs(Recipe(fake_config, DATA), described_mesh(*ELSEWHERE["tpu"]))
    state, images = programs.shape["state"], jax.ShapeDtypeStruct((8, *DATA.image_shape), "uint8")
    with jax.numpy_dtype_promotion("standard"):
        predict = programs.inference("predict").__wrapped__.trace(state.params, state.model_state, images)
        texts = [
            traced.lower(lowering_platforms=("tpu",)).as_text()
            for traced in (programs.traced_train, programs.traced_eval, predict)
        ]
    for text in texts:
        found = re.findall(r"stablehlo.dot_general.*?precision = \[(\w+), (\w+)\]", text)
        assert set(found) == ({(attribute, attribute)} if attribute else {("DEFAULT", "DEFAULT")} & set(found))
        assert "stablehlo.dot_general" in text
    here = Programs(Recipe(fake_config, DATA), sharding.make_mesh())
    assert "HIGH" not in here.traced_train.lower().as_text()


@pytest.mark.parametrize(("kind", "asked"), [("gpu", True), ("gpu", False), ("tpu", True)])
def test_gpus_are_asked_for_deterministic_kernels(kind, asked, fake_config):
    """By the program and not only by XLA_FLAGS, which an importing program may set too late."""
    fake_config.deterministic = asked
    programs = Programs(Recipe(fake_config, DATA), described_mesh(*ELSEWHERE[kind]))
    expected = {"xla_gpu_deterministic_ops": True} if asked and kind == "gpu" else None
    assert programs.compiler_options() == programs.compiler_options(onednn=True) == expected


@pytest.mark.thorough
def test_a_loop_of_your_own_is_the_runs(fake_config):
    """The array-level parts, under plain `jax.jit` with the run's batches, end with the parameters of its programs."""
    fake_config.augment, fake_config.optimizer = "flip_lr|normalize(0.5, 0.25)", "adamw(weight_decay=0.1)"
    _, split, images, state = trained_for(fake_config, 3)

    everything = split.read(np.arange(split.size))
    parts = recipe.for_arrays(fake_config, np.stack(everything["image"]), everything["label"])
    own = step.init_state(parts.model, parts.optimizer, parts.data.image_shape, fake_config.seed)
    augment = parts.augment(train=True)
    train_step = jax.jit(step.make_train_step(parts.model, parts.loss, parts.optimizer, parts.schedule, augment))
    for _, batch in stream.batches(images, stream.StreamSpec(fake_config.seed, fake_config.batch_size), range(3)):
        own, metrics = train_step(own, batch)
    assert int(own.step) == int(state.step) == 3
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), own.params, state.params)
    assert int(metrics["examples"]) == 16


def test_targets_in_memory_make_the_task_that_they_make_in_a_source(fake_config):
    images, targets = np.zeros((4, 8, 8, 1), np.uint8), np.full((4, 2), 0.5, np.float32)
    for fake_config.loss, task in (("sigmoid", Task.MULTILABEL), ("softmax", Task.SOFT)):
        assert recipe.for_arrays(fake_config, images, targets).task is task
    assert recipe.for_arrays(fake_config, images, np.arange(4)).task is Task.CLASSES


@pytest.mark.parametrize(("images", "labels", "says"), [
    (np.zeros((4, 8, 8), np.uint8), np.zeros(4, np.int32), "images are uint8[4, 8, 8]; pass uint8[n, h, w, c]"),
    (np.zeros((4, 8, 8, 1), np.uint8), np.zeros(3, np.int32), "labels are int32[3] for 4 examples"),
    (np.zeros((4, 8, 8, 1), np.uint8), np.array([0, 1, 2, -1]), "labels are from -1 to 2 for 3 class_names"),
    (np.zeros((0, 8, 8, 1), np.uint8), np.zeros(0, np.int32), "Source(size=0): must be 1 or more"),
])  # fmt: skip
def test_arrays_that_are_no_data(images, labels, says, fake_config):
    with pytest.raises(UserError) as error:
        recipe.for_arrays(fake_config, images, labels)
    assert says in str(error.value)
