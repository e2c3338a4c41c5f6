"""Distillation through the commands: resuming, teachers that do not fit, and where the teacher's arrays are."""

import json
import shutil

import jax
import numpy as np
import pytest
from stepped import FLAGS

import launch
from imgclf_jax import config, datasets, programs
from imgclf_jax.data import sources
from imgclf_jax.trained import load_teacher

LEARN = "--config.method=distill('{}')"


def train(workdir, *flags, model="mlp(widths=(8,))"):
    return launch.main([f"--workdir={workdir}", f"--config.model={model}", *FLAGS, *flags])


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("teacher") / "run"
    assert train(workdir, model="mlp(widths=(256,))") == 0  # smaller arrays are not sharded
    return workdir


def digest(workdir):
    return json.loads((workdir / "result.json").read_text())["params_sha256"]


@pytest.mark.thorough
def test_a_student_resumes_to_the_same_bits_and_needs_no_teacher_afterwards(teacher, tmp_path, capsys):
    own, student = tmp_path / "teacher", tmp_path / "student"
    shutil.copytree(teacher, own)
    method = LEARN.format(own)
    assert train(student, method) == 0
    whole = digest(student)
    for step in ("resumed", "refused"):
        shutil.rmtree(student / "checkpoints" / "4")
        (student / "result.json").unlink()
        if step == "resumed":
            assert train(student, method) == 0
            assert digest(student) == whole
    shutil.rmtree(own / "checkpoints" / "4")  # another teacher in its place: that of step 2
    assert train(student, method) == 1
    assert "holds a run on other data or weights: fixed_sha256 was" in capsys.readouterr().err
    shutil.rmtree(own)
    assert launch.main(["evaluate", f"--workdir={student}"]) == 0


@pytest.mark.parametrize(("flags", "words"), [
    (("--config.preprocess=decode(1)|resize(6)",), "give both the same preprocess"),
    (("--config.augment=normalize(mean=(0.1,), std=(0.5,))",), "images with normalize, and"),
    (("--config.method=distill('{}', alpha=2.0)",), "alpha must be 0 to 1"),
])  # fmt: skip
def test_a_teacher_that_does_not_fit_is_refused_in_one_sentence(teacher, tmp_path, capsys, flags, words):
    assert train(tmp_path / "run", LEARN.format(teacher), *(flag.format(teacher) for flag in flags)) == 1
    said = capsys.readouterr().err
    assert words in said
    assert "method" in said


def test_the_fixed_arrays_are_an_argument_of_the_program_and_sharded(teacher):
    c = config.load_file("configs/digits.py")
    for flag in (*FLAGS, LEARN.format(teacher), "--config.model=mlp(widths=(8,))", "--config.mesh=data=1, fsdp=8"):
        key, _, value = flag.removeprefix("--config.").partition("=")
        c.update_from_flattened_dict({key: value if key not in ("batch_size", "tensorboard") else eval(value)})
    source = sources.take_split(datasets.open_data(c), c.data.train)
    built = programs.programs_for_images(c, datasets.open_train_images(c, {"train": source}), load=load_teacher)
    _ = built.traced_train
    assert "fixed" not in vars(built)  # so that it compiles for devices that hold no arrays
    kernels = [x for x in jax.tree.leaves(built.fixed) if x.shape == (64, 256)]
    assert [x.addressable_shards[0].data.shape for x in kernels] == [(64, 32)]
    assert not [x for x in built.traced_train.jaxpr.consts if np.size(x) > 100]
