"""The configuration: its keys, values, JSON and command, every config file, and the ImageNet recipes."""

import ast
import functools
import json
import math
import re
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import thorough
from flax import traverse_util
from hypothesis import given, settings
from hypothesis import strategies as st
from test_structure import OPTIONAL

from imgclf_jax import config as configs
from imgclf_jax.config import KEYS, default_config
from imgclf_jax.core.errors import UserError
from imgclf_jax.models import vit
from imgclf_jax.recipe import Recipe
from imgclf_jax.run.provenance import DataInfo
from imgclf_jax.run.workdir import Workdir
from imgclf_jax.run.writers import read_metrics
from imgclf_jax.train import command as train
from imgclf_jax.weights import initial

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "configs").glob("*.py"))
LARGE = [f for f in FILES if f.stem.startswith("imagenet")]
FEW = [ROOT / "configs" / "digits.py"]


def test_every_key_is_documented_typed_and_there():
    assert configs.flatten(default_config()) == {key: default for key, (default, _) in KEYS.items()}
    for key, (default, text) in KEYS.items():
        assert type(default) in (int, float, bool, str, dict), key
        assert re.fullmatch(r"(\S+ ){3,}.*\.", text), key
        assert re.fullmatch(r"[a-z_]+(\.[a-z_]+)?", key)
    assert set(configs.LOCATION_KEYS) < set(KEYS)
    assert set(configs.FREE_KEYS) < set(KEYS) - set(configs.LOCATION_KEYS)
    configs.check_keys(default_config(), "here")
    configs.validate(default_config())


@pytest.mark.parametrize(("text", "message"), [
    ("def get_config(: pass", "SyntaxError"),
    ("import no_such_module_7", ", line 2: ModuleNotFoundError: No module named 'no_such_module_7'"),
    ("x = [\n    y]", "line 3: NameError: name 'y' is not defined"),
    ("def f(): return {}['a']\ndef get_config(): return f()", "line 2: KeyError: 'a'"),
    ("", "get_config() is missing, or returns None; write one that changes default_config() and returns it"),
    ("def get_config(): c = default_config(); c.sede = 1; return c", "unknown config key 'sede': did you mean 'seed'"),
    ("def get_config(): c = default_config(); c.seed = 'x'; return c",
     "line 2: TypeError: Could not override field 'seed'"),
    ("def get_config(): c = default_config(); c.seed = True; return c", "seed=True must have the type int"),
    ("def get_config(): c = default_config(); c.data.eval = {'a': 3}; return c", "data.eval.a=3 is not a split"),
    ("def get_config(): c = default_config(); c.data = {'train': 'a'}; return c", "missing config keys"),
])  # fmt: skip
def test_a_mistake_in_a_config_file_is_told_with_its_path(tmp_path, text, message):
    file = tmp_path / "mine.py"
    file.write_text(f"from imgclf_jax.config import default_config\n{text}\n")
    with pytest.raises(UserError) as e:
        configs.load_file(str(file))
    assert str(file) in str(e.value)
    assert message in str(e.value)


