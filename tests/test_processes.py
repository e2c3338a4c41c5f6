"""Several processes train one run; `-m slow` for what takes minutes."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import launched
import numpy as np
import pytest
from cases import rewind
from launched import ROOT

import launch

SHORT = (*launched.SMALL, "--config.model=mlp(widths=(16,))", "--config.log_every=1 steps",
         "--config.eval_every=20 steps", "--config.total=300 steps", "--config.checkpoint_every=50 steps")  # fmt: skip
ARRAYS = """
import json, sys
import jax, numpy as np
from jax.sharding import Mesh
from imgclf_jax.core import processes, sharding, tree
from imgclf_jax.optim import partition
process, port = int(sys.argv[1]), sys.argv[2]
processes.start(f"localhost:{port}", 2, process, heartbeat=10)
whole, devices = np.arange(16, dtype=np.int32).reshape(8, 2), np.array(jax.devices())

def placed(mesh):
    rows = sharding.rows_here(8, mesh)
    return rows, sharding.put_batch({"x": whole[rows]}, mesh)["x"]

other, crossed = placed(Mesh(devices[[[0, 2], [1, 3]]], ("data", "fsdp")))
mesh = Mesh(devices[[2, 1, 0, 3]], ("data",))  # not in the order of the processes
rows, put = placed(mesh)
same = all(np.array_equal(shard.data, whole[shard.index])
           for shard in (*put.addressable_shards, *crossed.addressable_shards))
copied = sharding.put_replicated({"x": whole}, mesh)["x"]
print(json.dumps({
    "rows": rows.tolist(), "other": other.tolist(), "same": same,
    "fetched": bool((sharding.fetch(put) == whole).all() and (sharding.fetch(crossed) == whole).all()),
    "copied": bool((np.asarray(copied) == whole).all()) and copied.is_fully_replicated,
    "digest": tree.sha256({"x": put}) == tree.sha256({"x": whole}),
    "hosts": processes.count(),
}))
"""


@pytest.mark.parametrize(("devices", "rows", "other"), [
    ((2, 2), [[2, 3, 4, 5], [0, 1, 6, 7]], [[0, 1, 4, 5], [2, 3, 6, 7]]),
    ((1, 3), [[4, 5], [0, 1, 2, 3, 6, 7]], [[0, 1], [2, 3, 4, 5, 6, 7]]),
])  # fmt: skip
def test_each_process_gets_the_rows_of_its_devices(devices, rows, other):
    """In the order of the mesh; an array on both is fetched whole."""
    started = start_two(ARRAYS, devices=devices)
    found = [json.loads(process.communicate(timeout=120)[0]) for process in started]
    assert [f.pop("rows") for f in found] == rows
    assert [f.pop("other") for f in found] == other
    assert found == [{"same": True, "fetched": True, "copied": True, "digest": True, "hosts": 2}] * 2


@pytest.mark.thorough
@pytest.mark.parametrize(("last", "sentence"), [
    (("--config.schedule=constant(0.1)",), "process 1 has schedule=constant.0.1., process 0 has schedule="),
    (("--workdir=OTHER",), "process 1 has the lock in the work directory=.*, process 0 "),
    (("--num_processes=3",), "process 1 has --num_processes=3, process 0 has --num_processes=2"),
])  # fmt: skip
def test_processes_that_were_given_something_else(tmp_path, last, sentence):
    workdir = tmp_path / "run"
    last = tuple(flag.replace("OTHER", f"{tmp_path}/other") for flag in last)
    began = time.monotonic()
    assert launched.end(launched.start(workdir, SHORT, 2, last=last)) == [1, 1]
    assert time.monotonic() - began < 60
    assert all(re.search(sentence, log) and "Traceback" not in log for log in logs(workdir))
    assert not workdir.exists() or not any(workdir.iterdir())


@pytest.mark.thorough
@pytest.mark.parametrize(("watchdog", "heartbeat", "sentence"), [
    (5, 100, r"Timeout \(0:00:(05|30)\)!"),  # the watchdog, in a step or a save
    (100, 12, "another task died"),  # JAX's heartbeat
])  # fmt: skip
def test_a_process_that_is_stopped_ends_the_other(tmp_path, watchdog, heartbeat, sentence):
    words = (*launched.LONG, f"--config.watchdog={watchdog} s")
    started = launched.start(tmp_path / "run", words, 2, heartbeat=heartbeat)
    try:
        end = time.monotonic() + 180
        while not list((tmp_path / "run").glob("checkpoints/[0-9]*")) and time.monotonic() < end:
            time.sleep(0.2)
        started[1].send_signal(signal.SIGSTOP)
        assert started[0].wait(60) in (1, -signal.SIGABRT)
    finally:
        for process in started:
            process.kill()
            process.wait()
    assert re.search(sentence, logs(tmp_path / "run")[0])


def start_two(program: str, *words: str, devices: tuple[int, int] = (2, 2)) -> list[subprocess.Popen]:
    """Starts two processes of a Python program, which gets its process index, a port, and these arguments."""
    port = str(launched.find_port())
    return [
        subprocess.Popen([sys.executable, "-c", program, str(number), port, *words], cwd=ROOT,
                         env=launched.environment(devices[number]), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                         text=True)
        for number in range(2)
    ]  # fmt: skip


TOOLS = """
import sys
import launch
from imgclf_jax.core import processes
process, port, run, out = int(sys.argv[1]), *sys.argv[2:]
processes.start(f"localhost:{port}", 2, process, heartbeat=30)
flags = [f"--workdir={run}", "--local_devices=all"]
for words in (
    ["train", *flags, "--config.data.source=fake(96, (8, 8, 3), 4)", "--config.preprocess=decode(3)",
     "--config.augment=", "--config.batch_size=32", "--config.model=cnn(widths=(8,), hidden=256)",
     "--config.schedule=constant(1e-3)", "--config.total=4 steps", "--config.mesh=fsdp=-1",
     "--config.gradient=sam(0.05)|pgd(steps=2)"],
    ["evaluate", *flags, f"--predictions={out}/all.csv"], ["evaluate", *flags, "--attack=pgd(eps=0.02)"],
):
    assert launch.main(words) == 0, words
