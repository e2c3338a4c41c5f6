"""The web application: a page for people, `POST /predict` and `POST /explain` for programs, and their docs at /docs."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypedDict

import jax
import numpy as np
from fastapi import FastAPI, File, HTTPException, Query, Request, Response, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.staticfiles import StaticFiles
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

from imgclf_jax import __version__
from imgclf_jax.core import tree
from imgclf_jax.core.errors import UserError, unknown
from imgclf_jax.core.text import decimals, escape_surrogates
from imgclf_jax.core.typing import JsonObject
from imgclf_jax.tools.explain import explanations
from imgclf_jax.tools.serve.batcher import Batcher
from imgclf_jax.tools.serve.decoding import Decoder
from imgclf_jax.tools.serve.limits import MAX_BODY, BoundedBodies
from imgclf_jax.trained import NOT_FINITE, Trained, is_finite

log = logging.getLogger(__name__)

MAX_IMAGES = 64  # of a request

Prediction = TypedDict("Prediction", {"class": str, "probability": float})
Explainer = Callable[[bytes, int | None], bytes]


class Answer(TypedDict):
    """The classes of one image, the most likely first."""

    file: str
    predictions: list[Prediction]


def build(model: Trained, name: str = "", hosts: Sequence[str] = ("*",), cors: Sequence[str] = ()) -> FastAPI:
    """Builds the application and compiles the model's programs.

    - `name` is what the page and /model call the model.
    - `hosts` are the only host names that it answers to.
    - `cors` are the origins, such as "https://a.example", whose pages may read its answers; "*" allows any.
    """
    batcher, decoder, draw = Batcher(model), Decoder(), make_explainer(model)
    class_names = list(map(escape_surrogates, model.class_names))
    height, width, channels = model.programs.recipe.data.image_shape

    @contextlib.asynccontextmanager
    async def running(app: FastAPI) -> AsyncIterator[None]:
        task = asyncio.create_task(batcher.run())
        yield
        task.cancel()
        decoder.close()

    app = FastAPI(
        title="imgclf_jax serve", version=__version__, lifespan=running, max_body_size=MAX_BODY,
        form_limits={"max_files": MAX_IMAGES},
    )  # fmt: skip
    app.add_middleware(BoundedBodies)
    if cors:
        app.add_middleware(CORSMiddleware, allow_origins=cors, allow_methods=["GET", "POST"], allow_headers=["*"])
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=hosts)

    @app.post("/predict")
    async def predict(
        images: Annotated[list[UploadFile], File(description="image files")],
        top_k: Annotated[int, Query(ge=1, description="how many classes; multi-label models ignore it")] = 5,
    ) -> list[Answer]:
        """The most likely classes of each image, or the labels of a multi-label model."""
        prepared, errors = [], []
        for image in images:  # one by one, so that requests of many images leave room for others
            try:
                prepared.append(await decoder.decode(await image.read(), model.prepare))
            except UserError as e:
                errors.append(f"{image.filename}: {e}")
        if errors:
            raise UserError("; ".join(errors))
        rows = await asyncio.gather(*map(batcher.predict, prepared))
        return [Answer(file=image.filename or "", predictions=describe(row, top_k))
                for image, row in zip(images, rows, strict=True)]  # fmt: skip

    def describe(outputs: np.ndarray, top_k: int) -> list[Prediction]:
        _refuse_nan(outputs)
        return [one | {"class": escape_surrogates(one["class"])}
                for one in model.describe(outputs, top_k)["predictions"]]  # fmt: skip

    @app.post("/explain", response_class=Response, responses={200: {"content": {"image/png": {}}}})
    async def explain(
        image: Annotated[UploadFile, File(description="an image file")],
        name: Annotated[str, Query(alias="class", description="default: the most likely class")] = "",
    ) -> Response:
        """A PNG of the image beside a heatmap of the regions that a class depends on."""
        if name and name not in class_names:
            raise HTTPException(404, unknown("class", name[:100], class_names))
        label = class_names.index(name) if name else None
        picture = await decoder.alone(await image.read(), lambda content: draw(content, label))
        return Response(picture, media_type="image/png")

    @app.get("/model")
    async def describe_model() -> dict[str, Any]:
        """The model's name, classes and input."""
        return about

    about: JsonObject = {
        "name": escape_surrogates(name), "model": model.config.model, "step": model.step, "task": model.task.value,
        "classes": class_names, "input": {"height": height, "width": width, "channels": channels,
                                          "preprocess": model.programs.preprocess_eval},
        "parameters": sum(x.size for x in jax.tree.leaves(model.state.params)),
        "params_sha256": tree.sha256(model.state.params),
        "version": __version__,
    }  # fmt: skip

    @app.exception_handler(UserError)
    async def refuse(request: Request, error: UserError) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, 422)

    @app.exception_handler(RequestValidationError)
    async def refuse_fields(request: Request, error: RequestValidationError) -> JSONResponse:
        fields = (f"{'.'.join(map(str, one['loc'][1:]))}: {one['msg']}" for one in error.errors())
        return JSONResponse({"detail": "; ".join(fields)}, 422)

    @app.exception_handler(Exception)
    async def fail(request: Request, error: Exception) -> JSONResponse:
        log.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return JSONResponse({"detail": "the server failed; its log says why"}, 500)

    app.mount("/", StaticFiles(directory=Path(__file__).parent / "page", html=True))
    return app


def make_explainer(model: Trained) -> Explainer:
    """Returns the function that draws a PNG for the bytes of an image file and a class, None for the predicted one."""
    method, explain = explanations.build(model)

    def draw(content: bytes, label: int | None) -> bytes:
        pixels = model.prepare(content)
        outputs = explanations.predict(model, pixels[None], ranked=True)[:, 0]
        _refuse_nan(outputs)
        label = int(outputs[1].argmax()) if label is None else label
        title = f"{model.class_names[label]}, probability {decimals(outputs[0, label])}"
        return explanations.draw(method, explain, pixels, label, title)[0]

    return draw


def _refuse_nan(outputs: np.ndarray) -> None:
    if not is_finite(outputs, "ranked"):
        raise UserError(NOT_FINITE)