def test_load_file_passes_the_argument(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("from imgclf_jax.config import default_config\ndef get_config(source='digits'):\n"
                    "    c = default_config()\n    c.data.source = source\n    return c\n")  # fmt: skip
    assert configs.load_file(str(file)).data.source == "digits"
    assert configs.load_file(f"{file}:folder('a:b')").data.source == "folder('a:b')"


SHAPES = {"digits": (8, 8, 1), "fashion_mnist": (28, 28, 1), "mnist": (28, 28, 1), "folder": (80, 100, 3),
          "faces": (112, 92, 1)}  # fmt: skip


@pytest.mark.parametrize("file", [
    *FEW, *thorough(*(f for f in FILES if f not in FEW and f not in LARGE)),
    *(pytest.param(f, marks=pytest.mark.slow) for f in LARGE),
], ids=lambda file: file.stem)  # fmt: skip
@pytest.mark.usefixtures("one_device")
def test_every_config_file_trains(file, tmp_path):
    """Two steps on fake data of the same shape, with evaluation."""
    config = configs.load_file(str(file))
    initial.fill(config)
    configs.validate(config)
    channels = int(re.match(r"decode\((\d)\)", config.preprocess)[1])
    shape, classes = SHAPES.get(file.stem, (32, 32, channels)), 2 if file.stem == "medical" else 10
    config.data.source = f"fake(64, {shape}, {classes})"  # a hundredth of them is one
    for name, split in config.data.eval.items():  # of which there are train and test
        config.data.eval[name] = {"val": "test", "validation": "test"}.get(split, split)
    config.model = config.model.replace("depth=20", "depth=8")  # more of the same, which takes long to compile
    config.model = {"airbench": "airbench(widths=(64,))"}.get(config.model, config.model)  # whole in another file
    config.schedule = re.sub(r"warmup='\d+k? \w+'", "warmup='1 steps'", config.schedule)
    config.batch_size, config.total, config.log_every = 8, "2 steps", "1 steps"
    config.batch_norm = config.batch_norm.replace("32", "4")
    assert train.main(config, Workdir(tmp_path)) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["step"] == 2
    assert all(result[name]["examples"] > 0 for name in config.data.eval)
    losses = [r["train/loss"] for r in read_metrics(tmp_path / "metrics.jsonl") if "train/loss" in r]
    assert len(losses) == 2
    assert np.all(np.isfinite(losses))


AMOUNTS = st.tuples(st.integers(1, 10**6), st.integers(0, 3), st.integers(-1, 4), st.sampled_from(["", "k", "M"]))
UNITS = st.sampled_from(["epoch", "epochs", "step", "steps", "example", "examples", "%"])


@settings(max_examples=300)
@given(AMOUNTS, UNITS, st.sampled_from(["", " ", "  "]), *[st.integers(1, 10**5)] * 3)
def test_a_duration_is_exactly_the_fraction_it_says(amount, unit, space, examples, batch_size, total):
    digits, decimals, exponent, suffix = amount
    number = f"{digits // 10**decimals}.{digits % 10**decimals:0{decimals}}" if decimals else str(digits)
    number += f"e{exponent}" if exponent >= 0 else ""
    text = f"{space}{number}{suffix}{space}{unit}{space}"
    exact = Fraction(digits, 10**decimals) * 10 ** max(exponent, 0) * {"": 1, "k": 1000, "M": 10**6}[suffix]
    epoch = Fraction(examples if unit.startswith("epoch") else 1, batch_size)
    exact *= {"e": epoch, "s": 1, "%": Fraction(total, 100)}[unit[0]]
    assert configs.period(text, "log_every", examples, batch_size, total) == exact
    assert configs.steps(text, "log_every", examples, batch_size, total) == math.ceil(exact)


@given(st.text(st.sampled_from("0123456789.ekM %-+epochsteps\n"), max_size=14))
def test_any_other_text_is_a_user_error_that_names_the_key(text):
    duration = re.fullmatch(r"\s*(\d+(\.\d+)?(e\d+)?)\s*[kM]?\s*(epochs?|steps?|examples?|%)\s*", text)
    if not text.strip():
        assert configs.period(text, "eval_every", 100, 10, 50) is None
        assert configs.steps(text, "eval_every", 100, 10, 50) == 0
    elif duration and Fraction(duration[1]):
        assert configs.period(text, "eval_every", 100, 10, 50) > 0
    else:
        with pytest.raises(UserError, match=re.escape(f"eval_every={text!r}")):
            configs.period(text, "eval_every", 100, 10, 50)


def test_json_round_trip_and_the_difference_of_two_configs():
    config = default_config()
    config.seed, config.clip, config.deterministic = 2**32 - 1, 0.1, False
    config.data.source = "arrays('ä \"quoted\"|\\n.npz', (1, 2))"
    config.data.eval = {"val": "train[90%:]", "other": "folder('x')/test", "test": "test"}
    again = configs.from_json(configs.to_json(config), "config.json")
    assert configs.flatten(again) == configs.flatten(config)
    assert list(again.data.eval) == list(config.data.eval)  # in their order
    with pytest.raises((AttributeError, KeyError)):
        again.sede = 1
    config.data.data_dir, config.data.placement = "/moved", "device"  # keys of location
    assert configs.difference(config, again) == []
    lines = configs.difference(default_config(), config)
    assert [line.split(":")[0] for line in lines] == ["seed", "deterministic", "data.source", "data.eval", "clip"]
    assert lines[-1] == "clip: 0.0 → 0.1"


@pytest.mark.parametrize(("text", "message"), [
    ("{", "is damaged"), ("[1]", "is damaged"), ("3", "is damaged"),
    ("{}", "missing config keys seed, total, "), ('{"sede": 1}', "unknown config key 'sede'"),
    (configs.to_json(default_config()).replace('"train":', '"trian":'), "key 'data.trian': did you mean 'data.train'"),
    (configs.to_json(default_config()).replace('"seed": 0', '"seed": "0"'), "seed='0' must have the type int"),
    (configs.to_json(default_config()).replace('"train": "train"', '"train": ["a"]'), "must have the type str"),
])  # fmt: skip
def test_damaged_json_is_told_with_its_path(text, message):
    with pytest.raises(UserError) as e:
        configs.from_json(text, "runs/a/config.json")
    assert message in str(e.value)
    assert "runs/a/config.json" in str(e.value)


@pytest.mark.parametrize(("code", "late"), [
    *((f"import launch; assert launch.main({argv}) == 0", {"jax", "flax", "optax", "orbax", *OPTIONAL})
      for argv in (["--help"], ["config"], ["train", "-h"], ["config", "--config.seed=5"])),
    ("import imgclf_jax.train.command", {"scipy", *OPTIONAL}),
])  # fmt: skip
def test_what_takes_long_to_import_waits_until_it_is_needed(code, late):
    code += f"; import sys; assert not {late} & set(sys.modules), {late} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_the_command_config_prints_every_key_with_its_documentation(printed):
    for file in FILES:
        text = printed("config", f"--config={file}", "--config.seed=7", "--config.data.eval.more=train[:9]")
        config = configs.load_file(str(file))
        initial.fill(config)
        expected = configs.flatten(config) | {"seed": 7}
        expected["data.eval"] = expected["data.eval"] | {"more": "train[:9]"}
        rows = re.findall(r"(\S+) = (.*)\n    (.*)\n", text)
        found = {key: (ast.literal_eval(value), documentation) for key, value, documentation in rows}
        assert found == {key: (expected[key], documentation) for key, (_, documentation) in KEYS.items()}
        assert len(text.splitlines()) == 2 * len(KEYS)


# ImageNet's recipes are not trained here.
EXAMPLES = {"imagenet_resnet50": 1_281_167, "imagenet_vit_s16": 1_268_355}  # train, and TFDS's train[:99%]


def recipe(name):
    config = configs.load_file(str(ROOT / "configs" / f"{name}.py"))
    classes = tuple(map(str, range(1000)))
    return Recipe(config, DataInfo(EXAMPLES[name], (224, 224, 3), classes, "made up"))


def test_the_schedule_of_resnet50():
    """A tenth of the learning rate at 30, 60 and 80 epochs; no warmup, for batches of 256."""
    run, epoch = recipe("imagenet_resnet50"), EXAMPLES["imagenet_resnet50"] / 256
    assert sum(map(math.prod, run.parameters.values())) == 25_557_032  # as torchvision states
    assert run.total == math.ceil(90 * epoch)
    epochs = np.array([0, 1, 29.9, 30.1, 59.9, 60.1, 79.9, 80.1, 90])
    expected = [0.1, 0.1, 0.1, 0.01, 0.01, 1e-3, 1e-3, 1e-4, 1e-4]
    rates = [float(run.schedule(math.ceil(e * epoch))) for e in epochs]
    np.testing.assert_allclose(rates, expected, rtol=1e-5)


def test_the_schedule_of_vit_s16():
    """10,000 steps of warmup, then half a cosine to zero at the end of 90 epochs."""
    run = recipe("imagenet_vit_s16")
    assert sum(map(math.prod, run.parameters.values())) == 22_122_472  # as big_vision's own model has
    assert run.total == round(90 * EXAMPLES["imagenet_vit_s16"] / 1024) == 111_477
    half = (10_000 + run.total) // 2
    rates = [float(run.schedule(step)) for step in (0, 4_999, 9_999, half, run.total)]
    np.testing.assert_allclose(rates, [1e-7, 5e-4, 1e-3, 5e-4, 0], rtol=1e-3, atol=1e-9)


def test_which_parameters_decay():
    """In the ViT the kernels only; in the ResNet all but those of batch norm."""
    for name, decaying_bias in (("imagenet_resnet50", {"head/bias"}), ("imagenet_vit_s16", set())):
        run = recipe(name)
        assert set(run.rules.decay.values()) == {0.0}
        decaying = {parameter for parameter in run.parameters if parameter not in run.rules.decay}
        assert {parameter for parameter in decaying if not parameter.endswith("kernel")} == decaying_bias
        assert len(decaying) - len(decaying_bias) == sum(parameter.endswith("kernel") for parameter in run.parameters)


@pytest.mark.thorough
def test_the_optimizer_of_vit_s16_is_big_visions(monkeypatch):
    """Its chain in big_vision's optax.py: clip, Adam, the learning rate, and a decay of 1e-4 that it does not scale."""
    monkeypatch.setitem(vit._VIT, "S", (24, 2, 3))
    run, rng = recipe("imagenet_vit_s16"), np.random.default_rng(0)
    flat = {path: jnp.asarray(rng.normal(size=shape), jnp.float32) for path, shape in run.parameters.items()}
    mine = theirs = traverse_util.unflatten_dict(flat, sep="/")
    kernels = traverse_util.unflatten_dict({path: path.endswith("kernel") for path in flat}, sep="/")
    chain = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(mu_dtype="bfloat16"),
        optax.scale(1e-3),
        optax.add_decayed_weights(1e-4, kernels),
        optax.scale_by_schedule(lambda step: run.schedule(step) / 1e-3),
        optax.scale(-1.0),
    )
    with jax.numpy_dtype_promotion("standard"):
        state, other = jax.jit(run.optimizer.init)(mine), jax.jit(chain.init)(theirs)
        for _ in range(3):
            gradient = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), mine)
            updates, state = jax.jit(run.optimizer.update)(gradient, state, mine)
            expected, other = jax.jit(chain.update)(gradient, other, theirs)
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-12), updates, expected)
            mine, theirs = (jax.tree.map(np.add, *pair) for pair in ((mine, updates), (theirs, expected)))


