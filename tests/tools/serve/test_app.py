"""The web application: what a client may do to it, over real connections."""

import asyncio
import concurrent.futures
import contextlib
import io
import json
import socket
import struct
import typing

import httpx
import jax
import numpy as np
import pytest
from PIL import Image
from test_connections import in_thread

from imgclf_jax.config import default_config
from imgclf_jax.core import sharding
from imgclf_jax.programs import Programs
from imgclf_jax.recipe import Recipe
from imgclf_jax.run.provenance import DataInfo
from imgclf_jax.tools.serve import app, bodies, connections, limits
from imgclf_jax.tools.serve import command as serve
from imgclf_jax.trained import Trained

LIMITS = app.Limits(body_bytes=100_000, body_seconds=0.5)


def untrained(data, **keys):
    """A small network for these data, with random parameters, as if at step 20."""
    config = default_config()
    config.update(model="mlp(widths=(8,))", **keys)
    programs = Programs(Recipe(config, data), sharding.make_mesh(jax.devices()[:1]))
    return Trained(programs, programs.init()["state"], 20)


@pytest.fixture(scope="module")
def model():
    data = DataInfo(64, (28, 28, 1), tuple(map(str, range(10))), "-")
    return untrained(data, preprocess="decode(1)|resize(28)")


@pytest.fixture(scope="module")
def port(model):
    with serving(model) as port:
        yield port


@contextlib.contextmanager
def serving(model, limits=LIMITS, **others):
    """The port of a server in a thread of this process."""
    application = app.build(model, limits, ("localhost", "127.0.0.1"), serve.explainer(model), **others)
    with in_thread(connections.server_settings(application, "127.0.0.1", 0)) as port:
        yield port


class Patient(httpx.Client):
    """A client that sends a request again if a busy machine sent it too slowly."""

    def send(self, request, **options):
        for _ in range(5):
            answer = super().send(request, **options)
            if answer.status_code != 408:
                break
        return answer


@pytest.fixture(scope="module")
def client(port):
    with Patient(base_url=f"http://127.0.0.1:{port}", timeout=20) as client:
        yield client


def png(seed):
    content = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(256, size=(9, 9), dtype=np.uint8)).save(content, "PNG")
    return content.getvalue()


def test_an_answer_is_what_the_model_predicts(client, model):
    answer = client.post("/predict", params={"top_k": 3}, content=png(0))
    assert answer.status_code == 200
    [expected] = model.predict(png(0))
    order = np.argsort(-expected, kind="stable")[:3]
    found = answer.json()["predictions"]
    assert [p["class"] for p in found] == [str(c) for c in order]
    assert [p["probability"] for p in found] == pytest.approx(expected[order].tolist(), abs=1e-5)
    assert answer.json()["milliseconds"] > 0


def test_an_explanation_is_a_picture(client):
    """Of the image and of where its class is found; of what is no image there is none."""
    answer = client.post("/explain", content=png(0))
    assert (answer.status_code, answer.headers["content-type"]) == (200, "image/png")
    picture = Image.open(io.BytesIO(answer.content))
    assert picture.width > 2 * 28
    assert np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0).shape[0] > 20
    assert client.post("/explain", content=b"garbage").status_code == 422
    assert client.get("/model").json()["explains"] is True


@pytest.mark.thorough
def test_names_that_are_no_utf_8():
    """The name of a class, and of the run's directory: every answer that has one was an error of the server."""
    shown, others = r"\udcff", tuple(map(str, range(3)))
    data = DataInfo(64, (28, 28, 1), ("\udcff", *others), "-")
    untold = untrained(data, preprocess="decode(1)|resize(28)")
    with serving(untold, name="\udcfe") as port, Patient(base_url=f"http://127.0.0.1:{port}", timeout=20) as client:
        described = client.get("/model").json()
        assert (described["classes"], described["name"]) == ([shown, *others], r"\udcfe")
        assert client.get("/openapi.json").status_code == 200
        found = client.post("/predict", content=png(0)).json()["predictions"]
        assert {one["class"] for one in found} == {shown, *others}
        told = client.post("/explain", params={"class": shown, "format": "json"}, content=png(0))
        assert told.json()["class"] == shown


