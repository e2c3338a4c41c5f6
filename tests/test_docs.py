"""Claims of the README and of `docs/`; every Python block, command of launch.py and notebook of theirs runs.

Commands run in a folder with a few images, with small data and few steps. Of other commands the files are there.
"""

import contextlib
import importlib.util
import io
import itertools
import json
import re
import shlex
import statistics
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_launch import user_environment

import launch
from imgclf_jax import config as configs
from imgclf_jax.augment.mixing import MIXES
from imgclf_jax.augment.ops import DEVICE_OPS
from imgclf_jax.augment.tta import VIEWS
from imgclf_jax.core import spec
from imgclf_jax.data.decode import HOST_OPS
from imgclf_jax.data.sources import SOURCES
from imgclf_jax.losses import LOSSES
from imgclf_jax.models.backbones import BACKBONES
from imgclf_jax.optim.schedules import SCHEDULES
from imgclf_jax.run.record import Record
from imgclf_jax.scores.classification import METRICS

ROOT = Path(__file__).parent.parent
PAGES = {page.stem: page for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
         if "_build" not in page.parts}  # fmt: skip
TEXTS = {name: page.read_text() for name, page in PAGES.items()}
# What else the pages run: CI and the contributor do.
OTHERS = {"python", "python3", ".uv/bin/pip", ".uv/bin/uv", "uvx", "export", "bash", "ruff", "mypy", "pytest",
          "sphinx-build", "tensorboard"}  # fmt: skip
TINY = {"total": "2 steps", "batch_size": "8", "schedule": "constant(1e-3)", "log_every": "", "eval_every": "",
        "checkpoint_every": "", "tensorboard": "False"}  # fmt: skip
SMALL = {"model": "mlp(widths=(4,))", "data.source": "fake(16, (28, 28, 1), 4)"}


