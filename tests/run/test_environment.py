"""The settings of a process before JAX is imported, and the facts that it shares with other processes."""

import json
import os

import jax
import pytest

from imgclf_jax import config as configs
from imgclf_jax.core.errors import UserError
from imgclf_jax.data.source import DataInfo
from imgclf_jax.run import provenance
from imgclf_jax.run.provenance import processor, take_snapshot
from imgclf_jax.run.workdir import Workdir


def test_what_processes_must_have_in_common(monkeypatch):
    """Everything that may change a result, but not where they cache and dump, or which devices they use."""
    import flax  # noqa: F401  (packages are named once they are imported)

    monkeypatch.setenv("XLA_FLAGS", "--xla_b=1 --xla_dump_to=/tmp/process-0 --xla_a=2")
    found = provenance.process_facts()
    assert found["XLA_FLAGS"] == "--xla_a=2 --xla_b=1"
    assert {"python", "jax", "jaxlib", "numpy", "flax", "the code of imgclf_jax", "NVIDIA_TF32_OVERRIDE",
            "jax_enable_x64", "jax_default_matmul_precision", "jax_default_prng_impl"} <= found.keys()  # fmt: skip
    assert not {"jax_compilation_cache_dir", "jax_cuda_visible_devices", "jax_num_cpu_devices"} & found.keys()


@pytest.mark.parametrize(
    ("flags", "kind"),
    [("fpu avx2 avx512f", "cpu: cpu with AVX-512"), ("fpu avx2", "cpu: cpu with AVX2"), ("asimd", "cpu: cpu")],
)
def test_processors_that_compile_other_programs_are_of_another_kind(flags, kind, monkeypatch):
    monkeypatch.setattr("imgclf_jax.core.machine.cpu_flags", lambda: frozenset(flags.split()))
    assert provenance.device_facts(counted=False) == {"devices of kind": kind}


def test_where_a_run_goes_on(monkeypatch):
    """Devices, processes and flags sum in another order or round otherwise. Logs, dumps and caches change no bit."""
    names = [name for name in os.environ if name.startswith("JAX_")]
    for name in (*names, "LIBTPU_INIT_ARGS", "NVIDIA_TF32_OVERRIDE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XLA_FLAGS", "")

    def snapshot():
        taken = provenance.take_snapshot({}, DataInfo(1, (1, 1, 1), ("x",), "f"))
        return json.loads(json.dumps(taken))

    began = snapshot()
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=/tmp/x --xla_force_host_platform_device_count=9")
    for name in ("JAX_LOG_COMPILES", "JAX_LOGGING_LEVEL", "JAX_EXPLAIN_CACHE_MISSES", "JAX_PLATFORMS",
                 "JAX_PROCESS_ID", "JAX_COORDINATOR_ADDRESS", "JAX_NUM_CPU_DEVICES"):  # fmt: skip
        monkeypatch.setenv(name, "1")
    assert provenance.find_differences(began, snapshot()) == []

    devices = jax.devices()
    monkeypatch.setattr(jax, "devices", lambda: devices * 4)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setenv("XLA_FLAGS", "--xla_b=2 --xla_a=1")
    monkeypatch.setenv("JAX_DEFAULT_MATMUL_PRECISION", "bfloat16")
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    count, kind = len(devices), f"cpu: {devices[0].device_kind}"
    assert [tuple(one) for one in provenance.find_differences(began, snapshot())] == [
        ("device", "devices", f"{count}: {kind}", f"{4 * count}: {kind}"),
        ("device", "processes", "1", "2"),
        ("flags", "flags.XLA_FLAGS", "not set", "--xla_a=1 --xla_b=2"),
        ("flags", "flags.JAX options", "not set", "JAX_DEFAULT_MATMUL_PRECISION=bfloat16"),
        ("flags", "flags.NVIDIA_TF32_OVERRIDE", "not set", "0"),
    ]


WHOLE = {
    "git": {"commit": "1" * 40, "changed": False}, "code": "a" * 64,
    "modules": {"my_nets.py": "c" * 64, "gone.py": "g"},
    "data": {"fingerprint": "f" * 64, "train_examples": 5, "class_names": ["x"], "extra": {"u": {"fingerprint": "1"}}},
    "evals": {"test": "t"}, "packages": {"jax": "0.12", "zlib-ng": "1"},
}  # fmt: skip


