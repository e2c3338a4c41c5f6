"""Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon): optax's, and the form that airbench94_muon has."""

import functools

import jax.numpy as jnp
import optax
import optax.contrib

from imgclf_jax.core import tree
from imgclf_jax.core.typing import Params, PyTree


def _dimensions(params: Params) -> PyTree:
    """Muon's dimension numbers: the row and column axes of each kernel; None for parameters that Adam updates.

    Convolution kernels are flattened to [kh * kw * c, f]. Adam updates all other parameters and the head's kernel, as
    Muon's author recommends; he leaves the first convolution to Adam too, which Muon updates here.
    """

    def axes(name: str, x: PyTree) -> PyTree:
        if not name.endswith("kernel") or name.startswith("head/") or x.ndim not in (2, 4):
            return None
        return optax.contrib.MuonDimensionNumbers(tuple(range(x.ndim - 1)), x.ndim - 1)

    return tree.map_named(axes, params)


muon = functools.partial(optax.contrib.muon, muon_weight_dimension_numbers=_dimensions)


def muon_sgd(
    learning_rate: optax.ScalarOrSchedule, beta: float = 0.6, ns_steps: int = 3, momentum: float = 0.85,
    weight_decay: float = 0.0,
) -> optax.GradientTransformation:  # fmt: skip
    """The optimizer of KellerJordan/cifar10-airbench, airbench94_muon.py: Muon for convolutions, SGD for all else.

    Each kernel [kh, kw, c, f] is rescaled to the norm sqrt(f), and then gets its update of Nesterov momentum `beta`,
    orthogonalized in `ns_steps` iterations. The others have Nesterov momentum and `weight_decay`.
    """

    def rescale(updates: PyTree, params: Params) -> PyTree:
        return tree.map_named(lambda _, u, p: u + p * (jnp.sqrt(p.shape[-1]) / jnp.linalg.norm(p) - 1), updates, params)

    kernels = optax.chain(
        optax.trace(beta, nesterov=True),
        optax.contrib.scale_by_muon(ns_steps=ns_steps, beta=0.0, eps=1e-7, nesterov=False,
                                    weight_dimension_numbers=_dimensions),
        optax.scale_by_learning_rate(learning_rate), optax.stateless(rescale),
    )  # fmt: skip
    others = optax.chain(optax.add_decayed_weights(weight_decay), optax.sgd(learning_rate, momentum, nesterov=True))

    def label(name: str, x: PyTree) -> str:
        is_conv = x.ndim == 4 and name.endswith("kernel") and not name.startswith("head/")
        return "kernels" if is_conv else "others"

    return optax.partition({"kernels": kernels, "others": others}, lambda params: tree.map_named(label, params))
