"""The OpenAPI description of the server."""

from collections.abc import Sequence

from imgclf_jax import __version__
from imgclf_jax.core.typing import JsonObject
from imgclf_jax.losses import Task
from imgclf_jax.tools.serve.limits import Limits

_ERRORS = {
    "400": "invalid request: an empty body, broken multipart or JSON, or an invalid parameter",
    "408": "the body arrived too slowly",
    "413": "the body is too long, or holds too many images",
    "422": "an image is not readable",
    "503": "too many requests are waiting",
}


def describe(class_names: Sequence[str], limits: Limits, explains: bool, task: Task = Task.CLASSES) -> JsonObject:
    """Returns the OpenAPI 3.1 description for a task, with these limits."""
    file, base64 = {"type": "string", "format": "binary"}, {"type": "string", "contentEncoding": "base64"}
    several = {"type": "array", "minItems": 1, "maxItems": limits.images}

    def body(*keys: str) -> JsonObject:
        def forms(one: dict[str, str]) -> JsonObject:
            shapes = {"image": one, "images": {**several, "items": one}}
            return {"schema": {"oneOf": [
                {"type": "object", "required": [key], "properties": {key: shapes[key]}} for key in keys
            ]}}  # fmt: skip

        return {
            "required": True,
            "description": f"an image file, a form with files, or JSON, of at most {limits.body_bytes:,} bytes",
            "content": {"image/*": {}, "application/octet-stream": {}, "multipart/form-data": forms(file),
                        "application/json": forms(base64)},
        }  # fmt: skip

    error = {"type": "object", "required": ["error"], "properties": {"error": {"type": "string"}}}
    class_name = {"type": "string", "enum": list(class_names)} if len(class_names) <= 100 else {"type": "string"}
    prediction = {
        "type": "object",
        "required": ["class", "probability"],
        "properties": {
            "class": class_name,
            "probability": {"type": "number", "minimum": 0, "maximum": 1},
        },
    }
    order = "the most likely first"
    if task is Task.MULTILABEL:
        order = "all classes with a probability of at least 0.5, the most likely first; top_k is ignored"
    key, schema = "predictions", {"type": "array", "items": prediction, "description": order}
    time = {"milliseconds": {"type": "number", "description": "from the complete body to the response"}}
    one = {"type": "object", "required": [key], "properties": {key: schema}}
    answer = {"oneOf": [
        {"type": "object", "required": [key, *time], "properties": {key: schema, **time}},
        {"type": "object", "required": ["images", *time], "description": "for several images, in order",
         "properties": {"images": {"type": "array", "items": one}, **time}},
    ]}  # fmt: skip
    refusals = {status: {"description": text, "content": {"application/json": {"schema": error}}}
                for status, text in _ERRORS.items()}  # fmt: skip
    missing = {"404": {"description": "unknown class", "content": {"application/json": {"schema": error}}}}
    picture = {"post": {
        "summary": "Draws a heatmap of the image regions that a class depends on",
        "parameters": [
            {"name": "class", "in": "query", "description": "the class (default: the most likely one)",
             "schema": class_name},
            {"name": "format", "in": "query", "description": "json has the image and its heatmap as data URLs",
             "schema": {"type": "string", "enum": ["png", "json"], "default": "png"}},
        ],
        "requestBody": body("image"),
        "responses": {"200": {"description": "a heatmap", "content": {"image/png": {}, "application/json": {}}},
                      **refusals, **missing},
    }}  # fmt: skip
    return {
        "openapi": "3.1.0",
        "info": {"title": "imgclf_jax serve", "version": __version__},
        "paths": {
            "/predict": {
                "post": {
                    "summary": "Classifies images",
                    "parameters": [{
                        "name": "top_k", "in": "query", "description": "how many classes",
                        "schema": {"type": "integer", "minimum": 1, "default": 5},
                    }],
                    "requestBody": body("image", "images"),
                    "responses": {
                        "200": {"description": "its classes", "content": {"application/json": {"schema": answer}}},
                        **refusals,
                    },
                }
            },
            **({"/explain": picture} if explains else {}),
            "/model": {"get": {"summary": "The model: its name, classes, input and version",
                               "responses": {"200": {"description": "the model"}}}},
            "/health": {"get": {"summary": "Health check",
                                "responses": {"200": {"description": "healthy"}}}},
            "/metrics": {"get": {"summary": "Prometheus metrics",
                                 "responses": {"200": {"description": "text"}}}},
        },
    }  # fmt: skip
