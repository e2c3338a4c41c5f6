"""The command `serve` as a process: it starts, answers many clients, and ends cleanly."""

import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx2 as httpx
import pytest
from fastapi.testclient import TestClient
from test_app import form, model, png  # noqa: F401  the former is a fixture

import launch
from imgclf_jax import config as configs
from imgclf_jax.tools.serve import command as serve

ROOT = Path(__file__).parents[3]
FLAGS = ["--config.data.source=fake(64, (8, 8, 1), 4)", "--config.preprocess=decode(1)|resize(8)",
         "--config.total=2 steps", "--config.model=mlp(widths=(8,))", "--config.schedule=constant(1e-2)",
         "--config.batch_size=16", "--config.eval_every="]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_says_where_it_is_and_ends_at_a_signal(number, tmp_path):
    assert launch.main([*FLAGS, f"--workdir={tmp_path}"]) == 0
    command = [sys.executable, "launch.py", "serve", f"--workdir={tmp_path}", "--port=0"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        line = process.stdout.readline()
        where = re.fullmatch(
            r"serving step 2 of mlp\(widths=\(8,\)\) at (http://127\.0\.0\.1:\d+); press Ctrl-C to stop\n", line
        )
        assert where, line
        assert httpx.post(f"{where[1]}/predict", files=form(png(0))).status_code == 200
        with httpx.Client() as client:  # no answer waits for the client's delayed acknowledgment, of 40 ms
            begun = time.monotonic()
            for _ in range(40):
                client.get(f"{where[1]}/model")
            assert time.monotonic() - begun < 1
        process.send_signal(number)
        assert process.wait(10) == 128 + number


def test_mistakes(model, tmp_path, monkeypatch, capsys):  # noqa: F811
    (tmp_path / "config.json").write_text(configs.to_json(model.config))
    monkeypatch.setattr(serve, "load_trained", lambda *_: model)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert launch.main(["serve", f"--workdir={tmp_path}", f"--port={port}"]) == 1
    said = capsys.readouterr().err
    assert f"serve: cannot listen on 127.0.0.1:{port} (Address already in use); pass" in said
    assert (said.count("in use"), said.count("Errno")) == (1, 0)
    asked = []
    monkeypatch.setattr("uvicorn.Server.run", lambda self, sockets: asked.append(TestClient(self.config.app)))
    assert launch.main(["serve", f"--workdir={tmp_path}", "--port=0"]) == 0
    for host, status in (("localhost", 200), ("evil.example", 400)):  # whose name resolves to this machine
        assert asked[0].get("/", headers={"Host": host}).status_code == status
