"""The web application: what it answers, and what it refuses."""

import asyncio
import io
import json
import re
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

import httpx2 as httpx
import jax
import numpy as np
import pytest
from cases import flags, programs
from fastapi import HTTPException
from fastapi.testclient import TestClient
from PIL import Image

import launch
from imgclf_jax import config as configs
from imgclf_jax.core import tree
from imgclf_jax.tools.serve import app, batcher, limits
from imgclf_jax.tools.serve import command as serve
from imgclf_jax.trained import Trained


@pytest.fixture(scope="module")
def model():
    """A small network with random parameters, as if at step 20."""
    untrained = programs((28, 28, 1), 10, 1, preprocess="decode(1)|resize(28)")
    return Trained(untrained, untrained.init_state(), 20)


@pytest.fixture(scope="module")
def client(model):
    with TestClient(app.build(model, "birds", ("testserver", "localhost", "[::1]"))) as client:
        yield client


def png(seed, side=9):
    content = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(256, size=(side, side), dtype=np.uint8)).save(content, "PNG")
    return content.getvalue()


def form(*images):
    return [("images", (f"{i}.png", image)) for i, image in enumerate(images)]


def test_an_answer_is_what_the_model_predicts(client, model):
    answer = client.post("/predict?top_k=3", files=form(png(0), png(1)))
    assert answer.status_code == 200
    for found, name, expected in zip(answer.json(), ("0.png", "1.png"), model.predict([png(0), png(1)]), strict=True):
        order = np.argsort(-expected, kind="stable")[:3]
        assert found["file"] == name
        assert [p["class"] for p in found["predictions"]] == [str(c) for c in order]
        assert [p["probability"] for p in found["predictions"]] == pytest.approx(expected[order].tolist(), abs=1e-5)


@pytest.mark.thorough
def test_an_explanation_is_of_the_class_that_is_asked_for(client, model):
    [row] = model.predict([png(0)])
    shown = [client.post(f"/explain{query}", files={"image": png(0)}) for query in
             ("", f"?class={row.argmax()}", f"?class={row.argmin()}")]  # fmt: skip
    assert [answer.headers["content-type"] for answer in shown] == ["image/png"] * 3
    assert shown[0].content == shown[1].content != shown[2].content
    assert Image.open(io.BytesIO(shown[0].content)).width > 2 * 28


def bomb():
    """A BMP file of a few bytes that claims 30,000 by 30,000 pixels."""
    content = io.BytesIO()
    Image.new("1", (8, 8)).save(content, "BMP")
    return content.getvalue()[:18] + struct.pack("<ii", 30_000, 30_000) + content.getvalue()[26:]


@pytest.mark.parametrize(("path", "files", "status", "words"), [
    ("/predict", form(b"", png(0), b"garbage"), 422, "; 2.png: the image is in none of the formats"),
    ("/predict", form(png(0)[:50]), 422, "0.png: the image does not decode"),
    ("/predict", form(bomb()), 422, "more than 67,108,864 pixels"),
    ("/predict", {"picture": png(0)}, 422, '{"detail":"images: Field required"}'),
    ("/predict", form(*[b""] * 65), 400, "Too many files"),
    ("/predict", form(bytes(limits.MAX_BODY)), 413, "Too Large"),
    ("/predict?top_k=0", form(png(0)), 422, '{"detail":"top_k: Input should be greater than or equal to 1"}'),
    ("/explain", {"image": b"garbage"}, 422, "in none of the formats"),
    ("/explain?class=Kaffee", {"image": png(0)}, 404, "unknown class 'Kaffee': allowed: 0, 1, 2"),
])  # fmt: skip
def test_a_wrong_request_is_refused_with_a_sentence(client, path, files, status, words):
    answer = client.post(path, files=files)
    assert (answer.status_code, words in answer.text) == (status, True), answer.text
    assert client.post("/predict", files=form(png(0))).status_code == 200


@pytest.mark.parametrize("path", ["/../../etc/passwd", "/%2e%2e/%2e%2e/app.py", "/page/index.html", "/app.py"])
def test_no_file_but_the_pages_is_sent(client, path):
    assert client.get(path).status_code == 404


def test_other_hosts_names_are_refused(client, model):
    """A page of the web that is named as this machine is not answered, and other pages read answers if they are let."""
    assert client.get("/model", headers={"Host": "evil.example"}).status_code == 400
    for host in ("localhost:1", "[::1]:1"):
        assert client.get("/model", headers={"Host": host}).status_code == 200
    asked = {"Origin": "https://a.example"}
    assert "access-control-allow-origin" not in client.get("/model", headers=asked).headers
    let = TestClient(app.build(model, cors=("https://a.example",))).get("/model", headers=asked)
    assert let.headers["access-control-allow-origin"] == "https://a.example"


def test_the_model_is_described(client, model):
    found = client.get("/model").json()
    assert (found["name"], found["step"], found["params_sha256"]) == ("birds", 20, tree.sha256(model.state.params))
    assert {"/predict", "/explain", "/model"} == client.get("/openapi.json").json()["paths"].keys()


@pytest.mark.thorough
def test_parameters_that_hold_nan(model):
    broken = model._replace(state=jax.tree.map(lambda x: x * np.nan if x.dtype == np.float32 else x, model.state))
    with TestClient(app.build(broken)) as client:
        for route, files in (("/predict", form(png(0))), ("/explain", {"image": png(0)})):
            answer = client.post(route, files=files)
            assert answer.status_code == 422
            assert "the model gives NaN" in json.loads(answer.text)["detail"]


def test_images_that_wait_share_a_batch(model, monkeypatch):
    """Each has its own result; one that is cancelled or fails holds up no other. Too many are refused."""
    monkeypatch.setattr(batcher, "_MAX_WAITING", 70)
    made, sizes, compute = batcher.Batcher(model), [], batcher.Batcher._compute
    images = [model.prepare(png(seed)) for seed in range(70)]

    def noted(images):
        sizes.append(len(images))
        if len(sizes) == 1:
            raise RuntimeError("once")
        return compute(made, images)

    made._compute = noted

    async def clients():
        tasks = [asyncio.create_task(made.predict(image)) for image in images]
        await asyncio.sleep(0)
        with pytest.raises(HTTPException, match="503"):
            await made.predict(images[0])
        tasks[-1].cancel()
        running = asyncio.create_task(made.run())
        rows = await asyncio.gather(*tasks, return_exceptions=True)
        rows[:64] = await asyncio.gather(*map(made.predict, images[:64]))
        running.cancel()
        return rows[:-1]

    rows = asyncio.run(clients())
    assert sizes == [64, 6, 64]
    np.testing.assert_allclose(np.array(rows)[:, 0], model.predict([png(n) for n in range(69)]), atol=1e-5)


ROOT = Path(__file__).parents[3]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_says_where_it_is_and_ends_at_a_signal(number, tmp_path):
    assert (
        launch.main(
            [
                *flags("total=2 steps", "preprocess=decode(1)|resize(12)", "model=mlp(widths=(8,))"),
                f"--workdir={tmp_path}",
            ]
        )
        == 0
    )
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


def test_mistakes(model, tmp_path, monkeypatch, capsys):
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
