"""Claims of the README and the pages; `test_docs.py` runs their commands."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_launch import user_environment
from test_structure import FILES, PACKAGES, TIERS

from imgclf_jax import config as configs
from imgclf_jax.augment.mixing import MIXES
from imgclf_jax.augment.ops import DEVICE_OPS
from imgclf_jax.augment.tta import VIEWS
from imgclf_jax.data.decode import HOST_OPS
from imgclf_jax.data.sources import SOURCES
from imgclf_jax.losses import LOSSES
from imgclf_jax.metrics import METRICS
from imgclf_jax.models.backbones import BACKBONES
from imgclf_jax.optim.schedules import SCHEDULES
from imgclf_jax.run.record import Record

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = {page.stem: page for page in (ROOT / "docs").rglob("*.md") if "_build" not in page.parts}
DOCS = {name: page.read_text() for name, page in PAGES.items()}
SHORT = ["--config.total=2 steps", "--config.schedule=constant(1e-3)", "--config.eval_every="]


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 120


def test_its_links_lead_somewhere():
    """From the README and the pages to files of this repository."""
    for folder, text in [(ROOT, README), *((PAGES[name].parent, text) for name, text in DOCS.items())]:
        for link in re.findall(r"\]\((?!https?:)([^)#]+)", text):
            assert (folder / link).is_file(), link


def test_the_table_of_specs_names_every_name():
    table = DOCS["using"][DOCS["using"].index("## Specs") : DOCS["using"].index("## Optimization")]
    for names in (DEVICE_OPS, HOST_OPS, SOURCES, LOSSES, BACKBONES, SCHEDULES, MIXES, VIEWS, METRICS):
        assert [name for name in names if not re.search(rf"`{name}\b|[|:] {name}\b", table)] == []


def test_the_tree_names_every_module():
    tree = DOCS["architecture"][DOCS["architecture"].index("## The tree") : DOCS["architecture"].index("## Imports")]
    modules = [p.name for p in (ROOT / "imgclf_jax").rglob("*.py") if p.name != "__init__.py"]
    assert [name for name in modules if name not in tree] == []


def test_the_order_of_imports_is_that_of_the_code():
    block = re.search(r"## Imports.*?```\n(.*?)```", DOCS["architecture"], re.DOTALL)
    assert block
    assert block[1].splitlines() == TIERS[::-1]


def test_the_api_names_every_public_module():
    """All but forms for one platform, and modules that only other modules use."""
    inner = ("models.cpu.", "augment.big_vision", "augment.geometry", "augment.photometric", "augment.tpu_",
             "models.frozen", "data.decoded", "data.prepare", "data.tf_image", "core.once", "core.tensorflow_import",
             "core.internals", "__main__")  # fmt: skip
    for name in FILES:
        if name not in PACKAGES and name != "launch":
            assert (f"   imgclf_jax.{name}\n" in DOCS["api"]) != name.startswith(inner), name


@pytest.mark.thorough
@pytest.mark.parametrize("placement", ["host", "device"])
def test_training_needs_neither_tensorflow_nor_clu_nor_a_cache(placement, tmp_path):
    """A whole run, with evaluation and checkpoints, where these packages are not installed, has the same bits.

    There is no place for the compilation cache either: a file is where its folder should be. Nothing warns.
    """
    (tmp_path / "file").write_text("")
    environment = user_environment(str(tmp_path / "file"))

    def digest(*missing):
        workdir = tmp_path / ("without" if missing else "with")
        arguments = ["train", f"--workdir={workdir}", f"--config.data.placement={placement}",
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
        assert ("TensorBoard is not installed" in done.stderr) == bool(missing)
        return json.loads((workdir / "result.json").read_text())["params_sha256"]

    assert digest("tensorflow", "tensorflow_datasets", "clu", "tensorboard") == digest()


def test_the_results_with_bundles_are_those_of_the_bundles():
    """The mean test accuracy in a row that links to docs/results, over as many seeds or draws as it says."""
    number = {"three": 3, "five": 5}
    rows = re.findall(r"\[([\d.]+), (\w+) (seeds|draws)\]\(docs/results/(\w+)-0\.zip\)", README)
    assert {name for *_, name in rows} == {"digits", "fashion_mnist", "fashion_mnist_fast", "faces"}
    for mean, count, what, name in rows:
        records = [Record.load(str(file)) for file in sorted((ROOT / "docs" / "results").glob(f"{name}-?.zip"))]
        assert len(records) == number[count]
        accuracies = [record.result["test"]["accuracy"] for record in records]
        assert f"{sum(accuracies) / len(accuracies):.{len(mean) - 2}f}" == mean
        shipped = configs.load_file(str(ROOT / "configs" / f"{name}.py"))
        if what == "seeds":
            assert [record.config.seed for record in records] == list(range(len(records)))
            differs = "seed"
        else:  # of the training images
            sources = [record.config.data.source for record in records]
            assert sources == [f"{shipped.data.source[:-1]}{f', draw={i}' if i else ''})" for i in range(len(records))]
            differs = "data.source"
        assert all(configs.difference(record.config, shipped, without=(differs,)) == [] for record in records)


def test_the_readme_and_the_first_page_begin_with_a_picture():
    for text in (README, DOCS["index"]):
        assert "report-head.png" in "\n".join(text.splitlines()[:12])


def test_the_gallery_has_what_commands_draw():
    """Each picture of a command's page, in a small file."""
    drawn = {name for page in PAGES.values() if page.parent.name == "commands"
             for name in re.findall(r"_static/([\w-]+\.png)", page.read_text())}  # fmt: skip
    assert drawn - {"report.png"} <= set(re.findall(r"_static/([\w-]+\.png)", DOCS["gallery"]))
    sizes = {file.name: file.stat().st_size for file in (ROOT / "docs" / "_static").glob("*.png")}
    assert [name for name, size in sizes.items() if size > 700_000] == []


def test_a_search_finds_pages_before_the_history():
    """Sphinx ranks headings first, and leaves out pages that say so."""
    assert "\n## Confusion matrix\n" in DOCS["evaluate"]
    assert DOCS["changes"].startswith("---\nnosearch: true\n---\n")
