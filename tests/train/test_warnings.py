"""Settings that have no effect, or a wrong one, are each said once."""

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen as nn

from imgclf_jax.core import kinds
from imgclf_jax.run.workdir import Workdir
from imgclf_jax.train import command as train


class WithoutPrecision(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        return nn.relu(nn.Dense(4)(x.reshape(len(x), -1)))


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
    "optimizer": ("given_rate", "own_rate", "ignores its learning_rate"),
    "augment": ("centred", "to_one", "normalize divides by 255 again"),
    "metrics": ("defined", "undefined", "is nan at step 6, which is never the best"),
}


@pytest.mark.parametrize("wrong", [0, 1])
def test_a_setting_without_effect_is_said_once(wrong, fake_config, tmp_path, caplog):
    own = {key: f"{__name__}:{names[wrong]}" for key, names in SAID.items()}
    model = own["precision"] if wrong else "mlp(widths=(4,))"
    fake_config.update(precision="bfloat16", model=model, optimizer=own["optimizer"], metrics=own["metrics"],
                       augment=f"{own['augment']}|normalize")  # fmt: skip
    fake_config.checkpoint.best = f"max:test/{SAID['metrics'][wrong]}"
    assert train.main(fake_config, Workdir(tmp_path / "run")) == 0
    for *_, sentence in SAID.values():
        assert caplog.text.count(sentence) == wrong