def test_many_at_once_are_answered_in_batches(client, model):
    """Each with its own image's classes, though the device computes several in one call."""

    def number_of_batches():
        text = client.get("/metrics").text
        return {line.split()[0]: float(line.split()[1]) for line in text.splitlines() if line[0] != "#"}

    images = [png(seed) for seed in range(100)]
    expected = model.predict(images)
    before = number_of_batches()
    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(lambda image: client.post("/predict", content=image), images))
    assert {answer.status_code for answer in answers} == {200}
    for answer, row in zip(answers, expected, strict=True):
        assert answer.json()["predictions"][0]["probability"] == pytest.approx(row.max(), abs=1e-5)
    after = number_of_batches()
    assert after["imgclf_batch_images_sum"] - before["imgclf_batch_images_sum"] == 100
    assert after["imgclf_batch_images_count"] - before["imgclf_batch_images_count"] < 100
    assert (
        after['imgclf_requests_total{route="/predict",status="200"}']
        - before['imgclf_requests_total{route="/predict",status="200"}']
        == 100
    )


def bomb():
    """A BMP file of a few bytes that claims 30,000 by 30,000 pixels."""
    content = io.BytesIO()
    Image.new("1", (8, 8)).save(content, "BMP")
    return content.getvalue()[:18] + struct.pack("<ii", 30_000, 30_000) + content.getvalue()[26:]


def many_scans():
    content = io.BytesIO()
    Image.new("L", (8, 8)).save(content, "JPEG", progressive=True)
    return content.getvalue()[:-2] + b"\xff\xda\0\x02" * 495 + b"\xff\xd9"


@pytest.mark.parametrize(("path", "body", "status", "words"), [
    ("/predict", b"garbage", 422, "in none of the formats"),
    ("/predict", png(0)[:50], 422, "does not decode"),
    ("/predict", bomb(), 422, "more than 67,108,864 pixels"),
    ("/predict", b"", 400, "the body is empty"),
    ("/predict", bytes(100_001), 413, "longer than 100,000 bytes"),
    ("/predict?top_k=0", png(0), 400, "top_k=0"),
    ("/predict?top_k=x", png(0), 400, "top_k=x"),
    ("/predict?top_k=" + "9" * 15_000, png(0), 400, "top_k=9999"),
    ("/predict?top_k=-1", png(0), 400, "top_k=-1"),
    ("/predict?top_k=\u0663", png(0), 400, "top_k="),
    ("/predict", many_scans(), 422, "the JPEG image has 501 scans"),
    ("/../../etc/passwd", b"x", 404, "no such route"),
    ("/predict/%2e%2e/%2e%2e/etc/passwd", b"x", 404, ""),
], ids=["garbage", "cut", "bomb", "empty", "long", "none", "word", "digits", "below zero", "Arabic", "scans",
        "traversal", "coded"])  # fmt: skip
def test_a_wrong_request_is_refused_with_a_sentence(client, path, body, status, words):
    answer = client.post(path, content=body)
    assert (answer.status_code, words in answer.text) == (status, True)
    assert list(answer.json()) == ["error"]
    assert client.post("/predict", content=png(0)).status_code == 200


def test_a_body_of_unknown_length_is_cut_off(client):
    answer = client.post("/predict", content=(bytes(10_000) for _ in range(100)))
    assert (answer.status_code, answer.headers["connection"]) == (413, "close")


