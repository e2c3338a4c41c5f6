"""Groups of runs, what tells them apart, the output of `compare`, its paired tests, and predictions that it saves."""

import csv
import io
import itertools
import json
import math
import re
import statistics

import numpy as np
import pytest
from cases import flags
from html_page import Page
from recorded import copy, edit, trained  # noqa: F401  fixtures
from scipy import stats

import launch
from imgclf_jax import config as configs
from imgclf_jax.config import default_config
from imgclf_jax.run import record
from imgclf_jax.tools.compare import comparison, paired, predictions
from imgclf_jax.tools.compare import tables as compare_tables
from imgclf_jax.tools.compare.paired import Spread
from imgclf_jax.tools.compare.predictions import load


@pytest.fixture
def write(tmp_path):
    """Writes the files of a run of 10 steps, which has ended if `done`."""

    def run(name, accuracy=0.9, done=True, metrics=None, steps=10, recorded=None, **settings):
        place = tmp_path / name
        place.mkdir(parents=True)
        config = default_config()
        config.total = "10 steps"
        for key, value in settings.items():
            parent = config[key.split("__")[0]] if "__" in key else config
            parent[key.split("__")[-1]] = value
        (place / "config.json").write_text(configs.to_json(config))
        data = {"train_examples": 64, "image_shape": [12, 12, 1], "class_names": ["a", "b"], "fingerprint": "x"}
        (place / "provenance.json").write_text(json.dumps({"data": data, "evals": {"test": "y"}} | (recorded or {})))
        found = metrics or {"accuracy": accuracy, "loss": 1 - accuracy, "top5": 1.0}
        accuracy = found["accuracy"]
        if done:
            (place / "result.json").write_text(json.dumps({"step": steps, "test": {"examples": 400, **found}}))
        lines = [{"step": step, "train/loss": 40 / step, "test/accuracy": accuracy * step / 10} for step in (1, 5, 10)]
        lines = lines if done else lines[:2]
        (place / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return place

    return run


def groups(tmp_path):
    return comparison.group_runs(record.find([str(tmp_path)])[0])


def test_runs_that_differ_in_their_seed_are_one_group(tmp_path, write):
    """The best group comes first; keys that only locate data do not separate runs."""
    values = {("adam", 0): 0.8, ("adam", 1): 0.9, ("sgd", 0): 0.95, ("sgd", 1): 0.93, ("sgd", 2): 0.97}
    for (optimizer, seed), accuracy in values.items():
        write(f"x/{optimizer}{seed}", accuracy, optimizer=optimizer, seed=seed, data__workers=seed, clip=2.0)
    found = groups(tmp_path)
    assert [dict(one.settings) for one in found] == [{"optimizer": "sgd"}, {"optimizer": "adam"}]
    assert [one.seeds for one in found] == [[0, 1, 2], [0, 1]]
    assert found[0].metrics()["test/accuracy"] == pytest.approx((3, 0.95, statistics.stdev([0.95, 0.93, 0.97])))
    assert comparison.common(found)["clip"] == 2.0
    assert not {"seed", "optimizer", "data.workers"} & set(comparison.common(found))


def test_seeds_trained_at_once_count_each(tmp_path, write):
    """Their mean and standard deviation are pooled with those of a run of one seed, as of all four values."""
    values = [0.5, 0.6, 0.8]
    mean, deviation = statistics.mean(values), statistics.stdev(values)
    ensemble = {"ensemble_accuracy": 0.9}
    write("a", seed=0, num_seeds=3, metrics={"accuracy": mean, "accuracy_std": deviation, **ensemble})
    write("b", seed=3, metrics={"accuracy": 0.7})
    [one] = groups(tmp_path)
    assert one.seeds == [0, 1, 2, 3]
    assert one.metrics() == {"test/accuracy": pytest.approx((4, 0.65, statistics.stdev([*values, 0.7])))}


def test_the_same_run_in_two_directories(tmp_path, write):
    """The directory distinguishes them, as before and after a code change, and no runs of other configs."""
    for folder, seed in itertools.product(("before", "after"), (0, 1)):
        write(f"{folder}/{seed}", 0.9 if folder == "before" else 0.8, seed=seed)
    assert [dict(one.settings) for one in groups(tmp_path)] == [
        {"directory": str(tmp_path / folder)} for folder in ("before", "after")
    ]
    write("after/copy", 0.7, seed=1)
    for seed in (0, 1):
        write(f"other/{seed}", 0.5, seed=seed, clip=1.0)
    assert [(one.label.replace(f"{tmp_path}", "."), one.seeds) for one in groups(tmp_path)] == [
        ("clip=0.0, directory=./before", [0, 1]), ("clip=0.0, directory=./after", [0, 1]),
        ("clip=0.0, directory=./after/copy", [1]), ("clip=1.0", [0, 1])]  # fmt: skip


def test_what_is_not_done_or_damaged(tmp_path, write):
    write("a/done", seed=0)
    for seed, name in ((1, "begun"), (2, "going")):
        write(f"a/{name}", 0.5, done=False, seed=seed)
    (write("b/result") / "result.json").write_text("[")
    (write("b/config") / "config.json").write_text("{}")
    (tmp_path / "c").mkdir()
    (tmp_path / "a" / "link").symlink_to(tmp_path / "a")
    runs, damaged = record.find([str(tmp_path), str(tmp_path / "a")])
    assert [run.workdir.path.name for run in runs] == ["begun", "done", "going"]
    assert ["config" in damaged[0], "b/result is damaged" in damaged[1], len(damaged)] == [True, True, 2]
    [one] = comparison.group_runs(runs)
    assert (one.seeds, len(one.unfinished)) == ([0], 2)
    assert compare_tables.notes([one], [], False) == ["2 runs are unfinished and left out: `status` shows how far."]


def save(place, *right):
    """The predictions that `compare --test` saves, bool[n] for each seed."""
    predictions._save(record.read(place), {"test": np.stack(right)})


@pytest.fixture
def compared(tmp_path, write):
    """Three optimizers with two seeds each, and predictions of 400 examples; the third's are of other examples."""
    rng, right = np.random.default_rng(0), {}
    for (optimizer, chance), seed in itertools.product((("sgd", 0.9), ("adam", 0.8), ("rmsprop", 0.5)), (0, 1)):
        own = right[optimizer, seed] = rng.random(400) < chance
        recorded = {"evals": {"test": "other"}} if optimizer == "rmsprop" else None
        place = write(f"{optimizer}-{seed}", float(own.mean()), optimizer=optimizer, seed=seed, recorded=recorded)
        save(place, own)
    write("going", 0.3, done=False, optimizer="lion<b>", seed=0)
    return right


def test_every_format_has_the_groups_and_the_paired_tests(tmp_path, compared, capsys):
    def printed(form):
        assert launch.main(["compare", str(tmp_path), f"--format={form}"]) == 0
        return capsys.readouterr()

    out, err = printed("json")
    found = json.loads(out)
    assert [one["settings"]["optimizer"] for one in found["groups"]] == ["sgd", "adam", "rmsprop", "lion<b>"]
    assert found["best"] == {"optimizer": "sgd"}
    assert found["groups"][3]["unfinished"][0]["step"] == 5
    [one] = found["comparisons"]
    assert "cannot pair optimizer=rmsprop with the best, because their examples differ" in err
    first, second = (np.stack([compared[name, seed] for seed in (0, 1)]) for name in ("adam", "sgd"))
    value, low, high = paired.difference(first, second)
    only = [((a & ~b).sum(), (a ^ b).sum()) for a, b in zip(first, second, strict=True)]
    p = [stats.binomtest(k, n).pvalue - stats.binom.pmf(k, n, 0.5) for k, n in only]  # the mid-p-value
    assert (one["difference"], one["examples"]) == ({"value": value, "low": low, "high": high}, 400)
    assert list(one["mcnemar_mid_p"].values()) == pytest.approx(p)
    assert list(one["holm"].values()) == pytest.approx(paired.holm(p))

    rows = list(csv.DictReader(io.StringIO(printed("csv").out)))
    assert [(row["optimizer"], row["seeds"], row["unfinished"]) for row in rows] == [
        ("sgd", "0 1", "0"), ("adam", "0 1", "0"), ("rmsprop", "0 1", "0"), ("lion<b>", "", "1")]  # fmt: skip
    assert float(rows[0]["test/accuracy"]) == pytest.approx(second.mean())
    assert float(rows[0]["test/accuracy_std"]) == pytest.approx(second.mean(1).std(ddof=1))

    lines = printed("table").out.splitlines()
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines if line.startswith("│")]
    assert [row[:2] for row in rows] == [["sgd", "0, 1"], ["adam", "0, 1"], ["rmsprop", "0, 1"], ["adam", "test"]]
    assert rows[3][2:4] == [f"{value:+.4f}", f"{low:+.4f} to {high:+.4f}"]


