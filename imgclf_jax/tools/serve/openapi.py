"""What programs may ask of the server, as an OpenAPI document."""

from collections.abc import Sequence
from typing import Any

from imgclf_jax import __version__
from imgclf_jax.losses import Task

_ERRORS = {
    "400": "the request is wrong: an empty body, or a wrong top_k",
    "408": "the body came too slowly",
    "413": "the body is too long",
    "422": "the body is no image that is read here",
    "503": "too many requests wait",
}


def describe(class_names: Sequence[str], body_bytes: int, explains: bool, task: Task = Task.CLASSES) -> dict[str, Any]:
    """OpenAPI 3.1 of the routes for programs; bodies hold at most `body_bytes` bytes. Answers are by the task."""
    body = {
        "required": True,
        "description": f"the bytes of an image file, at most {body_bytes:,}",
        "content": {"image/*": {}, "application/octet-stream": {}},
    }
    error = {"type": "object", "required": ["error"], "properties": {"error": {"type": "string"}}}
    prediction = {
        "type": "object",
        "required": ["class", "probability"],
        "properties": {
            "class": {"type": "string", "enum": list(class_names)} if len(class_names) <= 100 else {"type": "string"},
            "probability": {"type": "number", "minimum": 0, "maximum": 1},
        },
    }
    number = {"type": "number"}
    order = "the likeliest first"
    if task is Task.MULTILABEL:
        order = "all classes whose probability is at least 0.5, the likeliest first; top_k does not count"
    key, found = ("predictions", {"type": "array", "items": prediction, "description": order})
    if task is Task.REGRESSION:
        values = dict.fromkeys(class_names, number)
        key, found = "values", {"type": "object", "required": list(values), "properties": values}
    answer = {
        "type": "object",
        "required": [key, "milliseconds"],
        "properties": {
            key: found,
            "milliseconds": {"type": "number", "description": "from the whole body to the answer"},
        },
    }
    refusals = {status: {"description": text, "content": {"application/json": {"schema": error}}}
                for status, text in _ERRORS.items()}  # fmt: skip
    picture = {"post": {
        "summary": "Draws where in the image the likeliest class is found",
        "requestBody": body,
        "responses": {"200": {"description": "a picture", "content": {"image/png": {}}}, **refusals},
    }}  # fmt: skip
    return {
        "openapi": "3.1.0",
        "info": {"title": "imgclf_jax serve", "version": __version__},
        "paths": {
            "/predict": {
                "post": {
                    "summary": "Classifies one image",
                    "parameters": [{
                        "name": "top_k", "in": "query", "description": "how many classes",
                        "schema": {"type": "integer", "minimum": 1, "default": 5},
                    }],
                    "requestBody": body,
                    "responses": {
                        "200": {"description": "its classes", "content": {"application/json": {"schema": answer}}},
                        **refusals,
                    },
                }
            },
            **({"/explain": picture} if explains else {}),
            "/health": {"get": {"summary": "Whether the server answers, and with which model",
                                "responses": {"200": {"description": "it does"}}}},
            "/metrics": {"get": {"summary": "Counts and times, in Prometheus' format",
                                 "responses": {"200": {"description": "text"}}}},
        },
    }  # fmt: skip
