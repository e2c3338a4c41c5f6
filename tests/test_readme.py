"""What the README says is so."""

import re
import subprocess
import sys
from pathlib import Path

import launch
from imgclf_jax.augment.mixing import MIXES
from imgclf_jax.augment.ops import DEVICE_OPS
from imgclf_jax.augment.tta import VIEWS
from imgclf_jax.data.decode import HOST_OPS
from imgclf_jax.data.sources import SOURCES
from imgclf_jax.losses import LOSSES
from imgclf_jax.metrics import METRICS
from imgclf_jax.models.backbones import BACKBONES
from imgclf_jax.optim.schedules import SCHEDULES

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SHORT = ["--config.total=2 steps", "--config.schedule=constant(1e-3)", "--config.eval_every="]


def test_the_readme_names_every_name():
    """Each registered name stands in the table of specs."""
    table = README[README.index("## Changing it") : README.index("Your own code")]
    for names in (DEVICE_OPS, HOST_OPS, SOURCES, LOSSES, BACKBONES, SCHEDULES, MIXES, VIEWS, METRICS):
        assert [name for name in names if not re.search(rf"`{name}\b|[|:] {name}\b", table)] == []


def test_the_readme_tree_names_every_module():
    tree = README[README.index("## Architecture") :]
    modules = [p.name for p in (ROOT / "imgclf_jax").rglob("*.py") if p.name != "__init__.py"]
    assert [name for name in modules if name not in tree] == []


def test_a_backbone_of_ones_own(tmp_path, monkeypatch):
    """The README's backbone, from a file in the working directory, trains and is evaluated."""
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    (tmp_path / "my_nets.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    workdir = [f"--workdir={tmp_path / 'run'}"]
    assert launch.main(["train", *workdir, "--config.model=my_nets:Tiny(width=64)", *SHORT]) == 0
    assert launch.main(["evaluate", *workdir, "--format=json"]) == 0


def test_device_placement_needs_neither_tensorflow_nor_clu(tmp_path):
    """A whole run, with evaluation and checkpoints, where these packages are not installed."""
    arguments = ["train", f"--workdir={tmp_path / 'run'}", "--config.data.placement=device", *SHORT]
    code = (
        "import sys\n"
        "for name in ('tensorflow', 'tensorflow_datasets', 'clu', 'tensorboard'): sys.modules[name] = None\n"
        f"import launch; sys.exit(launch.main({arguments}))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "test: examples 360" in done.stdout
