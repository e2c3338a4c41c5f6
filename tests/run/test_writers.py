"""The files of a run: metrics.jsonl, TensorBoard, the progress bar, result.json and provenance.json."""

import importlib.metadata
import importlib.util
import io
import json
import platform
import re
import sys
import unittest.mock
from pathlib import Path

import jax
import numpy as np
import pytest
from cases import short_config
from PIL import Image

from imgclf_jax.config import default_config, flatten
from imgclf_jax.core.errors import UserError
from imgclf_jax.run import writers
from imgclf_jax.run.workdir import Workdir
from imgclf_jax.train import command as train

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, one_device) -> Path:
    """The work directory of a finished run."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    config = short_config()
    config.writers = f"{__name__}:Kept('run')"
    assert train.main(config, Workdir(workdir)) == 0
    return workdir


def open_writer(folder: Path, step: int = 0, **keys) -> writers.MetricsWriter:
    config = default_config()
    config.update(keys)
    return writers.MetricsWriter(folder, step, flatten(config), config.tensorboard, config.writers)


def test_resuming_drops_what_comes_after(tmp_path, caplog):
    file = tmp_path / "metrics.jsonl"
    kept = ['{"step": 5, "a": 0.1}', '{"step": 10, "a": 0.2}', '{"step": 10, "b": 3}']
    file.write_text("\n".join([*kept, '{"step": 15, "a": 0.3}', '{"step": 20, "a"']))
    writer = open_writer(tmp_path, 10)
    writer.write_scalars(15, {"a": 1e-300})
    assert file.read_text().splitlines() == [*kept, '{"step": 15, "a": 1e-300}']  # also if the process is killed now
    writer.close()
    assert caplog.text.count("skipped a truncated line") == 1


def read_events(directory: Path):
    """What TensorBoard's own reader finds."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    return events


def read_scalars(directory: Path):
    """{(step, tag): value} of what TensorBoard's own reader finds."""
    events = read_events(directory)
    return {(e.step, tag): e.value for tag in events.Tags()["scalars"] for e in events.Scalars(tag)}


def test_tensorboard_holds_the_same(finished):
    """TensorBoard's own reader finds each value of metrics.jsonl at its step."""
    records = writers.read_metrics(finished / "metrics.jsonl")
    expected = {(r["step"], tag): value for r in records for tag, value in r.items() if tag != "step"}
    assert {"train/loss", "train/images_per_second", "test/accuracy"} <= {tag for _, tag in expected}
    assert read_scalars(finished / "tb") == pytest.approx(expected, rel=1e-6)


def test_tensorboard_drops_the_steps_that_a_resumed_run_repeats(tmp_path):
    for start, steps in ((0, (5, 10, 15)), (10, (12, 15))):
        writer = open_writer(tmp_path, start)
        for step in steps:
            writer.write_scalars(step, {"train/loss": start + step})
        writer.close()
    wanted = [(5, 5), (10, 10), (12, 22), (15, 25)]
    assert read_scalars(tmp_path / "tb") == {(step, "train/loss"): x for step, x in wanted}


def test_tensorboard_shows_images_and_hyperparameters(tmp_path):
    """As its plugins read them: PNGs after their width and height, and the config's keys."""
    from tensorboard.plugins.hparams import plugin_data_pb2

    (tmp_path / "run").mkdir()
    writer = open_writer(tmp_path / "run", batch_size=77)
    images = np.random.default_rng(0).integers(256, size=(2, 4, 5, 3), dtype=np.uint8)
    writer.write_images(3, {"a": images, "b": images[0, ..., :1] / np.float32(255)})
    writer.close()
    events = read_events(tmp_path / "run" / "tb")
    assert set(events.Tags()["tensors"]) == {"a", "b", "_hparams_/session_start_info"}
    assert set(events.PluginTagToContent("images")) == {"a", "b"}
    [event] = events.Tensors("a")
    width, height, *pictures = event.tensor_proto.string_val
    assert (event.step, width, height) == (3, b"5", b"4")
    assert all(np.array_equal(np.asarray(Image.open(io.BytesIO(png))), own)
               for png, own in zip(pictures, images, strict=True))  # fmt: skip
    gray = Image.open(io.BytesIO(events.Tensors("b")[0].tensor_proto.string_val[2]))
    assert np.array_equal(np.asarray(gray), images[0, ..., 0])
    [content] = events.PluginTagToContent("hparams").values()
    found = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    assert (found["batch_size"].number_value, found["model"].string_value) == (77, "cnn")