@pytest.mark.parametrize(("change", "expected"), [
    ({}, []),
    ({"command": ["x"], "started": "later", "git": {"commit": "2" * 40}, "new": 5}, []),  # the files are the same
    ({"modules": {"my_nets.py": "b" * 64, "new.py": "n"}, "packages": {"jax": "0.12", "new": "1"}},
     [("code", "modules.my_nets.py", "c" * 16 + "…", "b" * 16 + "…")]),
    ({"code": "b" * 64, "git": {"commit": "2" * 40, "changed": True}},
     [("code", "code", "a" * 16 + "…", "b" * 16 + "…"), ("code", "git.commit", "1" * 12, "2" * 12 + ", changed")]),
    ({"packages": {"jax": "0.11", "zlib-ng": "2"}, "evals": {"test": "u"}},
     [("data", "evals.test", "t", "u"), ("version", "packages.jax", "0.12", "0.11"),
      ("version", "packages.zlib-ng", "1", "2")]),
    ({"data": {"class_names": ["x", "y"], "extra": {"u": {"fingerprint": "2"}}}},
     [("data", "data.class_names", "1: x", "2: x, y"), ("data", "data.extra.u.fingerprint", "1", "2")]),
])  # fmt: skip
def test_how_two_snapshots_differ(change, expected):
    assert [tuple(one) for one in provenance.find_differences(WHOLE, WHOLE | change)] == expected


@pytest.mark.parametrize("damaged", [3, [3], [{"step": "4"}], [{}], [{"step": 4, "resumed": [{"step": 5}], "git": 3}]])
def test_entries_that_no_run_writes_are_left_out(damaged):
    recorded = WHOLE | {"resumed": damaged, "devices": -1e28, "git": {"commit": -1e28}}
    first, *later = provenance.snapshots(recorded)
    assert first == {name: value for name, value in WHOLE.items() if name != "git"}
    assert later in ([], [{"step": 4}])
    assert provenance.snapshots({}) == []


def test_a_run_that_resumes_elsewhere_says_so_once(tmp_path, caplog):
    """provenance.json has a snapshot for each start. One that saved no checkpoint leaves none."""
    workdir, config = Workdir(tmp_path), configs.to_json(configs.default_config())
    here = take_snapshot({}, DataInfo(8, (1, 1, 1), ("x",), "f"))
    workdir.record(config, here | {"processor": "Xeon", "init_from": {"sha256": "s"}}, 0)
    assert not caplog.text
    workdir.record(config, here, 5)
    told = f"changed since the run began, in effect from step 5 on: processor was Xeon, here it is {processor()}"
    assert told in caplog.text
    caplog.clear()
    workdir.record(config, here, 9)  # on the same one
    assert not caplog.text
    assert [(one["step"], one["processor"], one["init_from"]) for one in workdir.read_snapshots()] == [
        (0, "Xeon", {"sha256": "s"}), (5, processor(), {"sha256": "s"}), (9, processor(), {"sha256": "s"})]  # fmt: skip
    workdir.record(config, here, 4)
    assert [one["step"] for one in workdir.read_snapshots()] == [0, 4]
    workdir.record(config, here, 0)
    assert [one["step"] for one in workdir.read_snapshots()] == [0]


@pytest.mark.parametrize(("change", "said"), [
    ({"data": DataInfo(8, (1, 1, 1), ("x",), "g")}, "data.fingerprint was f, here it is g"),
    ({"evals": {"test": "b"}}, "evals.test was a, here it is b"),
    ({"unreadable": ["b.png"]}, "unreadable was 0: , here it is 1: b.png"),
    ({"init_from": {"sha256": "b", "path": "elsewhere"}}, "init_from.sha256 was a, here it is b"),
    ({"fixed_sha256": "b"}, "fixed_sha256 was a, here it is b"),
])  # fmt: skip
def test_other_data_or_weights_are_refused(tmp_path, change, said):
    workdir, config = Workdir(tmp_path), configs.to_json(configs.default_config())
    further = {"evals": {"test": "a"}, "unreadable": [], "fixed_sha256": "a", "init_from": {"sha256": "a", "path": "x"}}
    data = DataInfo(8, (1, 1, 1), ("x",), "f")
    workdir.record(config, take_snapshot({}, data, **further), 0)
    workdir.check_snapshot(take_snapshot({}, data, **further | {"init_from": {"sha256": "a", "path": "elsewhere"}}))
    with pytest.raises(UserError, match=f"holds a run on other data or weights: {said}; restore them, or pass another"):
        workdir.check_snapshot(take_snapshot({}, change.pop("data", data), **further | change))
    workdir.config.unlink()  # a kill left provenance.json alone: the run has not begun
    workdir.check_snapshot(take_snapshot({}, DataInfo(8, (1, 1, 1), ("x",), "g")))


def test_a_run_does_not_depend_on_the_tools_code_and_processes_compare_it(tmp_path, monkeypatch):
    """`evaluate` runs in several processes: they must have its code."""
    for file in ("run/provenance.py", "tools/evaluate/command.py"):
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).write_text("x = 1")
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "run" / "provenance.py"))

    def digests():
        return take_snapshot({}, DataInfo(1, (2, 2, 1), ("a",), ""))["code"], provenance.process_facts()[
            "the code of imgclf_jax"
        ]

    recorded, compared = digests()
    (tmp_path / "tools/evaluate/command.py").write_text("x = 2")
    assert digests()[0] == recorded
    assert digests()[1] != compared
    (tmp_path / "run/provenance.py").write_text("x = 2")
    assert digests()[0] != recorded
