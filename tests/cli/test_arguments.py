"""A command line is parsed into a command, its flags, overrides of config keys, and files."""

import pytest

from imgclf_jax import config as configs
from imgclf_jax.cli.arguments import parse
from imgclf_jax.cli.command_line import override
from imgclf_jax.core.errors import UsageError


def test_flags_keys_and_files_may_be_mixed():
    argv = ["predict", "a.png", "--config.seed", "-3", "--workdir", "r", "-", "--config.total=5 epochs", "b.png",
            "--config.deterministic", "False", "--top_k=2", "c.png", "--", "-x"]  # fmt: skip
    line = parse(argv, "launch.py", [])
    assert (line.command, line.workdir, line.options["top_k"]) == ("predict", "r", 2)
    assert line.files == ["a.png", "-", "b.png", "c.png", "-x"]
    assert line.overrides == [("seed", "-3"), ("total", "5 epochs"), ("deterministic", "False")]


@pytest.mark.parametrize("argv", [[], ["--workdir=r"], ["train"]])
def test_training_is_the_default(argv):
    line = parse(argv, "launch.py", [])
    assert (line.command, line.names_config, line.options["heartbeat"]) == ("train", False, 100)
    assert line.config_file.endswith("configs/digits.py")


def test_values_have_the_types_of_their_keys():
    config = configs.default_config()
    override(config, {"seed": "3", "clip": "1", "deterministic": "f", "rules.lr": "a=1", "data.eval": "{}",
                      "data.eval.new-set": "train", "data.extra.crops": "test"}.items())  # fmt: skip
    flat = configs.flatten(config)
    assert [flat[key] for key in ("seed", "clip", "deterministic", "rules.lr")] == [3, 1.0, False, "a=1"]
    assert (flat["data.eval"], flat["data.extra"]) == ({"new-set": "train"}, {"crops": "test"})
    configs.validate(config)


@pytest.mark.parametrize(("key", "text"), [
    ("seed", "1.5"), ("clip", "x"), ("deterministic", "no"), ("data.eval", "['a']"), ("data.eval", "{'a': 1}"),
    ("data.eval", "{"), ("rules", "a"), ("data.train.x", "a"),
])  # fmt: skip
def test_values_of_other_types_and_unknown_keys(key, text):
    with pytest.raises(UsageError, match=key):
        override(configs.default_config(), [(key, text)])
