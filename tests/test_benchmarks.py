"""The benchmarks: all frameworks build the same networks, and ratios are computed as documented."""

import importlib.util
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from imgclf_jax.models import classifier

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
PAGE = (BENCHMARKS.parent / "docs" / "speed.md").read_text()


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def test_every_framework_builds_the_same_network():
    """This project's, Keras's and Flax's networks have equal parameter counts, and the FLOPs of the layers' sizes."""
    from networks import NETWORKS
    from peers.linen_twins import Classifier

    network = NETWORKS["cnn"]
    images = jnp.zeros((2, *network.image_shape))
    own = classifier.build(network.model, network.classes, "float32")
    for model in (own, Classifier(network.linen(jnp.float32), network.classes)):
        params = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
        assert sum(x.size for x in jax.tree.leaves(params)) == 121_930
    assert network.keras().count_params() == 121_930
    multiply_adds = 26 * 26 * 32 * 9 + 10 * 10 * 64 * 9 * 32 + 1600 * 64 + 64 * 10
    assert network.inference_flops == 2 * multiply_adds
    assert network.training_flops == 3 * 2 * multiply_adds - 2 * 26 * 26 * 32 * 9


@pytest.mark.parametrize(
    ("name", "giga"), [("resnet18", 1.814), ("resnet50", 4.089), ("convnext_t", 4.456), ("vit_s16", 4.6)]
)
def test_multiply_adds_are_the_published(name, giga):
    """Those of torchvision's weights (`_ops`), and of DeiT-S (arXiv:2012.12877, table 5)."""
    from networks import NETWORKS

    assert NETWORKS[name].inference_flops / 2e9 == pytest.approx(giga, abs=0.0015)


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["resnet20", "vit_ti4", "resnet18", "resnet50", "convnext_t", "vit_s16"])
def test_linen_and_pytorch_build_the_same_networks(name):
    """Parameters and running statistics of equal sizes; linen's logits are float32 by a computation in `dtype`."""
    from networks import NETWORKS
    from peers.linen_twins import Classifier

    network = NETWORKS[name]
    images = jnp.zeros((2, *network.image_shape))
    with jax.numpy_dtype_promotion("standard"):
        linen = Classifier(network.linen(jnp.float32), network.classes)
        traced = jax.make_jaxpr(linen.init_with_output)(jax.random.key(0), images)
        logits, theirs = jax.eval_shape(linen.init_with_output, jax.random.key(0), images)
    ours = jax.eval_shape(classifier.build(network.model, network.classes, "float32").init, jax.random.key(0), images)
    assert sorted(x.size for x in jax.tree.leaves(ours)) == sorted(x.size for x in jax.tree.leaves(theirs))
    assert logits.dtype == jnp.float32
    assert "bf16" not in str(traced)
    if not importlib.util.find_spec("timm"):
        pytest.skip("torch and timm come with the dependency group `peers`")
    # In a process of its own, since Triton, which torch imports, aborts after XLA has been loaded.
    code = f"from networks import NETWORKS; print([x.numel() for x in NETWORKS[{name!r}].torch().parameters()])"
    printed = subprocess.run([sys.executable, "-c", code], cwd=BENCHMARKS, capture_output=True, text=True, check=True)
    assert sorted(x.size for x in jax.tree.leaves(ours["params"])) == sorted(json.loads(printed.stdout))


def test_ratios_are_of_the_same_round():
    """Machine drift cancels: rates are divided within a round, and the median is over the ratios."""
    import report
    from networks import NETWORKS

    rates = {
        "imgclf_jax host float32": (200, 20, 300),
        "imgclf_jax host bfloat16": (400, 50, 600),
        "keras tensorflow": (100, 20, 100),
        "torch eager bfloat16": (200, 10, 400),
    }
    records = [
        {"variant": name, "mode": "train", "batch_size": 32, "round": r, "images_per_second": rate}
        for name, values in rates.items()
        for r, rate in enumerate(values)
    ]
    flops = NETWORKS["cnn"].training_flops
    records += [
        {"variant": "matmul peak", "mode": "float32", "batch_size": 32, "round": r, "flops_per_second": 1000 * flops}
        for r in range(3)
    ]
    rows = {row["variant"]: row for row in report.summarize({"records": records}, NETWORKS["cnn"])}
    own = rows["imgclf_jax host float32"]
    assert own["fastest_peers"] == {"float32": "keras tensorflow", "any": "torch eager bfloat16"}
    assert own["to_fastest_float32"] == {"median": 2, "min": 1, "max": 3}
    assert own["to_fastest_any"] == {"median": 1, "min": 0.75, "max": 2}
    assert rows["imgclf_jax host bfloat16"]["to_fastest_float32"]["median"] == 4
    assert rows["torch eager bfloat16"]["own_to_it"] == {"median": 2, "min": 1.5, "max": 5}


