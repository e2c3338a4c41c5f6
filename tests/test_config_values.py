"""Config values: durations, periods, ranges, JSON, and the command `config`."""

import ast
import json
import math
import re
import subprocess
import sys
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_config import FILES, ROOT

import launch
from imgclf_jax import config as configs
from imgclf_jax.cli.table import COMMANDS
from imgclf_jax.config import KEYS, default_config
from imgclf_jax.core.errors import UserError


@pytest.mark.parametrize(("changes", "message"), [
    ({"seed": -1}, "seed=-1: must be 0 or more, and below 4294967296"),
    ({"seed": 2**32}, "seed=4294967296"),
    ({"batch_size": 0}, "batch_size=0: must be 1 or more"),
    ({"clip": math.nan}, "clip=nan: must be 0 or more"),
    ({"ema": 1.0}, "ema=1.0: must be 0 or more, and below 1"),
    ({"precision": "float16"}, "unknown precision 'float16': did you mean 'bfloat16' or 'float32'? allowed"),
    ({"matmul_precision": "float16"}, "unknown matmul_precision 'float16'"),
    ({"model": " "}, "model is empty; write a value, such as 'cnn'"),
    ({"total": ""}, "total is empty; write a value, such as '20 epochs'"),
    ({"total": "0 steps"}, "total='0 steps' is not a duration"),
    ({"total": "10%"}, "total='10%' is not a duration"),
    ({"total": "five epochs"}, "write '5 epochs', '2000 steps', '1M examples'"),
    ({"eval_every": "0%"}, "eval_every='0%' is not a duration"),
    ({"log_every": "50"}, "log_every='50' is not a duration"),
    ({"checkpoint.best": "val/accuracy"},
     "checkpoint.best='val/accuracy': unknown evaluation set 'val': allowed: test"),
    ({"data.eval": {"train": "test"}},
     "data.eval names a set 'train': use letters, digits, _ and -, and none of the names attack, epochs"),
    ({"data.eval": {"a/b": "test"}}, "data.eval names a set 'a/b'"),
    ({"data.eval": {"": "test"}}, "data.eval names a set ''"),
])  # fmt: skip
def test_values_that_no_run_could_use(changes, message):
    config = default_config()
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError) as e:
        configs.validate(config)
    assert message in str(e.value)


AMOUNTS = st.tuples(st.integers(0, 10**6), st.integers(0, 3), st.integers(-1, 4), st.sampled_from(["", "k", "M"]))
UNITS = st.sampled_from(["epoch", "epochs", "step", "steps", "example", "examples", "%"])


@settings(max_examples=300)
@given(AMOUNTS, UNITS, st.sampled_from(["", " ", "  "]), *[st.integers(1, 10**5)] * 3)
def test_a_duration_is_exactly_the_fraction_it_says(amount, unit, space, examples, batch_size, total):
    digits, decimals, exponent, suffix = amount
    number = f"{digits // 10**decimals}.{digits % 10**decimals:0{decimals}}" if decimals else str(digits)
    number += f"e{exponent}" if exponent >= 0 else ""
    text = f"{space}{number}{suffix}{space}{unit}{space}"
    exact = Fraction(digits, 10**decimals) * 10 ** max(exponent, 0) * {"": 1, "k": 1000, "M": 10**6}[suffix]
    exact *= {
        "e": Fraction(examples if unit.startswith("epoch") else 1, batch_size),
        "s": 1,
        "%": Fraction(total, 100),
    }[unit[0]]
    if exact == 0:
        with pytest.raises(UserError, match="is not a duration"):
            configs.period(text, "log_every", examples, batch_size, total)
        return
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


@given(st.fractions(min_value=Fraction(1, 50), max_value=60, max_denominator=1000))
def test_events_fall_on_the_first_whole_step_of_each_period(every):
    """k periods end at ceil(k * period): 100 epochs of 10⅓ batches are 1,034 steps, not 100 times 11."""
    due = [step for step in range(1, 201) if configs.is_due(step, every)]
    k_max = math.floor(200 / every)
    assert due == sorted({math.ceil(k * every) for k in range(1, k_max + 1)})
    assert not any(configs.is_due(step, None) for step in range(100))


