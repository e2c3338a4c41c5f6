"""The configuration: every key documented and typed, and every config file runs."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from cases import thorough

from imgclf_jax import config as configs
from imgclf_jax.config import KEYS, default_config
from imgclf_jax.core.errors import UserError
from imgclf_jax.run.workdir import Workdir
from imgclf_jax.run.writers import read_metrics
from imgclf_jax.train import command as train

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
    configs.validate(config)
    channels = int(re.match(r"decode\((\d)\)", config.preprocess)[1])
    shape, classes = SHAPES.get(file.stem, (32, 32, channels)), 2 if file.stem == "medical" else 10
    config.data.source = f"fake(16, {shape}, {classes})"
    for name, split in config.data.eval.items():  # of which there are train and test
        config.data.eval[name] = {"val": "test", "validation": "test"}.get(split, split)
    config.model = config.model.replace("depth=20", "depth=8")  # more of the same, which takes long to compile
    config.model = {"airbench": "airbench(widths=(64,))"}.get(config.model, config.model)  # whole in another file
    config.schedule = re.sub(r"warmup='\d+k? \w+'", "warmup='1 steps'", config.schedule)
    config.batch_size, config.total, config.log_every = 8, "2 steps", "1 steps"
    assert train.main(config, Workdir(tmp_path)) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["step"] == 2
    assert all(result[name]["examples"] > 0 for name in config.data.eval)
    losses = [r["train/loss"] for r in read_metrics(tmp_path / "metrics.jsonl") if "train/loss" in r]
    assert len(losses) == 2
    assert np.all(np.isfinite(losses))