def test_a_variant_that_ends_early_is_absent(monkeypatch):
    """Its rounds are too: the ratios of the others would be to a peer of fewer rounds."""
    import speed
    from rich.console import Console

    class Worker:
        def __init__(self, name, network, images):
            self.name, self.asked, self.about, self.error = name, 0, {"rss_mb": 1.0}, ""

        def ask(self, mode, size, seconds):
            self.asked += 1
            self.error = "the worker ended with status -9" if self.name.startswith("keras") and self.asked > 1 else ""
            return {} if self.error else {"images_per_second": 1.0, "flops_per_second": 1.0}

        def close(self):
            pass

    monkeypatch.setattr(speed, "Worker", Worker)
    monkeypatch.setattr(speed, "_PAUSE", 0)
    args = speed.parse(["--variants=imgclf_jax host,keras jax", "--batch_sizes=32", "--modes=train", "--rounds=3"])
    measured = speed.measure(args, "cnn", Console(quiet=True))
    assert measured["absent"] == {"keras jax": "the worker ended with status -9"}
    own = ["imgclf_jax host float32", "imgclf_jax host bfloat16"]
    assert sorted(r["variant"] for r in measured["records"] if r["mode"] == "train") == sorted(own * 3)
    assert speed.parse(["--variants=keras jax, "]).variants == ["keras jax"]
    with pytest.raises(SystemExit):
        speed.parse(["--variants=imgclf_jax host,kerras"])


@pytest.mark.slow
def test_the_whole_benchmark_runs(tmp_path):
    """This project next to Keras, a Flax loop and engines for inference, for an instant each."""
    pytest.importorskip("matplotlib", reason="matplotlib comes with the dependency group `peers`")
    names = "imgclf_jax,keras tensorflow,linen,onnxruntime,openvino float32"
    command = [sys.executable, BENCHMARKS / "speed.py", f"--variants={names}", "--batch_sizes=32",
               "--rounds=1", "--seconds=0.05", f"--out={tmp_path}"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "speed.png").stat().st_size > 10_000
    summary = json.loads((tmp_path / "speed.json").read_text())["networks"]["cnn"]["summary"]
    measured = {(row["variant"], row["mode"]) for row in summary if row["images_per_second"]["median"] > 0}
    assert {
        ("imgclf_jax device bfloat16", "train"),
        ("keras tensorflow", "infer"),
        ("linen loop float32", "train"),
        ("onnxruntime float32", "infer"),
        ("openvino float32", "infer"),
    } <= measured


@pytest.mark.thorough
def test_the_evidence_of_an_accelerator_is_rehearsed(tmp_path):
    """`benchmarks/accelerator.py --small` on CPU: every way to train a run ends with the same bits."""
    out = tmp_path / "accelerator.json"
    command = [sys.executable, str(BENCHMARKS / "accelerator.py"), "--small", f"--out={out}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(out.read_text())
    assert all(row["same"] for row in found["bits"])
    assert {row["way"] for row in found["bits"]} >= {"again", "data on the device", "resumed after SIGKILL"}
    assert all(row["images a second"] > 0 for part in ("airbench", "throughput") for row in found[part])
    assert all(row["ok"] for row in found["forms"])
    assert "| resumed after SIGKILL |" in done.stdout


def section_of(title):
    return PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]


def table_of(section, nth=0):
    return [part for part in section.split("\n\n") if part.startswith("| ")][nth].splitlines()[2:]


def read_log(name, section):
    """A log of `docs/speed`, whose processor the section names."""
    log = json.loads((BENCHMARKS.parent / "docs" / "speed" / f"{name}.json").read_text())
    assert {"AMD EPYC": "EPYC", "Intel(R) Xeon(R) Processor": "Intel"}[log["machine"]["cpu"]] in section
    return log


def summaries(section, mode, *logs):
    """Yields (network, batch size, {variant: summary}) of logs, computed from their rounds."""
    import report
    from networks import NETWORKS

    for log in logs:
        for name, measured in read_log(log, section)["networks"].items():
            found = [row for row in report.summarize(measured, NETWORKS[name]) if row["mode"] == mode]
            for size in sorted({row["batch_size"] for row in found}):
                yield name, size, {row["variant"]: row for row in found if row["batch_size"] == size}


def to_fastest(own, kind):
    """The cells of images per second, the fastest peer, and the ratio to it."""
    import report

    rate = own["images_per_second"]["median"]
    peer, ratio = own["fastest_peers"][kind].removesuffix(" float32"), report.cell(own[f"to_fastest_{kind}"], ".2f")
    return [f"{rate:{',.0f' if rate >= 10 else '.1f'}}", peer, ratio]


def line(*cells):
    return f"| {' | '.join(cells)} |"


def head_line(cells, ratios):
    """A line of the page's first table: ResNet-50's or the usual photographs', and the range of the others' ratios."""
    return f"{line(*cells)[:-2]} | {min(ratios):.2f} to {max(ratios):.2f} |"


