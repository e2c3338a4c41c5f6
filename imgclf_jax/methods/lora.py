"""LoRA: low-rank adapters on the kernels of a frozen backbone."""

import functools
import inspect
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util

from imgclf_jax.core import rng, spec, tree
from imgclf_jax.core.errors import UserError
from imgclf_jax.core.typing import Params, Variables
from imgclf_jax.methods import Method, Problem
from imgclf_jax.methods.supervised import supervised
from imgclf_jax.models.classifier import Classifier
from imgclf_jax.optim import rules

_ADAPTERS = "lora"  # the name below the backbone's parameters
PREFIX = f"params/backbone/{_ADAPTERS}/"  # of the adapters' paths


def lora(problem: Problem, rank: int = 8, alpha: float = 8.0, pattern: str = "backbone/.*kernel") -> Method:
    """Trains W + alpha / rank * A B with frozen kernels W, equation 3 of Hu et al. 2021 (arXiv:2106.09685).

    `pattern` is a regular expression, or several separated by commas; kernels whose paths match are adapted. Kernels
    are [d, f], convolutions flattened to [kh * kw * c, f]. A is [d, rank] and B [rank, f], the transposes of the
    paper's. A starts uniform in ±1 / sqrt(d), as in the authors' loralib, and B at 0. A, B and the head are trained;
    the rest of the backbone is frozen as by `rules.freeze`, without optimizer state and with BatchNorm and dropout in
    evaluation mode. The key `init_from` loads the weights to adapt, under the names of the plain model.

    All axes but the last are flattened, so the layers of an `nn.scan`, [layers, d, f], share one B, and so do the heads
    of linen's attention, [d, heads, f], where the paper's W is [d, heads * f]: exclude those by `pattern`.

    `export` to .safetensors writes merged weights under the plain names, and `init_from` of such a run loads them.
    Raises UserError if `pattern` matches nothing, or a parameter that is no kernel.
    """
    make = functools.partial(Classifier, num_classes=problem.classes, head_init=problem.head_init)
    return Method(
        supervised(problem).loss, model=lambda backbone, _: make(Adapted(backbone, rank, alpha, pattern)),
        freeze=f"backbone/(?!{_ADAPTERS}/).*", merge=functools.partial(merge, scale=alpha / rank),
    )  # fmt: skip


class Adapted(nn.Module):
    """The backbone `base` with adapters `lora/PATH/a` and `lora/PATH/b` for each kernel, among its parameters."""

    base: nn.Module
    rank: int
    alpha: float
    pattern: str

    def setup(self) -> None:
        nn.share_scope(self, self.base)

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        if self.is_initializing():
            self.base(images, train=train)
        base_params = {name: x for name, x in self.variables["params"].items() if name != _ADAPTERS}
        kernels = match_kernels(base_params, self.pattern)
        adapters = self.param(_ADAPTERS, lambda key: init_adapters(key, kernels, self.rank))

        def merged(variables: Variables) -> Variables:
            return {**variables, "params": add(variables["params"], adapters, self.alpha / self.rank)}

        frozen = nn.map_variables(lambda base: base(images, train=False), "params", merged)
        features: jax.Array = frozen(self.base)
        return features


def match_kernels(params: Params, pattern: str) -> dict[str, tuple[int, ...]]:
    """The shapes of the kernels of a backbone whose paths match `pattern`, by path below `backbone/`."""
    shapes = {"/".join(("backbone", *map(str, p))): x.shape for p, x in traverse_util.flatten_dict(params).items()}
    matched = rules.match([(part, True) for part in rules.split(pattern)], list(shapes), "method: lora(pattern)")
    for name in matched:
        if not name.endswith("/kernel") or len(shapes[name]) < 2:
            raise UserError(f"method: lora(pattern={pattern!r}) matches {name} {list(shapes[name])}; match only "
                            "kernels, as 'backbone/.*kernel' does")  # fmt: skip
    return {name.removeprefix("backbone/"): shapes[name] for name in matched}


def init_adapters(key: jax.Array, kernels: Mapping[str, tuple[int, ...]], rank: int) -> Params:
    """Initializes {"a": f32[d, rank], "b": f32[rank, f]} below the path of each kernel; b is zero."""
    uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # ±1 / sqrt(d)
    flat = {}
    for path, shape in kernels.items():
        flat[f"{path}/a"] = uniform(rng.fold(key, path), (math.prod(shape[:-1]), rank), jnp.float32)
        flat[f"{path}/b"] = jnp.zeros((rank, shape[-1]), jnp.float32)
    return traverse_util.unflatten_dict(flat, sep="/")


def add(params: Params, adapters: Params, scale: float) -> Params:
    """Merges adapters into a backbone's parameters: W + scale * A B for each adapted kernel W."""
    pairs = dict(tree.named_leaves(adapters))

    def merged(path: str, x: jax.Array) -> jax.Array:
        if f"{path}/a" not in pairs:
            return x
        product = jnp.matmul(pairs[f"{path}/a"], pairs[f"{path}/b"], precision="float32")
        return x + scale * product.reshape(x.shape)

    return tree.map_named(merged, {name: x for name, x in params.items() if name != _ADAPTERS})


def merge(variables: Variables, scale: float) -> Params:
    """The variables of the equivalent plain Classifier."""
    params = variables["params"]
    backbone = add(params["backbone"], params["backbone"][_ADAPTERS], scale)
    return {**variables, "params": {**params, "backbone": backbone}}


def scale_of(method: str) -> float:
    """alpha / rank of a method spec if it is `lora`, else 0. Imports nothing."""
    call = spec.parse_one(method)
    if call.name != "lora":
        return 0.0
    arguments = inspect.signature(spec.bind(call, {"lora": lora}, "method", leading=("problem",))).parameters
    return float(arguments["alpha"].default / arguments["rank"].default)
