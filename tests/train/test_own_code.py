"""Impure code of a user is refused before the first step, pure code is recorded, and what has no effect is said."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import thorough
from flax import linen as nn

from imgclf_jax import losses
from imgclf_jax.core import kinds
from imgclf_jax.core.errors import UserError
from imgclf_jax.run.workdir import Workdir
from imgclf_jax.train import command as train
from imgclf_jax.train import setup

pytestmark = pytest.mark.usefixtures("one_device")

calls = [0]


def drawing(logits, labels):
    return losses.softmax(logits, labels) * np.random.rand()  # noqa: NPY002


def drawing_an_array(logits, labels):
    return losses.softmax(logits + np.random.rand(logits.shape[-1]).astype("f"), labels)  # noqa: NPY002


@jax.jit
def jitted(logits, labels):
    return drawing_an_array(logits, labels)


def counting(images):
    calls[0] += 1
    return images ** calls[0]


class Counting(nn.Module):
    """Draws a constant where it is built."""

    scale: float = 1.0

    def __post_init__(self):
        calls[0] += 1
        self.scale = float(calls[0])
        super().__post_init__()

    @nn.compact
    def __call__(self, x, train=False):
        return nn.Dense(4)(x.reshape(len(x), -1)) * self.scale


class DrawingParameters(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        init = nn.initializers.constant(np.random.rand())  # noqa: NPY002
        return nn.Dense(4, kernel_init=init)(x.reshape(len(x), -1))


def calling(labels, probabilities):
    return counting(2.0)


@jax.custom_jvp
def called_back(logits):
    return jax.pure_callback(lambda x: np.asarray(x) * np.float32(counting(2.0)), logits, logits)


called_back.defjvp(lambda primals, tangents: (called_back(*primals), tangents[0]))


def calling_back(logits, labels):
    return losses.softmax(jax.lax.cond(labels.sum() > 0, called_back, jnp.sin, logits), labels)


def through_python(images):
    return jax.experimental.io_callback(np.asarray, images, images)


def pure(logits, labels, scale=1.0):
    jax.debug.print("{}", logits.sum())  # returns nothing to the step
    return losses.softmax(logits, labels) * scale + jnp.asarray(np.arange(3.0)).sum()


@pytest.mark.parametrize(("key", "name"), [
    ("loss", "drawing"), ("augment", "counting"), ("model", "DrawingParameters"),
    *thorough(("loss", "drawing_an_array"), ("loss", "jitted"), ("model", "Counting"), ("metrics", "calling")),
])  # fmt: skip
def test_impure_code_is_refused(fake_config, tmp_path, key, name):
    """A draw or a count while tracing is a constant: a resumed run would have another one, without a word."""
    fake_config[key] = f"{__name__}:{name}"
    with pytest.raises(UserError, match=rf"^{key}='{__name__}:{name}' gives .* (when it is traced again|second call)"):
        train.main(fake_config, Workdir(tmp_path / "run"))


@pytest.mark.parametrize(("key", "name", "primitive"), [
    ("loss", "calling_back", "pure_callback"), *thorough(("augment", "through_python", "io_callback")),
])  # fmt: skip
def test_python_inside_a_step_is_refused(fake_config, tmp_path, key, name, primitive):
    """A file that it reads, or a counter, changes the numbers of a resumed run, and no trace of the step shows it."""
    fake_config[key] = f"{__name__}:{name}"
    with pytest.raises(UserError, match=rf"^{key}='{__name__}:{name}' calls Python by {primitive} while the step runs"):
        train.main(fake_config, Workdir(tmp_path / "run"))


def test_pure_code_is_recorded(fake_config, tmp_path):
    """By the digest of its program, which what it reads from a file changes too. Without own code there is none."""

    def traced(loss, at):
        fake_config.loss = loss
        return setup.set_up(fake_config, Workdir(tmp_path / at)).snapshot.get("traced")

    first = traced(f"{__name__}:pure", "a")
    assert first == traced(f"{__name__}:pure", "b")
    assert first != traced(f"{__name__}:pure(scale=2.0)", "c")
    assert traced("softmax", "d") is None


def brighter(image):
    return image + np.uint8(calls[0])  # which may as well come from a file


def test_what_an_own_host_op_returns_is_recorded(fake_config, tmp_path):
    """And that of the package is not: another Pillow may round differently, and the run still resumes."""

    def read(at, name, value):
        fake_config.preprocess, calls[0] = f"decode(1){name}", value
        return setup.set_up(fake_config, Workdir(tmp_path / at)).snapshot["read"]

    own = f"|{__name__}:brighter"
    assert read("a", own, 1) == read("b", own, 1) != read("c", own, 2)
    assert read("d", "", 1) == {}


class WithoutPrecision(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        return nn.BatchNorm(use_running_average=not train)(nn.Dense(4)(x.reshape(len(x), -1)))


def own_rate(learning_rate):
    return optax.adam(1e-3)


def given_rate(learning_rate):
    return optax.adam(learning_rate)


@kinds.random
def to_one(key, images):
    return images.astype(jnp.float32) / 255 + 0.01 * jax.random.normal(key, images.shape)


def centred(images):
    return images.astype(jnp.float32) - 128


def undefined(labels, probabilities):
    return float("nan")


def defined(labels, probabilities):
    return 0.5


SAID = {
    "precision": ("mlp", "WithoutPrecision", "precision='bfloat16' does not reach model="),
    "batch_norm": ("", "", "batch_norm='groups(8)' does not reach linen's BatchNorm"),
    "optimizer": ("given_rate", "own_rate", "ignores its learning_rate"),
    "augment": ("centred", "to_one", "normalize divides by 255 again"),
    "metrics": ("defined", "undefined", "is nan at step 6, which is never the best"),
}


@pytest.mark.parametrize("wrong", [1, *thorough(0)])
def test_a_setting_without_effect_is_said_once(wrong, fake_config, tmp_path, caplog):
    own = {key: f"{__name__}:{names[wrong]}" for key, names in SAID.items()}
    model = own["precision"] if wrong else "mlp(widths=(4,))"
    fake_config.update(precision="bfloat16", batch_norm="groups(8)", model=model, optimizer=own["optimizer"],
                       metrics=own["metrics"], augment=f"{own['augment']}|normalize")  # fmt: skip
    fake_config.checkpoint.best = f"max:test/{SAID['metrics'][wrong]}"
    assert train.main(fake_config, Workdir(tmp_path / "run")) == 0
    for *_, sentence in SAID.values():
        assert caplog.text.count(sentence) == wrong
