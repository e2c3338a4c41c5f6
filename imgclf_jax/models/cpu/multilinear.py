"""Functions that are linear in each of one or two arrays, with a custom implementation of every gradient.

A convolution is linear in the images and in the kernel. `jax.custom_vjp` would cover reverse mode only. Since the
gradients of such a function are multilinear too, primitives that are each other's derivatives cover both modes and any
composition, such as `jax.jvp(jax.grad(f), …)`.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

type Function = Callable[..., jax.Array]


def multilinear(name: str, product: Function, *gradients: Function) -> Function:
    """Returns a function (*operands, *residuals, **static) -> z, differentiable any number of times in both modes.

    - `product` computes z.
    - `gradients` has one function per operand. It is called like `product`, with the cotangent of z in place of its
      operand and the operand's shape and dtype as the keyword `like`. It returns the operand's cotangent, which is cast
      to the operand's dtype.
    - `residuals` are arrays that are not differentiated, such as integers; `static` are hashable keywords.
    """
    functions, primitives = (product, *gradients), [Primitive(f"cpu_{name}_{i}") for i in range(len(gradients) + 1)]
    for role, primitive in enumerate(primitives):
        _register(primitive, functools.partial(_run, functions[role], role))
        ad.deflinear2(primitive, functools.partial(_transpose, primitives, role))
        ad.primitive_jvps[primitive] = functools.partial(_jvp, primitive, len(gradients))

    @functools.wraps(product)
    def function(*args: jax.Array, **static: object) -> jax.Array:
        out: jax.Array = primitives[0].bind(*args, likes=_shapes(args[: len(gradients)]), **static)
        return out

    return function


def _shapes(args: Iterable[Any]) -> tuple[jax.ShapeDtypeStruct, ...]:
    return tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in args)


def _run(
    function: Function, role: int, *args: jax.Array, likes: tuple[jax.ShapeDtypeStruct, ...], **static: object
) -> jax.Array:
    """Runs role 0, the product, or role i, the gradient of operand i - 1; `likes` are the operands' shapes."""
    return function(*args, **({"like": likes[role - 1]} if role else {}), **static)


def _jvp(
    primitive: Primitive, operands: int, primals: tuple[jax.Array, ...], tangents: tuple[jax.Array, ...], **params: Any,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """The tangent: the sum over operands of the product with the operand replaced by its tangent."""
    out = primitive.bind(*primals, **params)
    terms = [
        primitive.bind(*primals[:i], tangent, *primals[i + 1 :], **params)
        for i, tangent in enumerate(tangents[:operands])
        if not isinstance(tangent, ad.Zero)
    ]
    return out, functools.reduce(ad.add_tangents, terms) if terms else ad.zeros_like_aval(jax.typeof(out))


def _transpose(primitives: list[Primitive], role: int, cotangent: jax.Array, *args: Any, **params: Any) -> list[Any]:
    """The cotangent of the one operand to differentiate; None for the others."""
    index = next(i for i, x in enumerate(args) if ad.is_undefined_primal(x))
    operands, z_index = list(args), role - 1  # in a gradient, z's cotangent takes this operand's position
    operands[index] = cotangent
    if role and index != z_index:
        operands[index], operands[z_index] = operands[z_index], operands[index]
    primitive = primitives[0 if index == z_index else index + 1]
    out = primitive.bind(*operands, **params).astype(args[index].aval.dtype)
    return [out if i == index else None for i in range(len(args))]


def _register(primitive: Primitive, run: Function) -> None:
    """Registers evaluation, shapes, lowering and vmap of a primitive, all derived from the JAX function `run`."""

    def shape(*args: Any, **params: Any) -> Any:
        out = jax.eval_shape(functools.partial(run, **params), *_shapes(args))
        return jax.core.ShapedArray(out.shape, out.dtype)

    def batched(args: Any, axes: Any, **params: Any) -> Any:
        return jax.vmap(functools.partial(run, **params), axes)(*args), 0

    primitive.def_impl(run)
    primitive.def_abstract_eval(shape)
    mlir.register_lowering(primitive, mlir.lower_fun(run, multiple_results=False))
    batching.primitive_batchers[primitive] = batched