def test_the_page(tmp_path, compared):
    """Well-formed, with names escaped; it loads nothing, and tables and figures have captions."""
    file = tmp_path / "page.html"
    assert launch.main(["compare", str(tmp_path), f"--html={file}"]) == 0
    text = file.read_text()
    page = Page(text)
    assert (page.open, page.wrong) == ([], [])
    assert "lion&lt;b&gt;" in text  # in the legend of the curves
    assert "<b>" not in text
    assert not re.search(r"https?:|url\(|@import|<script|<link|src=", text)
    tables = [attributes for tag, attributes in page.tags if tag == "table"]
    assert len(tables) == len([1 for tag, _ in page.tags if tag == "caption"]) == 2
    pictures = [attributes for tag, attributes in page.tags if tag == "svg" and "role" in attributes]
    assert [own["aria-label"].split(". ")[0] for own in pictures] == ["test/accuracy", "train/loss"]


def test_runs_whose_configs_say_the_same_of_other_data_code_or_weights(tmp_path, write, capsys):
    one = {"modules": {"my_nets.py": "aa"}, "init_from": {"path": "w.pth", "sha256": "aa"}}
    write("a", seed=0, recorded=one)
    write("b", seed=1, recorded={"modules": {"my_nets.py": "bb"}, "init_from": {"path": "w.pth", "sha256": "bb"}})
    write("c", seed=2, recorded=one | {"evals": {"test": "z"}})
    a, b, c = (tmp_path / name for name in "abc")
    said = [
        *(f"{a} and {b} recorded a different {what}: their mean is of different runs"
          for what in ("init_from.sha256", "modules.my_nets.py")),
        f"{a} and {c} recorded a different evaluation set test='test': their results are not comparable",
    ]  # fmt: skip
    assert sorted(comparison.differing_origins(groups(tmp_path))) == sorted(said)
    assert launch.main(["compare", str(tmp_path)]) == 0
    assert "recorded a different modules.my_nets.py" in capsys.readouterr().err
    write("d", seed=3, clip=1.0, recorded={"modules": {"my_nets.py": "bb"}})
    assert len(comparison.differing_origins(groups(tmp_path))) == 3  # another group may have other code


