"""LoRA: the paper's update of kernels, a frozen base, and merged weights for other programs."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import traverse_util
from safetensors.numpy import load_file
from stepped import FLAGS

import launch
from imgclf_jax import config
from imgclf_jax.core.errors import UserError
from imgclf_jax.methods import lora
from imgclf_jax.methods.lora import Adapted
from imgclf_jax.models.classifier import Classifier
from imgclf_jax.run.workdir import Workdir
from imgclf_jax.train import setup as train_setup
from imgclf_jax.trained import load, load_converted


class Net(nn.Module):
    """One convolution and one dense layer."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(5, (2, 3), padding="VALID", name="conv")(x)
        return nn.Dense(4, name="dense")(x.reshape(len(x), -1))


def flat(variables):
    return traverse_util.flatten_dict(variables, sep="/")


def spoiled(variables):
    """With nonzero B."""
    rng = np.random.default_rng(0)
    other = {n: rng.normal(size=x.shape).astype(x.dtype) if n.endswith("/b") else x for n, x in flat(variables).items()}
    return traverse_util.unflatten_dict(other, sep="/")


@pytest.mark.usefixtures("float64")
def test_an_adapted_layer_is_equation_3():
    """The plain layer with W0 + alpha / r A B; a convolution's kernel is adapted as a matrix over its patches."""
    module = Adapted(Net(), rank=2, alpha=3.0, pattern="backbone/.*kernel")
    images = np.random.default_rng(1).normal(size=(3, 4, 5, 2))
    variables = spoiled(
        jax.tree.map(lambda x: np.asarray(x, np.float64), jax.jit(module.init)(jax.random.key(0), jnp.float32(images)))
    )
    p = flat(variables["params"])
    merged = {name: x + 3.0 / 2 * (p[f"lora/{name}/a"] @ p[f"lora/{name}/b"]).reshape(x.shape)
              for name, x in p.items() if name in ("conv/kernel", "dense/kernel")}  # fmt: skip
    wanted = Net().apply({"params": traverse_util.unflatten_dict(p | merged, sep="/")}, images)
    np.testing.assert_allclose(jax.jit(module.apply)(variables, images), wanted, rtol=1e-6)


@pytest.mark.thorough
def test_adapters_begin_as_in_loralib_and_leave_the_model_as_it_was():
    plain, x = Classifier(Net(), 3), jnp.ones((1, 20, 20, 2))
    model = Classifier(Adapted(Net(), rank=8, alpha=8.0, pattern="backbone/dense/kernel"), 3)
    variables, before = model.init(jax.random.key(0), x), plain.init(jax.random.key(0), x)
    a, b = (variables["params"]["backbone"]["lora"]["dense"]["kernel"][name] for name in "ab")
    bound = 1 / np.sqrt(len(a))
    assert 0.99 * bound < np.abs(a).max() <= bound
    assert np.std(a) == pytest.approx(bound / np.sqrt(3), rel=0.02)
    assert not b.any()
    assert {n: x for n, x in flat(variables).items() if "/lora/" not in n}.keys() == flat(before).keys()
    np.testing.assert_array_equal(model.apply(variables, x), plain.apply(before, x))
    np.testing.assert_allclose(model.apply(spoiled(variables), x), plain.apply(lora.merge(spoiled(variables), 1.0), x),
                               rtol=1e-6)  # fmt: skip


def run(workdir, *flags):
    assert launch.main([f"--workdir={workdir}", *FLAGS, *flags]) == 0
    return json.loads((workdir / "result.json").read_text())


def digits_config(model, init_from):
    c = config.load_file("configs/digits.py")
    c.update(model=model, augment="normalize", preprocess="decode(1)", init_from=str(init_from))
    return c


@pytest.fixture(scope="module", params=["mlp(widths=(8,))", "resnet_cifar(8)"])
def runs(tmp_path_factory, request):
    """(a plain run, a LoRA run on its weights)."""
    folder, model = tmp_path_factory.mktemp("runs"), f"--config.model={request.param}"
    run(folder / "base", model)
    run(folder / "lora", model, f"--config.init_from={folder / 'base'}", "--config.method=lora(rank=2, alpha=6.0)")
    return folder / "base", folder / "lora"


@pytest.mark.thorough
def test_only_adapters_and_the_head_are_trained_and_have_optimizer_state(runs):
    base, adapted = (load(workdir) for workdir in runs)
    before = flat({"params": base.state.params, **base.state.model_state})
    for name, x in flat({"params": adapted.state.params, **adapted.state.model_state}).items():
        if "/lora/" in name:
            assert x.any(), name
        elif "/head/" in name:
            assert (x != before[name]).any(), name
        else:
            np.testing.assert_array_equal(x, before[name], name)
    c = config.from_json((runs[1] / "config.json").read_text(), "config.json")
    shape = train_setup.set_up(c, Workdir(runs[1])).state
    trained = [x for n, x in flat(shape.params).items() if "lora/" in n or n.startswith("head/")]
    moments = sum(x.size for x in jax.tree.leaves(shape.opt_state) if x.ndim)
    assert moments == 2 * sum(x.size for x in trained)  # Adam's


@pytest.mark.thorough
def test_others_get_merged_weights(runs, tmp_path, printed):
    """By a file with PyTorch's names, and by `init_from` of the run."""
    images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 1), np.uint8)
    wanted = load(runs[1]).logits(images)
    assert np.abs(wanted - load(runs[0]).logits(images)).max() > 1e-3
    file = tmp_path / "merged.safetensors"
    assert "are merged" in printed("export", str(file), f"--workdir={runs[1]}")
    printed("export", str(tmp_path / "plain.safetensors"), f"--workdir={runs[0]}")
    assert load_file(file).keys() == load_file(tmp_path / "plain.safetensors").keys()
    for source in (file, runs[1]):
        c = digits_config(load(runs[1]).config.model, source)
        np.testing.assert_allclose(load_converted(c).logits(images), wanted, rtol=1e-5, atol=1e-5)


def adapters_of_ones_own(problem):
    return lora.lora(problem, rank=1)


@pytest.mark.thorough
def test_adapters_that_are_not_merged_are_not_dropped(tmp_path):
    """Only `lora` itself is merged by `init_from`, which runs no code that the other run names."""
    run(tmp_path, "--config.model=mlp(widths=(4,))", f"--config.method={__name__}:adapters_of_ones_own")
    c = digits_config("mlp(widths=(4,))", tmp_path)
    with pytest.raises(UserError, match=r"holds LoRA adapters, .*export"):
        load_converted(c)
    c.init_strict = False
    assert not any("/lora/" in name for name in flat(load_converted(c).state.params))


def test_which_adapters_init_from_merges():
    assert lora.scale_of("lora(16, alpha=4)") == 0.25
    assert lora.scale_of("my_methods:lora(16)") == 0
