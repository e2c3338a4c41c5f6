"""Claims of the README and the pages; `test_docs.py` runs their commands."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_launch import user_environment

from imgclf_jax import config as configs
from imgclf_jax.augment.mixing import MIXES
from imgclf_jax.augment.ops import DEVICE_OPS
from imgclf_jax.augment.tta import VIEWS
from imgclf_jax.data.decode import HOST_OPS
from imgclf_jax.data.sources import SOURCES
from imgclf_jax.losses import LOSSES
from imgclf_jax.models.backbones import BACKBONES
from imgclf_jax.optim.schedules import SCHEDULES
from imgclf_jax.run.record import Record
from imgclf_jax.scores.classification import METRICS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = {page.stem: page for page in (ROOT / "docs").rglob("*.md") if "_build" not in page.parts}
DOCS = {name: page.read_text() for name, page in PAGES.items()}
SHORT = ["--config.total=2 steps", "--config.schedule=constant(1e-3)", "--config.eval_every="]


def test_the_readme_takes_a_screen_and_a_half():
    assert len(README.splitlines()) <= 82


def test_its_links_lead_somewhere():
    """From the README and the pages to files of this repository."""
    for folder, text in [(ROOT, README), *((PAGES[name].parent, text) for name, text in DOCS.items())]:
        for link in re.findall(r"\]\((?!https?:)([^)#]+)", text):
            assert (folder / link).is_file(), link


def test_the_table_of_specs_names_every_name():
    table = DOCS["using"][DOCS["using"].index("## Specs") : DOCS["using"].index("## Optimization")]
    for names in (DEVICE_OPS, HOST_OPS, SOURCES, LOSSES, BACKBONES, SCHEDULES, MIXES, VIEWS, METRICS):
        assert [name for name in names if not re.search(rf"`{name}\b|[|:] {name}\b", table)] == []


@pytest.mark.thorough
@pytest.mark.parametrize("how", ["data.placement=device", "preprocess=decode(1)|random_resized_crop(28)"])
def test_training_needs_neither_tensorflow_nor_clu_nor_a_cache(how, tmp_path):
    """A whole run, with evaluation and checkpoints, where these packages are not installed, has the same bits.

    With a random crop, tf.data reads ahead where it is installed. There is no place for the compilation cache either: a
    file is where its folder should be. Nothing warns.
    """
    (tmp_path / "file").write_text("")
    environment = user_environment(str(tmp_path / "file"))

    def digest(*missing):
        workdir = tmp_path / ("without" if missing else "with")
        arguments = ["train", f"--workdir={workdir}", f"--config.{how}",
                     "--config.model=mlp(widths=(16,))", *SHORT, "--config.total=40 steps"]  # fmt: skip
        code = (
            "import sys\n"
            f"for name in {missing}: sys.modules[name] = None\n"
            f"import launch; status = launch.main({arguments})\n"
            f"assert not any(sys.modules[name] for name in {missing}); sys.exit(status)"
        )
        command = [sys.executable, "-W", "error", "-c", code]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "test: examples 360" in done.stdout
        assert ("TensorFlow is not installed" in done.stderr) == bool(missing)
        return json.loads((workdir / "result.json").read_text())["params_sha256"]

    assert digest("tensorflow", "tensorflow_datasets", "clu", "tensorboard", "sklearn") == digest()


# Keys that a config's header sets beside the file.
OF_THE_COMMAND = {
    "faces": {"data.source"},
    "cifar10_airbench": {"data.source"},
    "transfer": {"init_from", "data.source", "num_seeds"},
    "transfer_frozen": {"init_from", "data.source", "num_seeds", "rules.freeze", "schedule"},
    "transfer_scratch": {"data.source", "num_seeds"},
}
RESULTS = README + DOCS["results"]  # the README repeats a few of the table's rows
LINKED = dict.fromkeys(re.findall(r"\[([\d.]+)([^\]]*)\]\((?:docs/)?results/(\w+)(-0)?\.zip\)", RESULTS))


NEW = ("digits", "fashion_mnist_fast")  # the other bundles have config keys that are gone, until they are made anew


@pytest.mark.parametrize(("mean", "of", "name", "several"), [
    pytest.param(*one, marks=[] if one[2] in NEW else pytest.mark.xfail(reason="made by earlier code", strict=True))
    for one in LINKED
], ids=[name for *_, name, _ in LINKED])  # fmt: skip
def test_a_result_with_bundles_is_that_of_the_bundles(mean, of, name, several):
    """The mean test accuracy in the table's row, over as many seeds or draws as it says, and the header's numbers."""
    folder = ROOT / "docs" / "results"
    files = sorted(folder.glob(f"{name}-?.zip")) if several else [folder / f"{name}.zip"]  # one: all seeds at once
    records = [Record.load(str(file)) for file in files]
    accuracies = [record.result["test"]["accuracy"] for record in records]
    assert f"{sum(accuracies) / len(accuracies):.{len(mean) - 2}f}" == mean
    config = ROOT / "configs" / f"{re.sub('_(frozen|scratch)$', '', name)}.py"
    shipped = configs.load_file(str(config))
    free = OF_THE_COMMAND.get(name, set()) | ({"seed"} if "seeds" in of else set())
    assert all(configs.difference(record.config, shipped, without=tuple(free)) == [] for record in records)
    header = config.read_text().split('"""')[1]
    if not several:
        deviation = records[0].result["test"]["accuracy_std"]
        assert records[0].config.num_seeds == 3
        assert f"{accuracies[0]:.3f} ± {deviation:.3f}" in header
        return
    assert len(records) == {", two seeds": 2, ", three seeds": 3, ", five seeds": 5, ", five draws": 5}[of]
    if "draws" in of:
        sources = [record.config.data.source for record in records]
        assert sources == [f"{shipped.data.source[:-1]}{f', draw={i}' if i else ''})" for i in range(len(records))]
    else:
        assert [record.config.seed for record in records] == list(range(len(records)))
    for metric in ("accuracy", *filter(None, shipped.metrics.split("|"))):
        values = [record.result["test"][metric] for record in records]
        assert [f"{value:.4f}" for value in (*values, sum(values) / len(values)) if f"{value:.4f}" not in header] == []


def test_every_bundle_of_the_results_is_linked():
    files = {file.stem for file in (ROOT / "docs" / "results").glob("*.zip")}
    assert {re.sub(r"-\d$", "-0", file) for file in files} == {name + several for *_, name, several in LINKED}