class Kept:
    """A writer for tests, which records its calls, and which takes images too."""

    def __init__(self, name="kept", *, workdir=None, step=-1, fails=""):
        self.fails = fails
        KEPT[name] = self.calls = [("made", workdir, step)]

    def __getattr__(self, method):
        if method not in ("write_hparams", "write_scalars", "write_images", "flush", "close"):
            raise AttributeError(method)

        def call(*arguments):
            self.calls.append((method, *arguments))
            if method == self.fails:
                raise ConnectionError("no route to the tracking service")

        return call


KEPT: dict[str, list] = {}


def test_writers_that_the_config_names(tmp_path, caplog):
    """They receive what metrics.jsonl receives; one that fails is dropped, and the run continues."""
    good, bad = f"{__name__}:Kept", f"{__name__}:Kept('bad', fails='write_scalars')"
    writer = open_writer(tmp_path, 3, writers=f"{good}|{bad}")
    writer.write_scalars(4, {"train/loss": 0.5})
    writer.flush()
    writer.close()
    (made, (hparams, config), *calls), failed = KEPT["kept"], KEPT["bad"]
    assert (made, hparams) == (("made", tmp_path, 3), "write_hparams")
    assert (config["writers"], config["data.eval"]) == (f"{good}|{bad}", '{"test": "test"}')
    assert calls == [("write_scalars", 4, {"train/loss": 0.5}), ("flush",), ("close",)]
    assert [call[0] for call in failed] == ["made", "write_hparams", "write_scalars"]
    assert "failed and gets no more metrics: ConnectionError: no route to the tracking service" in caplog.text


def test_a_writer_that_cannot_be_made(tmp_path):
    with pytest.raises(UserError, match="unknown writer 'wandb': write the import path of yours"):
        open_writer(tmp_path, tensorboard=False, writers="wandb")


def test_the_docs_writer_for_a_tracking_service(tmp_path, monkeypatch):
    page = (ROOT / "docs" / "extending.md").read_text()
    [text] = re.findall(r"```python\n(# my_wandb.py\n.*?)```", page, re.DOTALL)
    (tmp_path / "my_wandb.py").write_text(text)
    wandb = unittest.mock.MagicMock()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.syspath_prepend(tmp_path)
    writer = open_writer(tmp_path, writers="my_wandb:Wandb('imgclf')", tensorboard=False)
    writer.write_scalars(5, {"train/loss": 0.5})
    writer.close()
    assert wandb.init.call_args.kwargs["project"] == "imgclf"
    assert [call[0] for call in wandb.init.return_value.method_calls] == ["config.update", "log", "finish"]
    assert wandb.init.return_value.log.call_args == unittest.mock.call({"train/loss": 0.5}, step=5)


def test_result(finished):
    """The keys that a reader may rely on, and their meaning."""
    result = json.loads((finished / "result.json").read_text())
    assert list(result) == ["step", "epochs", "seconds", "images_per_second", "params_sha256", "time", "test"]
    assert (result["step"], result["epochs"]) == (12, 3.0)
    assert list(result["test"]) == ["examples", "accuracy", "loss", "nll"]  # four classes: no top5
    assert result["test"]["examples"] == 64
    records = writers.read_metrics(finished / "metrics.jsonl")
    assert {f"test/{k}": v for k, v in result["test"].items()}.items() <= records[-1].items()
    calls = KEPT["run"]
    assert [{"step": call[1], **call[2]} for call in calls if call[0] == "write_scalars"] == records
    assert (calls[0], calls[-1]) == (("made", finished, 0), ("close",))


def test_provenance(finished):
    """Versions, devices, commit and data: enough to reproduce the run, and to use it without the data."""
    record = json.loads((finished / "provenance.json").read_text())
    assert {"jaxlib", "flax", "optax", "orbax-checkpoint", "numpy"} <= set(record["packages"])
    assert (record["step"], record["python"], record["resumed"]) == (0, platform.python_version(), [])
    assert record["devices"] == [f"{d.platform}: {d.device_kind}" for d in jax.devices()]
    assert (record["processes"], record["command"]) == (1, sys.argv)
    for name in ("jax", "ml-collections", "pytest"):  # whose folders are called ml_collections-…, and so on
        assert record["packages"][name] == importlib.metadata.version(name)
    data = Workdir(finished).load_data_info()
    assert (data.train_examples, data.image_shape, data.class_names) == (64, (12, 12, 1), ("0", "1", "2", "3"))