def changed():
    config = default_config()
    config.seed, config.clip, config.deterministic = 2**32 - 1, 0.1, False
    config.data.source = "arrays('ä \"quoted\"|\\n.npz', (1, 2))"
    config.data.eval = {"val": "train[90%:]", "other": "folder('x')/test", "test": "test"}
    config.checkpoint.best = "val/loss"
    return config


def test_json_round_trip():
    config = changed()
    again = configs.from_json(configs.to_json(config), "config.json")
    assert configs.flatten(again) == configs.flatten(config)
    assert list(again.data.eval) == list(config.data.eval)  # in their order
    assert {k: type(v) for k, v in configs.flatten(again).items()} == {k: type(KEYS[k][0]) for k in KEYS}
    assert json.loads(configs.to_json(config))["data"]["eval"]["val"] == "train[90%:]"
    with pytest.raises((AttributeError, KeyError)):
        again.sede = 1


@pytest.mark.parametrize(("text", "message"), [
    ("", "is damaged"), ("{", "is damaged"), ("[]", "config.json"), ("[1]", "is damaged"), ("3", "is damaged"),
    ("{}", "missing config keys"), ('{"sede": 1}', "unknown config key 'sede'"),
    (configs.to_json(default_config()).replace('"seed": 0', '"seed": "0"'), "seed='0' must have the type int"),
    (configs.to_json(default_config()).replace('"train": "train"', '"train": ["a"]'), "must have the type str"),
])  # fmt: skip
def test_damaged_json_is_told_with_its_path(text, message):
    with pytest.raises(UserError) as e:
        configs.from_json(text, "runs/a/config.json")
    assert message in str(e.value)
    assert "runs/a/config.json" in str(e.value)


def test_difference_names_each_changed_key_but_those_of_location():
    assert configs.difference(changed(), changed()) == []
    lines = configs.difference(default_config(), changed())
    assert [line.split(":")[0] for line in lines] == [
        "seed", "deterministic", "data.source", "data.eval", "clip", "checkpoint.best"]  # fmt: skip
    assert "clip: 0.0 → 0.1" in lines
    moved = default_config()
    moved.data.data_dir, moved.data.manual_dir, moved.data.placement, moved.data.threads = "/b", "/m", "device", 3
    assert configs.difference(default_config(), moved) == []


def test_help_and_config_import_neither_jax_nor_tensorflow():
    for argv in (["--help"], ["config"], ["train", "-h"], ["config", "--config.seed=5"]):
        code = f"import sys, launch; status = launch.main({argv}); heavy = {{'jax', 'flax', 'tensorflow', 'clu'}}"
        code += "; assert not heavy & set(sys.modules), heavy & set(sys.modules); sys.exit(status)"
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        usage = {"--help": "usage: launch.py [COMMAND]", "-h": "usage: launch.py train [flags]"}
        assert done.stdout.startswith(usage.get(argv[-1], "seed = "))
        assert argv != ["--help"] or all(f"\n    {command} " in done.stdout for command in COMMANDS)


def test_training_starts_without_packages_that_it_may_need_later():
    """Their imports take from a tenth of a second to three, before the first line of the log."""
    code = "import sys, imgclf_jax.train.command; late = {'tensorflow', 'tensorflow_datasets', 'scipy', 'sklearn'}"
    code += "; assert not late & set(sys.modules), late & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_command_config_prints_every_key_with_its_documentation(capsys):
    for file in FILES:
        assert launch.main(["config", f"--config={file}", "--config.seed=7", "--config.data.eval.more=train[:9]"]) == 0
        text = capsys.readouterr().out
        expected = configs.flatten(configs.load_file(str(file))) | {"seed": 7}
        expected["data.eval"] = expected["data.eval"] | {"more": "train[:9]"}
        printed = re.findall(r"(\S+) = (.*)\n    (.*)\n", text)
        assert {key: (ast.literal_eval(value), documentation) for key, value, documentation in printed} == {
            key: (expected[key], documentation) for key, (_, documentation) in KEYS.items()
        }
        assert len(text.splitlines()) == 2 * len(KEYS)