def blocks(page: Path) -> list[tuple[str, str]]:
    """(language, text) of each Python and Bash block."""
    return re.findall(r"^```(python|bash)\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def split(line: str) -> list[list[str]]:
    groups = itertools.groupby(shlex.split(line, comments=True), lambda word: word == "&&")
    return [without_uv(list(words)) for between, words in groups if not between]


def without_uv(words: list[str]) -> list[str]:
    if words[0] in ("uv", ".uv/bin/uv") and words[1] == "run":
        words = words[2:]
        while words[0] in ("--group", "--no-group", "--extra", "--isolated"):
            assert words[0] == "--isolated" or words[1] in GROUPS
            words = words[1 if words[0] == "--isolated" else 2 :]
    return words


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
GROUPS = {*PROJECT["dependency-groups"], *PROJECT["project"]["optional-dependencies"]}


def run_launch(words: list[str]) -> None:
    """A command of launch.py in this process; training takes two steps of a small network unless one is named."""
    command = words.pop(0) if words and not words[0].startswith("-") else "train"
    if command == "--help" or words == ["--help"]:
        assert launch.main(["--help"]) == 0
        return
    if command == "dryrun":
        run_dryrun(words)
        return
    if command == "sweep":
        run_launch(first_run(words))
        return
    config = next((b for a, b in itertools.pairwise(words) if a == "--config"), "configs/digits.py")
    settings = dict(TINY) if command == "train" else {}
    if command == "reproduce":  # the runs here have no more than two steps
        words = [word for word in words if not word.startswith("--steps=")]
    if ("--config" in words and any(word.startswith("--config.init_from=") for word in words)) or "transfer" in config:
        settings |= {"model": "resnet_cifar(depth=8)", "batch_size": "8", "data.source": "fake(16, (32, 32, 3), 10)"}
    elif command == "train" and re.match(r"configs/(finetune|probe)", config):
        settings |= {"stop": ""}
    elif command == "train" and config.startswith("configs/"):
        settings |= SMALL
    elif command == "find-lr":
        settings |= {"model": "mlp(widths=(32,))"}
    if ":PHOTOS" in config:
        settings.pop("data.source", None)
    if any(word.startswith("--profile") for word in words):
        settings["total"] = "12 steps"
    downloads = [word for word in words if word.startswith("--config.data.source=tfds")]
    for word in downloads:
        spec.parse_one(word.partition("=")[2])
    kept = [word for word in words if word not in downloads]
    small = [f"--config.{key}={value}" for key, value in settings.items()]
    assert launch.main([command, *small, *kept]) == 0


def first_run(words: list[str]) -> list[str]:
    """The command line of the first run of a sweep, `words`, as a page would have it: without what makes it long."""
    words, out = words[: words.index(">")] if ">" in words else words, io.StringIO()
    with contextlib.redirect_stdout(out):
        assert launch.main(["sweep", *words, *([] if "--print" in words else ["--print"])]) == 0
    _, script, *command = shlex.split(out.getvalue().splitlines()[0])
    assert script.endswith("launch.py")
    config = next(word.removeprefix("--config=") for word in command if word.startswith("--config="))
    named = ["--config", f"configs/{Path(config).name}"] if "configs/" in config else [f"--config={config}"]
    return [word for word in command if not word.startswith(("--config=", "--config.total="))] + named


def run_dryrun(words: list[str]) -> None:
    """In a separate process, which sets its platform, for virtual devices, since no compiler of a chip is installed."""
    topology = pytest.importorskip("imgclf_jax.tools.dryrun.topology")
    [chips] = [word.removeprefix("--chips=") for word in words if word.startswith("--chips=")]
    topology.parse(chips)
    if chips.startswith("cpu"):
        command = [sys.executable, "launch.py", "dryrun", "--config.model=mlp", *words]
        subprocess.run(command, cwd=ROOT, capture_output=True, check=True)


def run_other(words: list[str]) -> None:
    """A Python file that the page has written, or a file and extras of the clone."""
    if words[0] == "python" and words[1].startswith("make_"):
        subprocess.run([sys.executable, *words[1:]], check=True)
        return
    assert words[0] in OTHERS or (ROOT / words[0]).is_file(), words
    assert [w for w in words if w.startswith(("tests/", "benchmarks/")) and not (ROOT / w).exists()] == []


LONG = {"data", "extending", "models", "using"}  # pages of many commands
QUICK = {"config", "contributing", "reliability", "speed"}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The files of the pages (images, arrays, weights) and the working directory."""
    rng = np.random.default_rng(0)
    for place in ("PHOTOS", "DIR/train", "DIR/test"):
        for name in ("cat", "dog"):
            (tmp_path / place / name).mkdir(parents=True)
            for i in range(10):
                picture = Image.fromarray(rng.integers(256, size=(40, 44, 3), dtype=np.uint8))
                picture.save(tmp_path / place / name / f"{i}.png")
    (tmp_path / "more").mkdir()
    for name in ("new.jpg", "more/other.jpg"):
        picture.resize((32, 32)).save(tmp_path / name)
    arrays = {"x": rng.integers(256, size=(16, 28, 28), dtype=np.uint8), "y": np.arange(16) % 4}
    np.savez(tmp_path / "mnist.npz", **{f"{a}_{split}": x for split in ("train", "test") for a, x in arrays.items()})
    for name in ("configs", "launch.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:  # the files of one page are not those of another
        if name.startswith("my_"):
            del sys.modules[name]


@pytest.fixture
def weights(folder, monkeypatch):
    """ResNet-8's weights under the file name of the pages."""
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "weights"))
    import torch_format
    from test_pretrained import MODELS
    from torch_fixtures import draw

    shapes = MODELS["akamaster resnet20"]["shapes"]
    own = {name: shape for name, shape in shapes.items() if not name.startswith("layer") or name.split(".")[1] == "0"}
    torch_format.save(folder / "resnet20-12fca82f.th", {name: draw(name, tuple(shape)) for name, shape in own.items()})


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow if name in LONG else pytest.mark.thorough)
    for name, page in PAGES.items() if blocks(page)
])  # fmt: skip
def test_the_blocks_of_a_page_run(name, folder, weights, capsys):
    for language, text in blocks(PAGES[name]):
        if language == "python":
            file = re.match(r"# (\w+\.py)\n", text)
            if file:
                (folder / file[1]).write_text(text)
            else:
                exec(compile(text, str(PAGES[name]), "exec"), {})
            continue
        for words in [words for line in text.splitlines() for words in split(line)]:
            if words[0] == "launch.py":
                run_launch(words[1:])
            else:
                run_other(words)