RUN = flags("data.source=fake(80, (12, 12, 1), 4)", "augment=normalize", "model=mlp(widths=(8,))", "total=8 steps",
            "schedule=constant(1e-2)", "eval_every=", "checkpoint.best=test/loss", "tensorboard=False")  # fmt: skip


@pytest.mark.thorough
def test_they_are_those_of_the_result_and_of_evaluate(tmp_path, one_device, capsys, printed):
    """The exact accuracy of each seed, in the order of the rows of `evaluate`; a run that names code is left out."""
    for name, more in (("a", []), ("b", ["--config.optimizer=sgd", "--config.num_seeds=2"])):
        assert launch.main([f"--workdir={tmp_path / name}", *RUN, *more]) == 0
    config = tmp_path / "a" / "config.json"
    before = config.read_text()
    config.write_text(before.replace("mlp(widths=(8,))", "os:system('false')"))
    assert launch.main(["compare", str(tmp_path), "--test"]) == 0
    assert "if you trust both, add --trust" in capsys.readouterr().err
    assert not (tmp_path / "a" / predictions.FILE).exists()
    config.write_text(before)
    assert "McNemar" in printed("compare", str(tmp_path), "--test")
    runs = [record.read(tmp_path / name) for name in "ab"]
    one, two = (load(run)["test"] for run in runs)
    assert (one.shape, two.shape) == ((1, 80), (2, 80))
    assert 0.1 < one.mean() == runs[0].result["test"]["accuracy"] < 1
    assert two.mean(1).mean() == pytest.approx(runs[1].result["test"]["accuracy"])
    assert two.mean(1).std(ddof=1) == pytest.approx(runs[1].result["test"]["accuracy_std"])
    file = tmp_path / "rows.csv"
    evaluate = ["evaluate", f"--workdir={tmp_path / 'a'}", "--checkpoint=latest", f"--predictions={file}"]
    assert launch.main(evaluate) == 0
    listed = [row["correct"] == "True" for row in csv.DictReader(file.read_text().splitlines())]
    np.testing.assert_array_equal(one[0], listed)


@pytest.mark.thorough
def test_predictions_are_of_the_result_or_not_used(trained, copy, one_device, capsys):
    data, file = trained.parent / "data.npz", copy / predictions.FILE
    before, arrays = data.read_bytes(), dict(np.load(data))
    np.savez(data, **arrays | {"y_test": (arrays["y_test"] + 1) % 3})
    assert launch.main(["compare", str(copy), "--test"]) == 0
    assert ": the evaluation set test has changed since training" in capsys.readouterr().err
    assert not file.exists()
    data.write_bytes(before)
    assert launch.main(["compare", str(copy), "--test"]) == 0
    result = json.loads((copy / "result.json").read_text())
    assert load(record.read(copy))["test"].mean() == result["test"]["accuracy"]
    edit(copy / "result.json", lambda result: result.update(params_sha256="another"))
    assert load(record.read(copy)) == {}


def by_sum(first, second):
    """By the definition: the probability of outcomes further from half than this one, plus half of those as far."""
    n = first + second
    far = abs(2 * first - n)
    chance = [math.comb(n, k) / 2**n for k in range(n + 1)]
    beyond = sum(p for k, p in enumerate(chance) if abs(2 * k - n) > far)
    same = sum(p for k, p in enumerate(chance) if abs(2 * k - n) == far)
    return beyond + same / 2


