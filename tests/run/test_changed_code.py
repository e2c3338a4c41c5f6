"""What commands on a run say about the user's modules that have changed since it was trained."""

import pytest

from imgclf_jax import config as configs
from imgclf_jax.core.errors import UserError
from imgclf_jax.data.info import DataInfo
from imgclf_jax.run.provenance import processor, take_snapshot
from imgclf_jax.run.workdir import Workdir


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