def test_the_tests_that_reliability_names_are_there():
    named = re.findall(r"`([\w/]*test_\w+\.py)`", TEXTS["reliability"])
    assert len(named) > 20
    files = [ROOT / "tests" / file for file in named]
    assert [file for file in files if file.parent.is_dir() and not file.is_file()] == []  # a tool may be deleted


def test_the_commands_for_clusters_are_valid(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    page = TEXTS["clusters"]
    text = page.replace("\\\n", " ").replace("$OMPI_COMM_WORLD_SIZE", "2").replace("$OMPI_COMM_WORLD_RANK", "0")
    found = [shlex.split(line.rstrip("'")) for line in re.findall(r"launch\.py (train .*)", text)]
    assert len(found) == 6
    monkeypatch.setattr("imgclf_jax.cli.main._dispatch", lambda *parsed: 0)
    for words in found:
        assert launch.main(words) == 0, words


@pytest.mark.thorough
@pytest.mark.parametrize(("name", "tolerance"), [("library", 0.02), ("own_loop", 0.1)])
def test_the_cells_run_in_order(name, tolerance, capsys, tmp_path, monkeypatch):
    """The losses of its own loop depend on the processor, more so the longer it trains."""
    monkeypatch.chdir(tmp_path)
    variables: dict = {}
    for cell in json.loads((ROOT / "docs" / "notebooks" / f"{name}.ipynb").read_text())["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] != "code" or ("matplotlib" in source and not importlib.util.find_spec("matplotlib")):
            continue
        capsys.readouterr()
        exec(compile(source, name, "exec"), variables)
        out = capsys.readouterr().out
        for shown in cell["outputs"]:
            expected = "".join(shown["text"])
            number = r"\d+\.\d+"
            assert re.sub(number, "N", out.strip()) == re.sub(number, "N", expected.strip())
            for found, wanted in zip(re.findall(number, out), re.findall(number, expected), strict=True):
                assert abs(float(found) - float(wanted)) < tolerance


def test_the_readme_takes_a_screen_and_a_half():
    assert len(TEXTS["README"].splitlines()) <= 82


def test_its_links_lead_somewhere():
    for name, text in TEXTS.items():
        for link in re.findall(r"\]\((?!https?:)([^)#]+)", text):
            assert (PAGES[name].parent / link).is_file(), link


def test_the_table_of_specs_names_every_name():
    table = TEXTS["using"].partition("## Specs")[2].partition("## Optimization")[0]
    for names in (DEVICE_OPS, HOST_OPS, SOURCES, LOSSES, BACKBONES, SCHEDULES, MIXES, VIEWS, METRICS):
        assert [name for name in names if not re.search(rf"`{name}\b|[|:] {name}\b", table)] == []


@pytest.mark.thorough
@pytest.mark.parametrize("how", ["data.placement=device", "preprocess=decode(1)|random_resized_crop(28)"])
def test_training_needs_neither_tensorflow_nor_clu_nor_a_cache(how, tmp_path):
    """A whole run without these packages has the same bits; only a random crop, read ahead by tf.data, imports it."""
    (tmp_path / "file").write_text("")
    environment = user_environment(str(tmp_path / "file"))

    def digest(*missing):
        workdir = tmp_path / ("without" if missing else "with")
        arguments = ["train", f"--workdir={workdir}", f"--config.{how}",
                     "--config.model=mlp(widths=(16,))", "--config.schedule=constant(1e-3)", "--config.eval_every=",
                     "--config.total=40 steps"]  # fmt: skip
        unused = missing if "crop" in how else ("tensorflow", *missing)
        code = (
            "import sys\n"
            f"for name in {missing}: sys.modules[name] = None\n"
            f"import launch; status = launch.main({arguments})\n"
            f"assert not any(map(sys.modules.get, {unused})); sys.exit(status)"
        )
        command = [sys.executable, "-W", "error", "-c", code]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "test: examples 360" in done.stdout
        assert ("tensorboard is not installed" in done.stderr) == bool(missing)
        return json.loads((workdir / "result.json").read_text())["params_sha256"]

    assert digest("tensorflow", "tensorflow_datasets", "clu", "tensorboard", "sklearn") == digest()


# Keys that a config's header sets beside the file, or that the folder and the weights fill.
FILLED = {"data.source", "data.train", "data.eval", "model", "preprocess", "preprocess_eval", "augment"}
FINETUNED = {"finetune_flowers": FILLED, "finetune_textures": FILLED | {"total"}, "finetune_digits": FILLED,
             "finetune_imagenette": FILLED | {"total", "schedule"}}  # fmt: skip
OF_THE_COMMAND = FINETUNED | {
    "probe": FILLED,
    **{name: {"data.source"} for name in ("faces", "mnist", "cifar10_airbench", "cifar10_airbench95", "cifar10_muon",
                                          "cifar100_muon")},
    "imagenette": {"data.source", "data.eval"},
    "transfer": {"init_from", "data.source", "num_seeds"},
    "transfer_frozen": {"init_from", "data.source", "num_seeds", "rules.freeze", "schedule"},
    "transfer_scratch": {"data.source", "num_seeds"},
}  # fmt: skip
RESULTS = TEXTS["README"] + TEXTS["results"]  # the README repeats a few of the table's rows
LINKED = dict.fromkeys(re.findall(r"\[([\d.]+)([^\]]*)\]\((?:docs/)?results/(\w+)(-0)?\.zip\)", RESULTS))


def bundles_of(name, several):
    """The bundles of a row of the results, in the order of their seeds, and the file of their config."""
    folder = ROOT / "docs" / "results"
    files = sorted(folder.glob(f"{name}-?.zip")) if several else [folder / f"{name}.zip"]  # one: all seeds at once
    config = ROOT / "configs" / f"{re.sub('(?<=transfer|finetune)_.*', '', name)}.py"
    return [Record.load(str(file)) for file in files], config


@pytest.mark.parametrize(("mean", "of", "name", "several"), LINKED, ids=[name for *_, name, _ in LINKED])
def test_a_result_with_bundles_is_that_of_the_bundles(mean, of, name, several):
    """The mean test accuracy in the table's row, over as many seeds or draws as it says, and the header's numbers.

    All bundles are of one code, unchanged since its commit.
    """
    records, config = bundles_of(name, several)
    code = Record.load(str(ROOT / "docs" / "results" / "digits-0.zip")).provenance["code"]
    assert {(one["code"], one["git"]["changed"]) for record in records for one in record.snapshots} == {(code, False)}
    measured = "val" if name == "finetune_imagenette" else "test"
    scores = [record.result[measured] for record in records]
    accuracies = [one["accuracy"] for one in scores]
    assert f"{sum(accuracies) / len(accuracies):.{len(mean) - 2}f}" == mean
    shipped = configs.load_file(str(config))
    free = OF_THE_COMMAND.get(name, set()) | ({"seed"} if "seeds" in of else set())
    assert all(configs.difference(record.config, shipped, without=tuple(free)) == [] for record in records)
    header = config.read_text().split('"""')[1]
    if not several:
        deviation = scores[0]["accuracy_std"]
        assert records[0].config.num_seeds == 3
        assert f"{accuracies[0]:.3f} ± {deviation:.3f}" in header
        return
    counts = {", one seed": 1, ", two seeds": 2, ", three seeds": 3, ", five seeds": 5, ", five draws": 5}
    assert len(records) == counts[of]
    if "draws" in of:
        sources = [record.config.data.source for record in records]
        assert sources == [f"{shipped.data.source[:-1]}{f', draw={i}' if i else ''})" for i in range(len(records))]
    else:
        assert [record.config.seed for record in records] == list(range(len(records)))
    for metric in ("accuracy", *filter(None, shipped.metrics.split("|"))):
        values = [one[metric] for one in scores]
        assert [f"{value:.4f}" for value in (*values, sum(values) / len(values)) if f"{value:.4f}" not in header] == []


def test_the_times_of_results_are_medians_of_the_bundles():
    """Each median is in seconds below two minutes, else in minutes. The header has the shortest and longest time."""
    rows = re.findall(r"results/(\w+?)(-0)?\.zip\)[^|]*\| ([^|]*) \|", RESULTS)
    assert len(rows) > len(LINKED)
    for name, several, text in rows:
        records, config = bundles_of(name, several)
        seconds = [record.result["seconds"] for record in records]
        median = statistics.median(seconds)
        assert (name, text) == (name, f"{median:.0f} s" if median < 120 else f"{median / 60:.0f} min")
        numbers = set(re.findall(r"[\d.]*\d", config.read_text().split('"""')[1]))
        for extreme in (min(seconds), max(seconds)):
            minutes = {f"{extreme / 60:.0f}", f"{extreme / 60:.1f}"} if extreme >= 120 else set()
            assert numbers & {f"{extreme:.0f}", *minutes}, (name, extreme)


def test_the_numbers_of_research_are_those_of_its_log():
    """The log has the runs in the page's order, and in `shown` what the page says of each."""
    runs = json.loads((ROOT / "docs" / "results" / "research.json").read_text())
    default = Record.load(str(ROOT / "docs" / "results" / "digits-0.zip")).provenance
    assert {(run["code"], run["git"]["changed"]) for run in runs.values()} == {(default["code"], False)}
    page = re.sub(r"(?s)\n## FixMatch.*?(?=\n## )", "", TEXTS["research"])  # whose runs are of earlier code
    shown = [(run, key) for run in runs.values() for key in run["shown"]]
    for words in map(shlex.split, re.findall(r"^uv run (launch\.py --.*)$", page.partition("\n## ")[2], re.MULTILINE)):
        assert runs[words[-1].removeprefix("runs/")]["command"] == words
    scores = [(run["test"][key], run["test"][f"{key}_std"]) for run, key in shown if key != "seconds"]
    texts = re.findall(r"(\d\.(\d+)) ± ([\d.]+)", page)
    for (mean, deviation), (text, digits, spread) in zip(scores, texts, strict=True):
        assert (text, spread) == (f"{mean:.{len(digits)}f}", f"{deviation:.{len(digits)}f}")
    seconds = [f"{run['seconds']:.0f}" for run, key in shown if key == "seconds"]
    assert re.findall(r"(?<=\| )(\d+) s(?= \|)", page) == seconds


def test_the_printed_scores_of_the_default_run_are_its_bundles():
    scores = Record.load(str(ROOT / "docs" / "results" / "digits-0.zip")).result["test"]
    lines = re.findall(r"test: examples 360(  .*?)(?:`|$)", "\n".join(TEXTS.values()), re.MULTILINE)
    printed = [tuple(one.split(" ")) for line in lines for one in line.strip().split("  ")]
    assert len(lines) >= 4
    wrong = [(key, value) for key, value in printed if key in scores and value != f"{scores[key]:.4g}"]
    assert wrong == []


def test_every_bundle_of_the_results_is_linked():
    files = {file.stem for file in (ROOT / "docs" / "results").glob("*.zip")}
    assert {re.sub(r"-\d$", "-0", file) for file in files} == {name + several for *_, name, several in LINKED}
