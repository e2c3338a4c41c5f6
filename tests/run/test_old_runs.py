"""Work directories that an older version wrote: they can be evaluated, used for prediction, and resumed.

`fixtures/plain` and `fixtures/stacked` were written by version 0.1.0 at commit 3638aed, with 12 steps in all, and hold
the checkpoint of step 6: one seed with an average of its weights, and two seeds with Lookahead's slow weights. Their
`expected.json` holds what that version said of step 6, and what it logged in the steps after it. No op of these runs
draws at random, so the numbers follow from the checkpoint alone.
"""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from cases import thorough
from PIL import Image
from tolerance import rounding

import launch
from imgclf_jax import config as configs
from imgclf_jax.core.errors import UserError
from imgclf_jax.data import sources
from imgclf_jax.data.stream import Images
from imgclf_jax.run.workdir import Workdir
from imgclf_jax.run.writers import read_metrics
from imgclf_jax.tools.reproduce.reproduction import differences
from imgclf_jax.train import evaluation

pytestmark = pytest.mark.usefixtures("one_device")

FIXTURES = Path(__file__).parent / "fixtures"
# The longest path through cnn(widths=(4,), hidden=8) on 12 x 12 images, there and back.
DEPTH = 2 * (9 + 6 * 6 * 4 + 8 + 4 + 10)


@pytest.fixture(scope="module", params=["stacked", *thorough("plain")])
def old(request, tmp_path_factory):
    """(a copy of the work directory, its expected results)."""
    workdir = tmp_path_factory.mktemp("old") / request.param
    shutil.copytree(FIXTURES / request.param, workdir)
    return workdir, json.loads((workdir / "expected.json").read_text())


def test_evaluated(old, capsys):
    workdir, expected = old
    assert launch.main(["evaluate", f"--workdir={workdir}", "--format=json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["step"] == 6
    assert result["test"].pop("class_names") == list("0123")
    assert result["test"].pop("confusion") == expected["evaluated"].pop("confusion")
    scores = result["test"].pop("scores")
    accuracy = expected["evaluated"].get("ensemble_accuracy", expected["evaluated"]["accuracy"])
    assert scores["accuracy"]["value"] == pytest.approx(accuracy)
    new = {name: result["test"].pop(name) for name in list(result["test"]) if "nll" in name}
    assert new == pytest.approx(
        {name: result["test"][name.replace("nll", "loss")] for name in new}, rel=rounding(DEPTH)
    )
    assert result["test"] == pytest.approx(expected["evaluated"], rel=rounding(DEPTH))


def test_predicted(old, tmp_path, capsys):
    workdir, expected = old
    images = sources.open_splits("fake(64, (12, 12, 1), 4)")["test"].read(np.arange(3))["image"]
    for i, image in enumerate(images):
        Image.fromarray(image[..., 0]).save(tmp_path / f"{i}.png")
    assert launch.main(["predict", f"--workdir={workdir}", "--format=json", "--top_k=4", str(tmp_path)]) == 0
    found = [{p["class"]: p["probability"] for p in record["predictions"]}
             for record in json.loads(capsys.readouterr().out)]  # fmt: skip
    probabilities = [[one[c] for c in "0123"] for one in found]
    np.testing.assert_allclose(probabilities, expected["probabilities"], rtol=0, atol=1e-6 + rounding(DEPTH))


@pytest.mark.thorough
def test_resumed(old):
    """With the recorded config. The first record after the checkpoint includes the sums of steps before it."""
    workdir, expected = old
    flat = configs.flatten(configs.from_json((workdir / "config.json").read_text(), ""))
    flags = [f"--config.{key}={value}" for key, value in flat.items() if not isinstance(value, dict)]
    assert launch.main([f"--workdir={workdir}", *flags]) == 0
    records = [record for record in read_metrics(workdir / "metrics.jsonl") if record["step"] > 6]
    assert len(records) == len(expected["records"])
    for ours, theirs in zip(records, expected["records"], strict=True):
        assert {name: ours[name] for name in theirs} == pytest.approx(theirs, rel=rounding(6 * DEPTH))


def test_a_fingerprint_without_contents(tmp_path, caplog):
    """A run on a folder from when only names and sizes were recorded resumes with a warning."""
    for name in ("cat/1.bmp", "dog/2.bmp", "dog/3.bmp"):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / "images" / name)
    config = configs.default_config()
    config.data.source, config.preprocess = f"folder({str(tmp_path / 'images')!r})", "decode(3)"
    config.data.train = "train[:2]"

    def data():
        base = sources.open_data(config)
        return base, Images(sources.take_split(base, config.data.train), "decode(3)").describe()

    base, now = data()
    source = base["train"]
    whole = hashlib.sha256(json.dumps([source.files, source.sizes, source.class_names]).encode()).hexdigest()
    recorded = hashlib.sha256(repr([(whole, 0, 2)]).encode()).hexdigest()  # as version 0.1.0 did
    old = replace(now, fingerprint=recorded, listing_fingerprint="")
    older, newer = (Workdir(tmp_path / name) for name in ("older", "newer"))
    for place, info in ((older, old), (newer, now)):
        place.path.mkdir()
        place.record(config, info)
    assert caplog.messages == []
    older.record(config, now)
    [message] = caplog.messages
    assert message.startswith(f"an older version began the run in {older.path} and recorded only the names and sizes")
    programs = SimpleNamespace(recipe=SimpleNamespace(config=config, data=old))
    assert not evaluation.changed(programs, config, base)
    provenances = [json.loads(place.provenance.read_text()) for place in (older, newer)]
    assert not [one for one in differences(*provenances) if one.kind == "data"]

    Image.new("RGB", (4, 4), (9, 9, 9)).save(tmp_path / "images" / source.files[0])  # of the same size
    assert (tmp_path / "images" / source.files[0]).stat().st_size == source.sizes[0]
    newer.record(config, now)
    with pytest.raises(UserError, match=r"have changed \(another fingerprint\)"):
        newer.record(config, data()[1])
    (tmp_path / "images" / source.files[0]).rename(tmp_path / "images" / f"{source.files[0]}.bmp")
    with pytest.raises(UserError, match=r"have changed \(another fingerprint\)"):
        older.record(config, data()[1])
    assert evaluation.changed(programs, config, data()[0])