"""


@pytest.mark.thorough
def test_evaluation_runs_in_the_processes_of_its_run(tmp_path, capfd):
    """On a sharded model: the output equals that of one process, and only process 0 prints."""
    run, out = tmp_path / "run", tmp_path / "out"
    out.mkdir()
    started = start_two(TOOLS, str(run), str(out), devices=(3, 1))
    printed = [process.communicate(timeout=400)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0]
    assert printed[1] == ""
    assert launch.main(["evaluate", f"--workdir={run}", "--attack=pgd(eps=0.02)"]) == 0
    line = next(line for line in capfd.readouterr().out.splitlines() if "attacked_accuracy" in line)
    assert line in printed[0]
    assert len((out / "all.csv").read_text().splitlines()) == 1 + 96


@pytest.mark.thorough
def test_hosts_with_different_numbers_of_devices(tmp_path):
    """Three and one give the losses of four in one process, before and after a checkpoint, and skip the same steps."""
    words = (*SHORT, "--config.schedule=constant(1e-3)", "--local_devices=all", "--config.on_bad_step=skip",
             "--config.augment=normalize|launched:poison(((3, 2), (9, 8)))", "--config.total=40 steps",
             "--config.checkpoint_every=20 steps")  # fmt: skip
    launched.finish(tmp_path / "uneven", words, 2, (3, 1))
    rewind(tmp_path / "uneven", 20)
    launched.finish(tmp_path / "uneven", words, 2, (3, 1))
    launched.finish(tmp_path / "even", words, 1, 4)
    for key, count in (("train/loss", 38), ("test/loss", 2), ("test/examples", 2)):
        found, expected = (launched.records(tmp_path / name, key) for name in ("uneven", "even"))
        assert found.keys() == expected.keys()
        assert len(found) == count
        np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=1e-5)
    skipped = [launched.records(tmp_path / name, "train/skipped") for name in ("uneven", "even")]
    assert skipped[0] == skipped[1]
    assert sum(skipped[0].values()) == 2


@pytest.mark.thorough
@pytest.mark.usefixtures("one_device")
def test_a_signal_to_one_stops_both_and_one_process_goes_on(tmp_path):
    workdir = tmp_path / "run"
    started = launched.start(workdir, SHORT, 2, 2)
    metrics = workdir / "metrics.jsonl"
    while started[0].poll() is None and not (metrics.exists() and len(launched.records(workdir, "train/loss")) > 5):
        time.sleep(0.05)
    started[1].send_signal(signal.SIGTERM)
    assert launched.end(started) == [75, 75]
    stopped = [int(re.search(r"stopped at step (\d+), checkpoint saved", log)[1]) for log in logs(workdir)]
    assert stopped[0] == stopped[1] == max(int(f.name) for f in (workdir / "checkpoints").iterdir())
    assert re.search(r"^\S+ \[process 1\] SIGTERM: stopping after this step", logs(workdir)[1], re.MULTILINE)
    assert "  train  " not in logs(workdir)[1]  # process 0 alone says how it goes

    for folder in (workdir, tmp_path / "alone"):  # in this process, on one device
        assert launch.main([f"--workdir={folder}", *SHORT]) == 0
    losses, expected = (launched.records(w, "train/loss") for w in (workdir, tmp_path / "alone"))
    assert losses.keys() == expected.keys() == set(range(1, 301))
    np.testing.assert_allclose(list(losses.values()), list(expected.values()), rtol=1e-5)
    assert launched.records(workdir, "test/examples") == launched.records(tmp_path / "alone", "test/examples")
    assert len(json.loads((workdir / "provenance.json").read_text())["devices"]) == 4  # of those that began it


DIED = "another (task died|process of this run has died)"


@pytest.mark.thorough
@pytest.mark.parametrize(("key", "first", "second", "sentences"), [
    ("model=launched:fails_in_process_1()", (1, -signal.SIGABRT), (1,), (DIED, "error: this host lacks a file")),
    # Before the first step, where the other waits in a barrier, not in a collective operation.
    ("data.sampling=launched:dies_in_process_1", (1, -signal.SIGABRT), (-signal.SIGKILL,), (DIED, "")),
    # By a limit on the size of files, as a full disk would; each waited ten minutes for the other.
    ("data.sampling=launched:writes_little_in_process_0", (1,), (1, -signal.SIGABRT),
     ("error: a checkpoint could not be saved", "")),
])  # fmt: skip
def test_a_process_that_fails_or_dies_ends_the_other(tmp_path, key, first, second, sentences):
    """JAX ends the other, though it waits for nobody."""
    workdir, width = tmp_path / "run", 2048 if "writes" in key else 16
    started = launched.start(workdir, (*SHORT, f"--config.model=mlp(widths=({width},))", f"--config.{key}"), 2)
    statuses = launched.end(started)
    assert statuses[0] in first
    assert statuses[1] in second
    assert all(re.search(sentence, log) for sentence, log in zip(sentences, logs(workdir), strict=True))
    assert "Traceback" not in logs(workdir)[0]


def logs(workdir: Path) -> list[str]:
    return [Path(f"{workdir}.log.{number}").read_text() for number in range(2)]
