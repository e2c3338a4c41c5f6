"""The OpenAPI description of the server."""

from collections.abc import Sequence
from typing import Any

from imgclf_jax import __version__
from imgclf_jax.losses import Task

_ERRORS = {
    "400": "invalid request: an empty body, or an invalid top_k",
    "408": "the body arrived too slowly",
    "413": "the body is too long",
    "422": "the body is not a readable image",
    "503": "too many requests are waiting",
}


def describe(class_names: Sequence[str], body_bytes: int, explains: bool, task: Task = Task.CLASSES) -> dict[str, Any]:
    """Returns the OpenAPI 3.1 description for a task, with bodies of at most `body_bytes` bytes."""
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
    order = "the most likely first"
    if task is Task.MULTILABEL:
        order = "all classes with a probability of at least 0.5, the most likely first; top_k is ignored"
    key, schema = ("predictions", {"type": "array", "items": prediction, "description": order})
    if task is Task.REGRESSION:
        values = dict.fromkeys(class_names, number)
        key, schema = "values", {"type": "object", "required": list(values), "properties": values}
    answer = {
        "type": "object",
        "required": [key, "milliseconds"],
        "properties": {
            key: schema,
            "milliseconds": {"type": "number", "description": "from the complete body to the response"},
        },
    }
    refusals = {status: {"description": text, "content": {"application/json": {"schema": error}}}
                for status, text in _ERRORS.items()}  # fmt: skip
    picture = {"post": {
        "summary": "Draws a heatmap of the most likely class",
        "requestBody": body,
        "responses": {"200": {"description": "a heatmap", "content": {"image/png": {}}}, **refusals},
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
            "/health": {"get": {"summary": "Health check, with the model that is served",
                                "responses": {"200": {"description": "healthy"}}}},
            "/metrics": {"get": {"summary": "Prometheus metrics",
                                 "responses": {"200": {"description": "text"}}}},
        },
    }  # fmt: skip
