"""Every method and gradient function, and a user's own, keep the promises of a run, by `methods_check.py`."""

import pytest
from cases import thorough
from methods_check import SPECS, Check

VARIANTS = {
    "": {},
    "accumulate": {"num_seeds": "2", "accumulate": "2", "model": "mlp(widths=(8,))"},
    "sharded": {"mesh": "fsdp=-1", "precision": "bfloat16", "model": "mlp(widths=(128, 128))"},
}
VARIED = ("pgd|sam", "distill", "simclr", "fixmatch", "mean_teacher", "lora", "own")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    Check("supervised", folder, folder).train(folder / "run", model="resnet_cifar(8)")
    return folder / "run"


@pytest.mark.optimized
@pytest.mark.thorough
@pytest.mark.parametrize(("name", "variant"), [
    (name, variant) for name in SPECS for variant in VARIANTS if not variant or name in VARIED
])  # fmt: skip
def test_cadences_placement_and_a_resume_change_no_bit(name, variant, tmp_path, teacher):
    Check(name, tmp_path, teacher).ways(**VARIANTS[variant])


@pytest.mark.thorough
@pytest.mark.parametrize("name", SPECS)
def test_three_seeds_in_one_program_are_three_runs(name, tmp_path, teacher):
    Check(name, tmp_path, teacher).seeds()


TOOLS = thorough("fixmatch", "mean_teacher", "lora", "own")


@pytest.mark.parametrize("name", [*TOOLS, *(pytest.param(x, marks=pytest.mark.slow) for x in SPECS)])
def test_every_command_reads_the_run(name, tmp_path, teacher):
    """Without a head some commands refuse, in one sentence."""
    statuses = Check(name, tmp_path, teacher).tools()
    assert name in ("simclr", "supcon") or set(statuses.values()) == {0}, statuses


@pytest.mark.slow
@pytest.mark.parametrize("check", ["killed", "devices", "reproduce"])
@pytest.mark.parametrize("name", SPECS)
def test_kills_devices_and_reproduction(name, check, tmp_path, teacher):
    getattr(Check(name, tmp_path, teacher), check)()
