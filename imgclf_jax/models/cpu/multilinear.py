"""Functions that are linear in one or two arrays, with a fast form of their own for each gradient.

A convolution is linear in its images and in its kernel; so is a dense layer. `jax.custom_vjp` would serve reverse mode
alone. The gradients of such a function are of the same kind, so primitives that name each other as their derivatives
serve forward mode, reverse mode and every mixture of them, such as `jax.jvp(jax.grad(f), …)`.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

Function = Callable[..., jax.Array]


def multilinear(name: str, product: Function, *gradients: Function) -> Function:
    """The function (*operands, *residuals, **static) → z, differentiable any number of times in both modes.

    `product` computes it. There is one gradient for each operand. It is called as `product` is, but with the gradient
    of z in place of its operand, and with the operand's shape and dtype as the keyword `like`; it gives the operand's
    gradient. That may be of a wider dtype, and is rounded then. `residuals` are arrays that are not differentiated,
    such as integers. `static` are hashable keywords.
    """
    functions, primitives = (product, *gradients), [Primitive(f"cpu_{name}_{i}") for i in range(len(gradients) + 1)]
    for role, primitive in enumerate(primitives):
        _register(primitive, functools.partial(_run, functions[role], role))
        ad.deflinear2(primitive, functools.partial(_transpose, primitives, role))
        ad.primitive_jvps[primitive] = functools.partial(_jvp, primitive, len(gradients))

    @functools.wraps(product)
    def function(*args: jax.Array, **static: Any) -> jax.Array:
        likes = _shapes(args[: len(gradients)])
        out: jax.Array = primitives[0].bind(*args, likes=likes, static=tuple(sorted(static.items())))
        return out

    return function


def _shapes(args: Any) -> tuple[jax.ShapeDtypeStruct, ...]:
    return tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in args)


@functools.lru_cache(4096)  # the layers of a network are alike, and each asks several times
def _shape(run: Function, params: tuple[tuple[str, Any], ...], shapes: tuple[Any, ...]) -> jax.core.ShapedArray:
    out = jax.eval_shape(functools.partial(run, **dict(params)), *shapes)
    return jax.core.ShapedArray(out.shape, out.dtype)


def _run(function: Function, role: int, *args: jax.Array, likes: Any, static: Any) -> jax.Array:
    """Role 0 is the product, role i the gradient of operand i - 1, of which `likes` are the shapes and dtypes."""
    like = {"like": likes[role - 1]} if role else {}
    return function(*args, **like, **dict(static))


def _jvp(primitive: Primitive, operands: int, primals: Any, tangents: Any, **params: Any) -> tuple[Any, Any]:
    """The sum over the operands of the product with the operand's tangent in its place."""
    out = primitive.bind(*primals, **params)
    terms = [
        primitive.bind(*primals[:i], tangent, *primals[i + 1 :], **params)
        for i, tangent in enumerate(tangents[:operands])
        if not isinstance(tangent, ad.Zero)
    ]
    return out, functools.reduce(ad.add_tangents, terms) if terms else ad.zeros_like_aval(jax.typeof(out))


def _transpose(primitives: list[Primitive], role: int, cotangent: Any, *args: Any, **params: Any) -> list[Any]:
    """The cotangent of the one operand that is to be differentiated; None for the others."""
    place = next(i for i, x in enumerate(args) if ad.is_undefined_primal(x))
    operands, own = list(args), role - 1
    operands[place] = cotangent
    if role == 0:
        wanted = primitives[place + 1]
    elif place == own:  # it stood for the gradient of z
        wanted = primitives[0]
    else:
        operands[place], operands[own] = args[own], cotangent
        wanted = primitives[place + 1]
    out = wanted.bind(*operands, **params).astype(args[place].aval.dtype)
    return [out if i == place else None for i in range(len(args))]


def _register(primitive: Primitive, run: Function) -> None:
    """Evaluation, shapes, compilation and vmap of a primitive: those of the JAX code that it stands for."""

    def shape(*args: Any, **params: Any) -> Any:
        return _shape(run, tuple(params.items()), _shapes(args))

    def batched(args: Any, axes: Any, **params: Any) -> Any:
        return jax.vmap(functools.partial(run, **params), axes)(*args), 0

    primitive.def_impl(run)
    primitive.def_abstract_eval(shape)
    mlir.register_lowering(primitive, mlir.lower_fun(run, multiple_results=False))
    batching.primitive_batchers[primitive] = batched