def test_a_slow_client_and_one_that_goes(port, client):
    """The former is told so; neither holds up the others."""
    with socket.create_connection(("127.0.0.1", port)) as slow, socket.create_connection(("127.0.0.1", port)) as gone:
        for connection in (slow, gone):
            connection.sendall(b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\nabc")
        gone.close()
        assert client.post("/predict", content=png(1)).status_code == 200
        slow.settimeout(10)
        assert slow.recv(100).startswith(b"HTTP/1.1 408")
    assert client.get("/health").json()["waiting"] == 0


def test_other_hosts_names_are_refused(client):
    """A page of the web that calls itself this machine, by its name server, is not answered."""
    assert client.get("/", headers={"Host": "evil.example"}).status_code == 400
    assert client.get("/", headers={"Host": "localhost:1"}).status_code == 200


def test_a_request_has_one_host(port):
    """RFC 9112, section 3.2: a proxy before this server may read another of two."""
    for lines, status in (("Host: localhost\r\n", b"200"), ("Host: localhost\r\n" * 2, b"400")):
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.settimeout(10)
            connection.sendall(f"GET /health HTTP/1.1\r\n{lines}\r\n".encode())
            assert connection.recv(12).split()[1] == status


@pytest.mark.parametrize(("origin", "status"), [
    ("http://localhost:1", 200), ("https://LOCALHOST:1", 200), ("http://localhost:2", 403), ("http://localhost", 403),
    ("http://evil.example", 403), ("null", 403), ("", 403), ("localhost:1", 403),
])  # fmt: skip
def test_another_sites_page_is_refused(client, origin, status):
    """A browser says whose page sends a request, and sends an image without asking this server first."""
    headers = {"Host": "localhost:1", "Origin": origin}
    answer = client.post("/predict", content=png(0), headers=headers)
    assert answer.status_code == status
    assert ("a page of another site" in answer.text) == (status == 403)
    assert client.get("/health", headers=headers).status_code == status


def test_bodies_take_bounded_memory():
    """One client leaves as much as it takes, large bodies leave room for small ones, and what ends gives it back."""

    class Sent:
        headers: typing.ClassVar = {}

        def __init__(self, parts):
            self.parts = parts

        async def stream(self):
            for _ in range(self.parts):
                yield bytes(10)

    async def read():
        made = bodies.Bodies(app.Limits(small_body_bytes=20, small_bodies_bytes=40, large_bodies_bytes=120))

        async def refused(parts, client):
            with pytest.raises(app.Refused) as error:
                await made.read(Sent(parts), client).__aenter__()
            assert (error.value.status, "large" in error.value.message) == (503, False)

        for _ in range(3):
            async with made.read(Sent(3), "a") as one, made.read(Sent(3), "a") as two:
                assert one.images == two.images == [bytes(30)]
                await refused(3, "a")
                async with made.read(Sent(3), "b"), made.read(Sent(2), "a") as small:
                    assert small.images == [bytes(20)]
                    await refused(3, "c")
                    await refused(1, "a")
                    async with made.read(Sent(1), "c") as small:
                        assert small.images == [bytes(10)]

    asyncio.run(read())


def test_a_request_takes_its_place_when_its_body_is_here(model):
    """Clients that sent none had all places, and others were told that there are too many requests."""
    few = app.Limits(requests=4)
    with serving(model, few) as port, contextlib.ExitStack() as stack:
        for _ in range(few.requests):
            stalled = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
            stalled.sendall(b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\na")
        assert httpx.post(f"http://127.0.0.1:{port}/predict", content=png(1)).status_code == 200


def test_a_client_takes_no_more_than_it_leaves():
    share = limits.Share(8)
    assert [share.take("a", 1) for _ in range(5)] == [True] * 4 + [False]
    assert [share.take("b", 1) for _ in range(3)] == [True] * 2 + [False]
    with share.held("c", 1, ""), pytest.raises(app.Refused, match="busy"), share.held("c", 1, "busy"):
        pass
    share.give_back("b", 2)
    assert share.take("c", 2)


def test_the_page_asks_nobody_else(client):
    for path, kind in (("/", "text/html"), ("/page.css", "text/css"), ("/page.js", "text/javascript")):
        answer = client.get(path)
        assert answer.headers["content-type"].startswith(kind)
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert "http" not in answer.text


def test_the_interface_is_described(client, model):
    found = client.get("/openapi.json").json()
    assert found["openapi"] == "3.1.0"
    assert set(found["paths"]) == {"/predict", "/explain", "/model", "/health", "/metrics"}
    for path, methods in found["paths"].items():
        for method in methods:
            assert client.request(method, path).status_code in (200, 400)
    answers = found["paths"]["/predict"]["post"]["responses"]
    one, several = answers["200"]["content"]["application/json"]["schema"]["oneOf"]
    assert set(one["required"]) == set(client.post("/predict", content=png(0)).json())
    assert set(several["required"]) == set(client.post("/predict", files={"images": png(0)}).json())
    assert {"400", "408", "413", "422", "503"} < set(answers)
    assert json.dumps(list(model.class_names)) in json.dumps(found)