@pytest.mark.parametrize(("first", "second"), [(0, 1), (1, 0), (3, 3), (5, 12), (12, 5), (0, 40), (301, 250), (7, 8)])
def test_mcnemar_is_the_binomial_sum(first, second):
    right = np.repeat([[True, False], [False, True], [True, True], [False, False]], [first, second, 5, 3], 0)
    assert paired.mcnemar(*right.T) == pytest.approx(by_sum(first, second), rel=1e-10)


def test_holm():
    """By hand: the smallest times 4, the next times 3, …, and none below the one before."""
    assert paired.holm([0.04, 0.01, 0.03, 0.005]) == pytest.approx([0.06, 0.03, 0.06, 0.02])
    assert paired.holm([0.9, 0.8]) == [1.0, 1.0]
    assert paired.mcnemar(np.ones(3, bool), np.ones(3, bool)) == 1.0  # without a difference


def test_spread_of_parts_is_that_of_all_values():
    values = [[0.9], [0.8, 0.85, 0.95], [0.7, 0.9]]
    parts = [Spread(len(v), statistics.mean(v), statistics.stdev(v) if len(v) > 1 else math.nan) for v in values]
    flat = [x for v in values for x in v]
    assert paired.spread(parts) == pytest.approx((6, statistics.mean(flat), statistics.stdev(flat)))
    alone = paired.spread(parts[:1])
    assert alone[:2] == (1, 0.9)
    assert math.isnan(alone.std)


def test_intervals_are_those_of_scipy():
    """Of single runs the paired t-test's; of seeds whose luck explains all, Welch's on their accuracies."""
    rng = np.random.default_rng(0)
    a, b = rng.random((5, 300)) < 0.9, rng.random((4, 300)) < 0.8
    welch = stats.ttest_ind(a.mean(1), b.mean(1), equal_var=False).confidence_interval()
    assert paired.difference(a, b)[1:] == pytest.approx(tuple(welch), rel=1e-9)
    t = stats.ttest_rel(a[0].astype(float), b[0].astype(float)).confidence_interval()
    assert paired.difference(a[:1], b[:1])[1:] == pytest.approx(tuple(t), rel=1e-9)


def coverage(seeds, between, examples, times):
    """How often the interval holds the true difference, 0; `between` is the deviation of a seed's luck, in logits."""
    rng, covered = np.random.default_rng(0), 0
    for _ in range(times):
        difficulty, luck = rng.normal(2, 1.5, size=examples), rng.normal(0, between, (2 * seeds, 1))
        right = rng.random((2 * seeds, examples)) < 1 / (1 + np.exp(-(difficulty + luck)))
        _, low, high = paired.difference(right[:seeds], right[seeds:])
        covered += low <= 0 <= high
    return covered / times


# The table of docs/commands/compare.md; the tests of every day draw fewer examples, as precisely as 0.027.
COVERED = {(1, 0.0): 0.9535, (1, 0.3): 0.564, (1, 1.0): 0.213, (2, 0.0): 0.965, (2, 0.3): 0.9705, (2, 1.0): 0.969,
           (3, 0.0): 0.962, (3, 0.3): 0.9625, (3, 1.0): 0.971, (5, 0.0): 0.9605, (5, 0.3): 0.9655, (5, 1.0): 0.968,
           (10, 0.0): 0.957, (10, 0.3): 0.958, (10, 1.0): 0.964}  # fmt: skip


@pytest.mark.parametrize(("seeds", "between"), [(2, 0.0), (2, 0.6), (5, 0.0), (5, 0.6)])
def test_the_interval_covers_the_difference(seeds, between):
    assert coverage(seeds, between, 150, 600) == pytest.approx(0.95, abs=0.027)


@pytest.mark.slow
@pytest.mark.parametrize(("seeds", "between"), COVERED)
def test_what_the_page_says_of_coverage(seeds, between):
    assert coverage(seeds, between, 500, 2000) == pytest.approx(COVERED[seeds, between], abs=0.0011)


def test_models_that_agree_on_all_examples_may_differ_on_others():
    """Both are perfect on 24 examples: the difference is 0, and its interval has a width (Agresti and Min 2005)."""
    right = np.ones((1, 24), bool)
    assert paired.difference(right[:, :1], ~right[:, :1]) == (1, -1, 1)  # one example says nothing
    found = paired.difference(right, right)
    assert found.value == 0
    assert -found.low == found.high == pytest.approx(stats.t.ppf(0.975, 23) / 26)
    assert paired.difference(right, ~right).low == pytest.approx(0.862, abs=0.01)
