"""Export to ONNX with jax2onnx, verified with onnxruntime.

jax2onnx translates a jaxpr operation by operation, and patches some Flax functions while tracing. So the model is
traced first, nested calls are inlined, and dead code is eliminated. Max pooling and padding are rewritten as calls of
Flax and NumPy, the forms that jax2onnx translates well.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import export
from jax.extend.core import Jaxpr, Literal, Var
from jax.interpreters import partial_eval
from jax.typing import ArrayLike

from imgclf_jax.core import platform, sharding
from imgclf_jax.core.errors import UserError
from imgclf_jax.core.text import one_per_line
from imgclf_jax.core.typing import Function, PyTree
from imgclf_jax.step import Outputs
from imgclf_jax.tools.export import compared
from imgclf_jax.trained import Trained

_CALLS = {  # the parameter with the jaxpr of a call
    "jit": "jaxpr", "closed_call": "call_jaxpr", "custom_jvp_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr",
    "remat2": "jaxpr", "checkpoint": "jaxpr",
}  # fmt: skip


def archive(model: Trained, what: Outputs) -> tuple[bytes, float]:
    """Returns the bytes of the file, and the largest difference of onnxruntime's outputs on random images.

    The input `images` is uint8[b, h, w, c], with any b; `compared.output_name` names the output. The metadata have the
    class names, one per line. Raises UserError if jax2onnx does not know an operation, and if the outputs differ.
    """
    import jax2onnx
    import onnxruntime

    programs = model.programs
    params, model_state = jax.tree.map(sharding.fetch, model.state.evaluated)
    pure = programs.pure(what)
    output = compared.output_name(what)
    (b,) = export.symbolic_shape("b")
    images = jax.ShapeDtypeStruct((b, *programs.recipe.data.image_shape), np.uint8)
    with platform.tracing_for(""):
        function = _flatten(lambda images: pure(params, model_state, images), images)
    with jax.numpy_dtype_promotion("standard"):  # jax2onnx needs it
        try:
            proto = jax2onnx.to_onnx(function, [images], input_names=["images"], output_names=[output])
        except NotImplementedError as e:
            raise UserError(f"export: jax2onnx cannot translate model={model.config.model!r}: {e}") from e
    facts = {
        "task": model.task.value,
        "class_names": one_per_line(model.class_names),
        "host_ops": programs.preprocess_eval,
    }
    for key, value in facts.items():
        entry = proto.metadata_props.add()
        entry.key, entry.value = key, value
    content: bytes = proto.SerializeToString()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # silences warnings of unused constants
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return content, compared.difference(lambda x: session.run(None, {"images": x})[0], model, what, "onnxruntime")


def _flatten(function: Function, *shapes: PyTree) -> Any:
    """Inlines nested calls and eliminates dead code."""
    closed = jax.jit(function).trace(*shapes).jaxpr
    inlined = jax.jit(lambda *args: _run(closed.jaxpr, closed.consts, args, {})).trace(*shapes).jaxpr
    needed, _ = partial_eval.dce_jaxpr(inlined.jaxpr, [True] * len(inlined.jaxpr.outvars), instantiate=True)
    return lambda *args: _run(needed, inlined.consts, args, _REPLACEMENTS)[0]


def _run(
    jaxpr: Jaxpr, consts: Sequence[ArrayLike], args: Sequence[ArrayLike], replacements: Mapping[str, Function]
) -> list[ArrayLike]:
    """Evaluates a jaxpr, with `replacements` for some primitives."""
    values: dict[Var, ArrayLike] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))

    def read(variable: Var | Literal) -> ArrayLike:
        return variable.val if hasattr(variable, "val") else values[variable]

    for equation in jaxpr.eqns:
        name, operands = equation.primitive.name, [read(v) for v in equation.invars]
        if name in _CALLS:
            inner: Any = equation.params[_CALLS[name]]
            out = _run(getattr(inner, "jaxpr", inner), getattr(inner, "consts", ()), operands, replacements)
        elif name in replacements:
            out = [replacements[name](*operands, **equation.params)]
        else:
            primitive = equation.primitive
            found = primitive.bind(*operands, **primitive.get_bind_params(equation.params))
            out = list(found) if primitive.multiple_results else [found]
        values.update(zip(equation.outvars, out, strict=True))
    return [read(v) for v in jaxpr.outvars]


def _max_pool(x: jax.Array, **params: Any) -> jax.Array:
    """Max pooling of [b, h, w, c] with Flax's function, after explicit padding, which jax2onnx would drop."""
    window, strides, padding = (tuple(params[name]) for name in ("window_dimensions", "window_strides", "padding"))
    dilated = {*params["window_dilation"], *params["base_dilation"]} != {1}
    if len(window) != 4 or (window[0], window[3]) != (1, 1) or dilated:
        raise NotImplementedError(f"a maximum over windows {window}")
    if any(map(sum, padding)):
        x = jnp.pad(x, padding, constant_values=-jnp.inf)
    return nn.max_pool(x, window_shape=window[1:3], strides=strides[1:3], padding="VALID")


def _pad(x: jax.Array, value: jax.Array, *, padding_config: Any) -> jax.Array:
    """Padding with NumPy's function, which jax2onnx translates also for a symbolic batch size."""
    constant = getattr(value, "val", value)
    if any(between or before < 0 or after < 0 for before, after, between in padding_config):
        raise NotImplementedError(f"padding {padding_config}")
    widths = [(before, after) for before, after, _ in padding_config]
    return jnp.pad(x, widths, constant_values=constant)


_REPLACEMENTS: dict[str, Function] = {"reduce_window_max": _max_pool, "pad": _pad}
