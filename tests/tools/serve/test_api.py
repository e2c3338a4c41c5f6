"""What programs send to the server and get from it: forms, JSON, several images, parameters, and other sites' pages."""

import base64
import io
import json
import time

import httpx
import numpy as np
import pytest
from PIL import Image
from test_app import client, model, png, port, serving  # noqa: F401  fixtures

import imgclf_jax
from imgclf_jax.core.errors import UserError
from imgclf_jax.tools.serve import bodies, request_log
from imgclf_jax.tools.serve.limits import Refused

BOUNDARY = "multipart/form-data; boundary=x"


def text(seed):
    return base64.b64encode(png(seed)).decode()


def first(answer):
    """The first class of each image, which may differ in its last digit in a batch of another size."""
    best = [one["predictions"][0] for one in answer.get("images", [answer])]
    return [one | {"probability": pytest.approx(one["probability"], rel=1e-5)} for one in best]


def test_forms_and_json_hold_the_images_that_a_body_does(client):  # noqa: F811
    """The same image has the same answer in each form; a list has one each, in order."""

    def post(**body):
        answer = client.post("/predict?topk=2", **body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    one, two = (post(content=png(seed)) for seed in (1, 2))
    assert len(one["predictions"]) == 2
    wrapped = base64.encodebytes(png(1)).decode()
    for body in (
        {"files": {"image": ("a.png", png(1))}},
        {"files": {"anything": png(1)}},
        {"json": {"image": text(1)}},
        {"json": {"image": f"data:image/png;base64,{text(1)}"}},
        {"content": json.dumps({"image": wrapped})},  # as curl's --data sends it: as a form, by its Content-Type
    ):
        answer = post(**body)
        assert (answer.keys(), first(answer)) == (one.keys(), first(one))
    for body in ({"files": [("images", png(1)), ("images", png(2))]}, {"files": {"a": png(1), "b": png(2)}},
                 {"json": {"images": [text(1), text(2)]}}):  # fmt: skip
        assert first(post(**body)) == first(one) + first(two)
    for body in ({"files": {"images": png(2)}}, {"json": {"images": [text(2)]}}):
        answer = post(**body)
        assert (list(answer), first(answer)) == (["images", "milliseconds"], first(two))


@pytest.mark.parametrize(("path", "body", "status", "words"), [
    ("/predict", {"files": [("images", png(0)), ("images", ("b.txt", b"garbage"))]}, 422, "image 2 of 2, 'b.txt'"),
    ("/predict", {"json": {"images": [text(0), text(0)[:40], text(0)]}}, 422, "image 2 of 3, 'images[1]'"),
    ("/predict", {"files": [("images", png(0))] * 65}, 413, "more than 64 images"),
    ("/predict", {"json": {"images": [text(0)] * 65}}, 413, "65 images"),
    ("/predict", {"content": b"--x\r\n", "headers": {"Content-Type": BOUNDARY}}, 400, "before its last boundary"),
    ("/predict", {"content": b"--y\r\n", "headers": {"Content-Type": BOUNDARY}}, 400, "not multipart/form-data"),
    ("/predict", {"content": b"--x--", "headers": {"Content-Type": BOUNDARY}}, 400, "the form has no image"),
    ("/predict", {"content": b"x", "headers": {"Content-Type": "multipart/form-data"}}, 400, "with a boundary"),
    ("/predict", {"content": b"x", "headers": {"Content-Type": "multipart/mixed; boundary=x"}}, 400, "multipart/mixed"),
    ("/predict", {"content": b"x", "headers": {"Content-Type": BOUNDARY + 300 * "x"}}, 400, "length 301 exceeds"),
    ("/predict", {"json": {"picture": text(0)}}, 400, '{"image": "<base64>"}'),
    ("/predict", {"json": {"image": "!"}}, 400, "image is not base64"),
    ("/predict", {"json": {"image": 3}}, 400, "image is not base64"),
    ("/predict", {"json": {"images": []}}, 400, "there are no images"),
    ("/predict", {"json": {"images": [[text(0)]]}}, 400, "images[0] is not base64"),
    ("/predict", {"content": b'{"image": '}, 400, "the body is not JSON"),
    ("/predict", {"content": b'{"image": ' + b"[" * 90_000}, 413, "more than 64 values"),
    ("/predict", {"content": b'{"image": "\xff"}'}, 400, "the body is not JSON"),
    ("/predict?top=3", {"content": png(0)}, 400, "unknown parameter 'top': did you mean 'topk' or 'top_k'?"),
    ("/predict?top_k=3&topk=2", {"content": png(0)}, 400, "once"),
    ("/predict?class=3", {"content": png(0)}, 400, "unknown parameter 'class'"),
    ("/explain?class=Kaffee", {"content": png(0)}, 404, "unknown class 'Kaffee': allowed: 0, 1, 2"),
    ("/explain?class=" + "x" * 15_000, {"content": png(0)}, 404, "unknown class 'xxx"),
    ("/explain?format=gif", {"content": png(0)}, 400, "unknown format 'gif'"),
    ("/explain", {"files": {"a": png(0), "b": png(1)}}, 400, "/explain takes one"),
])  # fmt: skip
def test_what_is_wrong_is_said(client, path, body, status, words):  # noqa: F811
    answer = client.post(path, **body)
    assert (answer.status_code, list(answer.json())) == (status, ["error"])
    assert words in answer.json()["error"]


def test_no_such_route_and_no_such_method(client):  # noqa: F811
    answer = client.get("/models")
    assert answer.status_code == 404
    assert answer.json()["error"].startswith("/models: no such route; the routes are /predict, /,")
    answer = client.get("/predict")
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
    assert answer.json() == {"error": "GET /predict: this route takes POST"}


def test_a_request_takes_as_many_places_as_it_has_images(model):  # noqa: F811
    limits = bodies.Limits(requests=8)
    with serving(model, limits) as where:
        for number, status in ((4, 200), (5, 503), (4, 200)):
            answer = httpx.post(f"http://127.0.0.1:{where}/predict", files=[("images", png(0))] * number)
            assert answer.status_code == status


@pytest.mark.thorough
def test_an_explanation_is_of_the_class_that_is_asked_for(client, model):  # noqa: F811
    """As JSON: the image as the model gets it, and the colors of its heatmap, of the same size."""
    size = model.programs.recipe.data.image_shape[:2]
    [row] = model.predict([png(0)])
    found = {}
    for name in ("", "3", "8"):
        answer = client.post("/explain", params={"class": name, "format": "json"}, content=png(0)).json()
        label = int(name or row.argmax())
        assert (answer["class"], answer["probability"]) == (str(label), pytest.approx(float(row[label]), abs=1e-6))
        layers = [Image.open(io.BytesIO(base64.b64decode(answer[key].partition(",")[2]))) for key in
                  ("image", "heatmap")]  # fmt: skip
        assert {layer.size for layer in layers} == {size[::-1]} == {(answer["width"], answer["height"])}
        assert np.array_equal(np.asarray(layers[0].convert("L")), model.prepare(png(0))[..., 0])
        assert answer["lowest"] <= answer["highest"]
        found[answer["class"]] = answer["heatmap"]
    assert len(set(found.values())) == len(found)
    pictures = [client.post(f"/explain{query}", content=png(0)).content for query in ("", f"?class={row.argmax()}")]
    assert pictures[0] == pictures[1] != client.post(f"/explain?class={row.argmin()}", content=png(0)).content


def test_the_model_is_described(model):  # noqa: F811
    with serving(model, name="birds") as where:
        found = httpx.get(f"http://127.0.0.1:{where}/model").json()
    height, width, channels = model.programs.recipe.data.image_shape
    assert found["input"] | {"preprocess": ""} == {"height": height, "width": width, "channels": channels,
                                                   "preprocess": ""}  # fmt: skip
    assert (found["name"], found["classes"]) == ("birds", [*map(str, range(10))])
    assert (found["version"], found["step"]) == (imgclf_jax.__version__, 20)
    assert found["params_sha256"] == model.params_sha256


def test_other_pages_may_ask_where_they_are_let(model):  # noqa: F811
    """By default none may; with --cors a page reads the answer, and its browser may ask before."""
    page = {"Origin": "https://a.example"}
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
    for cors, allowed in (((), None), (("https://a.example",), "https://a.example"), (("*",), "*"),
                          (("https://b.example",), None)):  # fmt: skip
        with serving(model, cors=cors) as where:
            url = f"http://127.0.0.1:{where}/predict"
            answer = httpx.post(url, content=png(0), headers=page)
            assert answer.headers.get("access-control-allow-origin") == allowed
            assert answer.status_code == (200 if allowed else 403)
            before = httpx.options(url, headers=page | asked)
            assert before.headers.get("access-control-allow-origin") == allowed
            assert before.is_success == bool(allowed)


def test_requests_are_logged(model, tmp_path):  # noqa: F811
    """One line each, whatever their names hold; the file does not grow without end."""
    file = tmp_path / "requests.jsonl"
    with request_log.open_log(str(file)) as write, serving(model, request_log=write) as where:
        url = f"http://127.0.0.1:{where}"
        httpx.post(f"{url}/predict?top_k=2", files=[("images", png(0))] * 3)
        httpx.get(f"{url}/a%0Ab{'c' * 1000}")
        httpx.get(url, headers={"Host": "evil.example"})
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(line["method"], line["status"], line["images"]) for line in lines] == [
        ("POST", 200, 3), ("GET", 404, 0), ("GET", 400, 0)]  # fmt: skip
    assert lines[0]["target"] == "/predict?top_k=2"
    assert lines[0]["client"] == "127.0.0.1"
    assert lines[0]["milliseconds"] > 0
    assert len(lines[1]["target"]) == 200
    with pytest.raises(UserError, match=r"--request_log=.*no/file"):
        request_log.open_log(str(tmp_path / "no" / "file")).__enter__()
    for file, said in (("~nobody-here/log", "knows no home directory '~nobody-here'"), ("gs://b/log", "")):
        with pytest.raises(UserError, match=said or "bucket"):
            request_log.open_log(file).__enter__()


def test_forms_that_are_made_to_be_slow():
    """Beginnings of boundaries, headers without end and thousands of empty parts: none holds the server up for long."""
    for body in (b"\r\n--" * 250_000, b"\r\n--xx" * 160_000, b"a" * 1_000_000):
        form = bodies._form(BOUNDARY, 64)
        form.write(b"--x\r\nContent-Disposition: form-data; name=a\r\n\r\n")
        begun = time.process_time()
        for start in range(0, len(body), 65_536):
            form.write(body[start : start + 65_536])
        assert time.process_time() - begun < 2
        form.write(b"\r\n--x--\r\n")
        assert form.finish().images == [body]
    for body in (b"--x\r\n" + b"a: b\r\n" * 100_000, b"--x\r\na: " + b"b" * 1_000_000,
                 b"--x\r\n\r\n" + b"\r\n--x\r\n\r\n" * 100_000):  # fmt: skip
        with pytest.raises(Refused):
            bodies._form(BOUNDARY, 64).write(body)