@pytest.mark.thorough
def test_how_the_layers_of_vit_s16_begin(monkeypatch):
    """The standard deviation of each kernel as in big_vision, where linen initializes query, key and value apart."""
    monkeypatch.setitem(vit._VIT, "S", (384, 2, 6))
    model = recipe("imagenet_vit_s16").model
    init = jax.jit(lambda key: model.init(key, jnp.zeros((1, 32, 32, 3)), train=False)["params"])
    params = init(jax.random.key(0))
    qkv = np.split(params["backbone"]["block1"]["attn"]["qkv"]["kernel"], 3, 1)
    for own in qkv:
        np.testing.assert_allclose(own.std(), 384**-0.5, rtol=0.01)  # Xavier: 2 / (384 + 384)
        assert np.abs(own).max() < 1.00001 * (6 / (384 + 384)) ** 0.5
    deviations = {
        ("block0", "attn", "proj"): 384**-0.5,
        ("block0", "mlp", "fc1"): (2 / (384 + 1536)) ** 0.5,
        ("block1", "mlp", "fc2"): (2 / (384 + 1536)) ** 0.5,
        ("patch",): (16 * 16 * 3) ** -0.5,
        ("representation",): 384**-0.5,
    }
    for path, deviation in deviations.items():
        layer = functools.reduce(lambda tree, name: tree[name], path, params["backbone"])
        np.testing.assert_allclose(layer["kernel"].std(), deviation, rtol=0.01)
        np.testing.assert_array_equal(layer["bias"], 0)