def test_the_numbers_of_training_on_the_page_of_speed_are_those_of_its_logs():
    section, rows, others = section_of("Training"), [], []
    for name, size, found in summaries(section, "train", "training-28", "training-32", "training-224"):
        in_float32, own = found["imgclf_jax host float32"], found["imgclf_jax host bfloat16"]
        rows.append(line(name, str(size), *to_fastest(in_float32, "float32"), *to_fastest(own, "any")))
        if name == "resnet50":
            head = "training, ResNet-50, 224 pixels", *to_fastest(in_float32, "float32")
        else:
            others.append(in_float32["to_fastest_float32"]["median"])
    assert table_of(section) == rows
    assert head_line(head, others) in PAGE


def test_the_numbers_of_inference_on_the_page_of_speed_are_those_of_its_logs():
    import report

    section, rows, others, to_linen = section_of("Inference"), [], [], []
    for name, size, found in summaries(section, "infer", "inference-28", "inference-32", "inference-224"):
        own = found["imgclf_jax host float32"]
        cells = to_fastest(own, "float32")
        rows.append(line(name, str(size), *cells, report.cell(found["torch compile float32"]["own_to_it"], ".2f")))
        if name == "resnet50":
            head = "inference, the same", *cells
        else:
            others.append(own["to_fastest_float32"]["median"])
        if linen := found.get("linen loop float32"):
            to_linen.append(report.cell(linen["own_to_it"], ".2f"))
    assert table_of(section) == rows
    assert f"a linen loop is {to_linen[0]} at batch 1 and {to_linen[1]} at 128" in " ".join(section.split())
    assert head_line(head, others) in PAGE


def test_the_numbers_without_avx512_on_the_page_of_speed_are_those_of_its_log():
    section, rows = section_of("Without AVX-512"), []
    for mode, title in (("train", "training"), ("infer", "inference")):
        for name, size, found in summaries(section, mode, "avx2-28"):
            rows.append(line(title, name, str(size), *to_fastest(found["imgclf_jax host float32"], "float32")))
    assert table_of(section) == rows


def test_the_numbers_of_whole_runs_on_the_page_of_speed_are_those_of_their_log():
    import report

    section = section_of("Whole runs")
    log, rows = read_log("whole", section), []
    for name, runs in log["warm"].items():
        seconds = [run["seconds"] for run in runs]
        ratios = [keras["seconds"] / each for keras, each in zip(log["warm"]["Keras example"], seconds, strict=True)]
        title = re.sub(r"(\w+[.]py)", r"`\1`", name).replace("Keras e", "Keras's e")
        accuracy = f"{statistics.mean(run['accuracy'] for run in runs):.4f}"
        cells = [title, accuracy, report.cell(report.spread(seconds), ".1f"), "", ""]
        if name in log["cold"]:
            cells[3:] = f"{log['cold'][name]['seconds']:.1f}", report.cell(report.spread(ratios), ".1f")
        rows.append(line(*cells))
    assert table_of(section) == rows
    log = read_log("first_answer", section)
    one, two, three, four = (statistics.median(log[k][n]) for n in ("predict", "serve") for k in ("warm", "cold"))
    assert f"{one:.1f} s after the command `predict`, and {two:.1f} s with" in section
    assert f"of `serve` {three:.1f} s and {four:.1f} s" in section


def test_the_numbers_of_photographs_on_the_page_of_speed_are_those_of_their_log():
    import report

    section = section_of("Photographs from disk")
    sets, rows, to_tf = read_log("photographs", section)["sets"], [], []
    for size, own in [*((size, "imgclf_jax") for size in sets), ("3000x2250", "imgclf_jax, draft")]:
        rate = f"{statistics.median(each[own] for each in sets[size]):,.0f}"
        ratios = [report.spread([each[own] / each[peer] for each in sets[size]])
                  for peer in ("tf.data", "torch tensor", "torch pillow", "grain")]  # fmt: skip
        rows.append(line(size + own.removeprefix("imgclf_jax"), rate, *(report.cell(each, ".2f") for each in ratios)))
        to_tf.append(ratios[0])
        if size == "500x375":
            head = "reading JPEG files of 500 by 375, per core", rate, "tf.data", report.cell(ratios[0], ".2f")
    assert table_of(section) == rows
    assert head_line(head, [each["median"] for each in to_tf[1:]]) in PAGE
    log, workers, words = read_log("workers", section), "imgclf_jax, workers", " ".join(section.split())
    a, b, c = (statistics.median(each[workers] / each["imgclf_jax"] for each in log["sets"][s]) for s in log["sets"])
    assert f"`data.workers=2` reads {a:.2f}, {b:.2f} and {c:.2f} times as many" in words
    own = statistics.median(each[workers] for each in log["cpu_ms"]["500x375"])
    assert f"{own:.3f} ms per photograph from workers, so at most {1 / own:.0f},000 a second" in words
    assert f"they would read {112 * float(head[1]) / 1e3:.0f},000;" in words
