"""Work directories in buckets, on a server with the S3 API."""

import json
from pathlib import Path

import pytest
from cases import flags

import launch
from imgclf_jax.core import extras, paths
from imgclf_jax.core.errors import UserError
from imgclf_jax.run.writers import TIMES, read_metrics

RUN = flags("data.source=fake(64, (8, 8, 1), 4)", "log_every=2 steps", "data.eval.test=test[:10]")


@pytest.fixture(scope="module")
def bucket():
    """The address of an empty bucket."""
    import boto3
    from moto.server import ThreadedMotoServer

    running = ThreadedMotoServer(port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION", "AWS_REGION"):
            patch.setenv(name, "us-east-1")  # the server takes anything for a key
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        boto3.client("s3").create_bucket(Bucket="runs")
        yield "s3://runs"
    running.stop()


def test_a_path_in_a_bucket_is_as_one_on_a_disk(bucket):
    folder = paths.as_path(f"{bucket}/a")
    (folder / "b" / "c.txt").write_bytes("é".encode())
    assert paths.in_bucket(folder)
    assert not paths.in_bucket(Path("gs"))
    assert {name: path.read_bytes() for name, path in paths.files(folder)} == {"b/c.txt": "é".encode()}
    paths.move(folder / "b", folder / "d")
    assert [name for name, _ in paths.files(folder)] == ["d/c.txt"]
    paths.remove(folder / "d")
    assert not (folder / "d").exists()


@pytest.mark.parametrize("text", ["s3://", "http://host/x"])
def test_other_addresses_are_refused(text):
    with pytest.raises(UserError, match=r"is not a path; allowed are a path, gs://BUCKET/PATH or s3"):
        paths.as_path(text)


def test_a_driver_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(extras, "_installed", lambda _: False)
    with pytest.raises(UserError, match=r"needs gcsfs, which is not installed.*uv run --extra buckets"):
        paths.as_path("gs://bucket/x")


@pytest.mark.thorough
def test_a_run_in_a_bucket_is_that_on_a_disk(bucket, tmp_path, capsys, printed, caplog, monkeypatch):
    """Trained in two parts, evaluated, and used as weights; it writes nothing to this disk."""
    monkeypatch.chdir(tmp_path)
    place = f"{bucket}/lr 0.1"
    assert launch.main([f"--workdir={tmp_path / 'disk'}", *RUN]) == 0
    assert launch.main([f"--workdir={place}", *RUN]) == 0
    assert "is in a bucket, which cannot be locked" in capsys.readouterr().err + caplog.text
    disk, ours = tmp_path / "disk", paths.as_path(place)

    def digest(folder):
        return json.loads((folder / "result.json").read_bytes())["params_sha256"]

    records = [
        [{k: v for k, v in record.items() if k not in TIMES} for record in read_metrics(folder / "metrics.jsonl")]
        for folder in (disk, ours)
    ]
    assert records[0] == records[1]
    assert digest(ours) == digest(disk)
    # A file is lost, the results too: it goes on from the checkpoint before, to the same end.
    lost = next(path for name, path in paths.files(ours / "checkpoints" / "12") if "/d/" in name)
    lost.unlink()
    (ours / "result.json").unlink()
    assert launch.main([f"--workdir={place}", *RUN]) == 0
    said = capsys.readouterr().err + caplog.text
    assert "is missing; it was moved to" in said
    assert "TensorBoard failed" not in said
    assert digest(ours) == digest(disk)

    assert json.loads(printed("evaluate", f"--workdir={place}", "--format=json"))["step"] == 12
    assert launch.main([f"--workdir={tmp_path / 'next'}", *RUN, f"--config.init_from={place}"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "next"]


@pytest.mark.thorough
def test_what_a_bucket_cannot_do_is_said(bucket, capsys):
    assert launch.main([f"--workdir={bucket}/lr=[0.1]", *RUN]) == 1
    assert "has one of *, ?, [ and" in capsys.readouterr().err
    assert launch.main([f"--workdir={bucket}/traced", *RUN, "--profile=2:4"]) == 1
    assert "--profile writes to a disk, and s3://runs/traced is in a bucket" in capsys.readouterr().err
