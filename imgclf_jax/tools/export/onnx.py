"""A trained model as ONNX, by jax2onnx: other runtimes run the file, and onnxruntime checks it here.

jax2onnx translates what a function does with arrays, operation by operation. It knows XLA's operations, and replaces
some of Flax's functions while it traces. So the model is first traced by itself. Calls inside of calls are then written
out, and what nothing depends on is left out. Two operations are put as Flax and NumPy would put them, since jax2onnx
translates these well only in that form.
"""

import importlib.util
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import export
from jax.interpreters import partial_eval

from imgclf_jax.core import platform, sharding
from imgclf_jax.core.errors import UserError
from imgclf_jax.step import Outputs
from imgclf_jax.tools.export import compared
from imgclf_jax.trained import Trained

_CALLS = ("jit", "pjit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call", "remat2", "checkpoint")


def check() -> None:
    """Raises UserError unless jax2onnx and onnxruntime are installed."""
    missing = [name for name in ("jax2onnx", "onnxruntime") if not importlib.util.find_spec(name)]
    if missing:
        raise UserError(f"export: {' and '.join(missing)} not installed; run it as `uv run --isolated --extra onnx "
                        "launch.py export …`")  # fmt: skip


def archive(model: Trained, what: Outputs) -> tuple[bytes, float]:
    """The bytes of the file, and the largest difference between onnxruntime's outputs and ours on random images.

    Its input `images` is uint8[b, h, w, c], b being any number; its output has the name
    of `compared.output_name`. Its metadata hold the
    names of the classes, a line each. Raises UserError for a model with an operation that jax2onnx does not know, and
    if the outputs differ.
    """
    import jax2onnx

    programs = model.programs
    params, model_state = jax.tree.map(sharding.fetch, model.state.evaluated)
    pure = programs.pure(what)
    named = compared.output_name(model, what)
    (b,) = export.symbolic_shape("b")
    images = jax.ShapeDtypeStruct((b, *programs.recipe.data.image_shape), np.uint8)
    with platform.tracing_for(""):
        function = _flat(lambda images: pure(params, model_state, images), images)
    with jax.numpy_dtype_promotion("standard"):  # which jax2onnx needs
        try:
            proto = jax2onnx.to_onnx(function, [images], input_names=["images"], output_names=[named])
        except NotImplementedError as e:
            raise UserError(f"export: jax2onnx cannot translate model={model.config.model!r}: {e}") from e
    facts = {
        "task": model.task.value,
        "class_names": "\n".join(model.class_names),
        "host_ops": programs.preprocess_eval,
    }
    for key, value in facts.items():
        entry = proto.metadata_props.add()
        entry.key, entry.value = key, value
    content: bytes = proto.SerializeToString()
    session = _runtime(content)
    return content, compared.difference(lambda x: session.run(None, {"images": x})[0], model, what, "onnxruntime")


def _runtime(content: bytes) -> Any:
    """onnxruntime's session of a file."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # it warns of constants that nothing uses
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def _flat(function: Any, *shapes: Any) -> Any:
    """The function with what it calls written out, and without what its result does not depend on."""
    closed = jax.jit(function).trace(*shapes).jaxpr
    again = jax.jit(lambda *args: _run(closed.jaxpr, closed.consts, args, {})).trace(*shapes).jaxpr
    needed, _ = partial_eval.dce_jaxpr(again.jaxpr, [True] * len(again.jaxpr.outvars), instantiate=True)
    return lambda *args: _run(needed, again.consts, args, _PUT)[0]


def _run(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any], put: dict[str, Any]) -> list[Any]:
    """Evaluates a jaxpr; `put` are other ways to compute some operations."""
    values: dict[Any, Any] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))

    def read(variable: Any) -> Any:
        return variable.val if hasattr(variable, "val") else values[variable]

    for equation in jaxpr.eqns:
        name, operands = equation.primitive.name, [read(v) for v in equation.invars]
        if name in _CALLS:
            inner = equation.params.get("jaxpr", equation.params.get("call_jaxpr"))
            out = _run(getattr(inner, "jaxpr", inner), getattr(inner, "consts", ()), operands, put)
        elif name in put:
            out = [put[name](*operands, **equation.params)]
        else:
            out = equation.primitive.bind(*operands, **equation.primitive.get_bind_params(equation.params))
            out = out if equation.primitive.multiple_results else [out]
        values.update(zip(equation.outvars, out, strict=True))
    return [read(v) for v in jaxpr.outvars]


def _max_pool(x: jax.Array, **params: Any) -> jax.Array:
    """A maximum over windows of [b, h, w, c] by Flax's function. jax2onnx leaves out padding, so it is done before."""
    window, strides, padding = (tuple(params[name]) for name in ("window_dimensions", "window_strides", "padding"))
    dilated = {*params["window_dilation"], *params["base_dilation"]} != {1}
    if len(window) != 4 or (window[0], window[3]) != (1, 1) or dilated:
        raise NotImplementedError(f"a maximum over windows {window}")
    if any(map(sum, padding)):
        x = jnp.pad(x, padding, constant_values=-jnp.inf)
    return nn.max_pool(x, window_shape=window[1:3], strides=strides[1:3], padding="VALID")


def _pad(x: jax.Array, value: jax.Array, *, padding_config: Any) -> jax.Array:
    """Padding by NumPy's function, which jax2onnx translates for any number of images too."""
    constant = getattr(value, "val", value)
    if any(between or before < 0 or after < 0 for before, after, between in padding_config):
        raise NotImplementedError(f"padding {padding_config}")
    widths = [(before, after) for before, after, _ in padding_config]
    return jnp.pad(x, widths, constant_values=constant)


_PUT = {"reduce_window_max": _max_pool, "pad": _pad}
