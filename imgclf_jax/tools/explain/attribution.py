"""Where in an image a network finds its class: Grad-CAM, attention rollout, occlusion. Pure functions.

Each gives a map of one number a place, the greater the more it matters. No model is changed for it: what its layers
give is seen from outside, by Flax's interceptors, so a network of one's own is explained as ours are.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.core import tracers

from imgclf_jax.core.errors import UserError, unknown
from imgclf_jax.models.layers import widen

# (params, model_state, images uint8[b, h, w, c], labels i32[b]) → f32[b, h', w']
Explain = Callable[[Any, Any, jax.Array, jax.Array], jax.Array]

_MAPS = "attention"  # what attention layers sow into `intermediates`, f32[b, heads, queries, keys]


class Layer(NamedTuple):
    """A layer of the backbone as it was seen: its name such as "layer4_1/conv2", its output's shape, and its place.

    The place counts all calls of modules, in the order in which they return. `inside` is True within a transformation,
    such as a scan or a block that is computed again, where what the layer gives cannot be reached.
    """

    name: str
    shape: tuple[int, ...]
    place: int
    inside: bool = False


class Seen(NamedTuple):
    """What a network shows of itself: the backbone's layers, and its attention maps' shapes from first to last."""

    layers: list[Layer]
    attention: list[tuple[int, ...]]

    @property
    def spatial(self) -> list[Layer]:
        """The layers that give feature maps [b, h, w, c] of more than one place."""
        return [
            one for one in self.layers if len(one.shape) == 4 and one.shape[1] * one.shape[2] > 1 and not one.inside
        ]

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of the patches: those of the last feature maps; (0, 0) without any."""
        return self.spatial[-1].shape[1:3] if self.spatial else (0, 0)  # type: ignore[return-value]

    @property
    def best(self) -> str:
        """The method for this network: "gradcam", "rollout", or "occlusion", which suits any.

        Grad-CAM where the last thing with places is feature maps; rollout where tokens follow on patches and all
        attention maps are over them.
        """
        placed = [one for one in self.layers if len(one.shape) > 2 and np.prod(one.shape[1:-1]) > 1]
        if placed and len(placed[-1].shape) == 4 and not placed[-1].inside:
            return "gradcam"
        return "rollout" if self.attention and _tokens_fit(self) else "occlusion"


def without_remat(model: Any) -> Any:
    """The classifier with blocks whose layers can be seen: not computed again in the gradient, as `remat` has them."""
    outer = model.backbone
    inner = getattr(outer, "base", outer)  # of LoRA
    if not getattr(inner, "remat", ""):
        return model
    plain = inner.clone(remat="")
    return model.clone(backbone=plain if inner is outer else outer.clone(base=plain))


def look(model: nn.Module, variables: Any, image_shape: Sequence[int]) -> Seen:
    """What the classifier `model` shows of itself on an image [h, w, c]. Nothing is computed."""
    layers: list[Layer] = []
    attention: dict[str, tuple[int, ...]] = {}

    def run(variables: Any, images: jax.Array) -> None:
        outside = tracers.current_trace()

        def note(place: int, path: tuple[str, ...], y: Any) -> Any:
            if path[:1] == ("backbone",) and len(path) > 1 and isinstance(y, jax.Array):
                layers.append(Layer("/".join(path[1:]), y.shape, place, tracers.current_trace() != outside))
            return y

        with nn.intercept_methods(_on_outputs(note)):
            _, state = model.apply(variables, images, train=False, mutable=["intermediates"])
        attention.update((name, x.shape) for name, x in _attention_maps(state).items())

    jax.eval_shape(run, variables, jax.ShapeDtypeStruct((1, *image_shape), jnp.float32))
    return Seen(layers, [attention[name] for name in _in_order(attention, layers)])


def choose_layer(seen: Seen, name: str = "") -> Layer:
    """The layer for Grad-CAM: the last call of that name, or the last that gives feature maps. Raises UserError."""
    if not seen.spatial:
        raise UserError("gradcam needs a layer that gives feature maps [b, h, w, c], and this network has none; "
                        "--method=occlusion explains any network")  # fmt: skip
    named = [one for one in seen.spatial if name in ("", one.name)]
    if not named:
        raise UserError(unknown("layer with feature maps", name, {one.name for one in seen.spatial}))
    return named[-1]


def make_gradcam(model: nn.Module, augment: Callable[..., jax.Array], layer: Layer, num_seeds: int = 1) -> Explain:
    """Grad-CAM (Selvaraju et al. 2017, arXiv:1610.02391, equations 1 and 2): the maps f32[b, h', w'] of `layer`.

    With A_k the layer's feature map k and y the label's logit, map = ReLU(sum_k w_k A_k), w_k being the mean of
    dy / dA_k over all places. `augment` are the device ops of evaluation. With several seeds params and model_state are
    [num_seeds, …], and the result is the mean of the seeds' maps.
    """

    def gradcam(params: Any, model_state: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
        variables, images = {"params": params, **model_state}, augment(None, images)

        def logit(delta: Any) -> tuple[jax.Array, jax.Array]:
            """The sum over the images of the label's logit, the layer's maps moved by `delta`; and these maps."""
            found: list[jax.Array] = []

            def move(place: int, path: tuple[str, ...], y: Any) -> Any:
                if place != layer.place:
                    return y
                found.append(y)
                return y if delta is None else y + delta.astype(y.dtype)

            with nn.intercept_methods(_on_outputs(move)):
                logits: Any = model.apply(variables, images, train=False)
            return widen(jnp.take_along_axis(logits, labels[:, None], 1)).sum(), widen(found[0])

        maps = jax.eval_shape(logit, None)[1]
        slopes, features = jax.grad(logit, has_aux=True)(jnp.zeros(maps.shape, maps.dtype))
        weights = jnp.mean(slopes, (1, 2))  # [b, c]
        return nn.relu(jnp.sum(weights[:, None, None] * features, -1))  # [b, h', w']

    return _mean_over_seeds(gradcam, num_seeds)


def make_rollout(model: nn.Module, augment: Callable[..., jax.Array], seen: Seen, num_seeds: int = 1) -> Explain:
    """Attention rollout (Abnar and Zuidema 2020, arXiv:2005.00928): the maps f32[b, rows, columns] of the patches.

    How much of each patch reaches the class token through all layers, or, without a class token, all tokens on
    average; see `rollout`. The label does not matter. Seeds are as in `make_gradcam`. Raises UserError if the network
    shows no attention maps over its patches.
    """
    if not seen.attention or not _tokens_fit(seen):
        raise UserError("rollout needs attention maps over the patches of the image, sown as 'attention', and this "
                        "network has none; --method=occlusion explains any network")  # fmt: skip
    rows, columns = seen.grid

    def explain(params: Any, model_state: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
        variables = {"params": params, **model_state}
        _, state = model.apply(variables, augment(None, images), train=False, mutable=["intermediates"])
        maps = _attention_maps(state)
        flow = rollout([maps[name] for name in _in_order(maps, seen.layers)])  # [b, n, n]
        classes = flow.shape[-1] - rows * columns  # class tokens, which come first
        reached = flow[:, 0] if classes else jnp.mean(flow, 1)  # [b, n]
        return reached[:, classes:].reshape(-1, rows, columns)

    return _mean_over_seeds(explain, num_seeds)


def rollout(maps: Sequence[jax.Array]) -> jax.Array:
    """The flow f32[b, n, n] from each token of the input (last axis) to each of the output, through all layers.

    `maps` are the layers' attention f32[b, heads, n, n], from first to last. A layer passes on A = (W + I) / 2, W being
    the mean over its heads, since half of what it gives is its shortcut; the flow is the product of all A.
    """
    flow = jnp.eye(maps[0].shape[-1], dtype=maps[0].dtype)[None]
    for each in maps:
        layer = (jnp.mean(each, 1) + jnp.eye(each.shape[-1], dtype=each.dtype)) / 2  # rows add up to 1
        flow = jnp.matmul(layer, flow, precision="highest")
    return flow


def occlusion(
    predict: Callable[[np.ndarray], np.ndarray], images: np.ndarray, labels: np.ndarray, window: int = 0,
    size: int = 128,
) -> np.ndarray:  # fmt: skip
    """Occlusion (Zeiler and Fergus 2014, arXiv:1311.2901): by how much the probability of a label falls, f64[n, h, w].

    `images` are uint8[n, h, w, c], `labels` int[n]. `predict` gives the probabilities f32[b, classes] of images
    uint8[b, h, w, c]; it is called with up to `size` images at a time, which may be parts of several. A square of
    `window` pixels (default: a seventh of the image's shorter side) in the image's mean colour covers one part after
    the other, half a window further each time. A pixel's value is the mean fall over the squares that cover it, below 0
    where the probability rises.
    """
    n, h, w = images.shape[:3]
    window = window or max(2, round(min(h, w) / 7))
    if not 1 <= window <= min(h, w):
        raise UserError(f"--window={window}: the image is {h} by {w} pixels for the network; give 1 to {min(h, w)}")
    corners = list(itertools.product(_starts(h, window), _starts(w, window)))

    def seen() -> Iterator[tuple[np.ndarray, int]]:
        """Each image as it is, then with each part covered, and its label."""
        for image, label in zip(images, labels.tolist(), strict=True):
            yield image, label
            colour = np.round(image.mean((0, 1))).astype(np.uint8)
            for i, j in corners:
                covered = image.copy()
                covered[i : i + window, j : j + window] = colour
                yield covered, label

    found: list[float] = []
    for some in itertools.batched(seen(), size):
        probabilities = predict(np.stack([image for image, _ in some]))
        found += probabilities[np.arange(len(some)), [label for _, label in some]].tolist()
    of_each = np.array(found).reshape(n, 1 + len(corners))
    fall, count = np.zeros((n, h, w)), np.zeros((h, w))
    for value, (i, j) in zip((of_each[:, :1] - of_each[:, 1:]).T, corners, strict=True):
        fall[:, i : i + window, j : j + window] += value[:, None, None]
        count[i : i + window, j : j + window] += 1
    return fall / count


def _starts(length: int, window: int) -> list[int]:
    """Where the squares begin along one side: half a window apart, the last one at the end."""
    last = length - window
    return sorted({*range(0, last, max(1, window // 2)), last})


def _mean_over_seeds(explain: Explain, num_seeds: int) -> Explain:
    if num_seeds == 1:
        return explain
    return lambda *args: jnp.mean(jax.vmap(explain, (0, 0, None, None))(*args), 0)


def _on_outputs(see: Callable[[int, tuple[str, ...], Any], Any]) -> Any:
    """An interceptor: `see(place, path, output)` gives what each call of a module returns in place of its output."""
    places: Iterator[int] = itertools.count()

    def intercept(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        y = call(*args, **kwargs)
        return see(next(places), context.module.path, y) if context.method_name == "__call__" else y

    return intercept


def _attention_maps(state: Any) -> dict[str, jax.Array]:
    """{name of the layer: its attention maps}; a layer that was called several times counts once for each call."""
    found = {}
    for path, x in jax.tree.leaves_with_path(state.get("intermediates", {}).get("backbone", {})):
        keys = [key.key if isinstance(key, jax.tree_util.DictKey) else key.idx for key in path]
        if keys[-2:-1] == [_MAPS] and x.ndim == 4:
            found["/".join([*keys[:-2], str(keys[-1])])] = x
    return found


def _in_order(names: Any, layers: list[Layer]) -> list[str]:
    """The names of attention layers, "block10/attn/0", in the order in which the network calls them."""
    calls: dict[str, int] = {}
    seen: dict[str, int] = {}
    for layer in layers:
        calls[layer.name] = calls.get(layer.name, -1) + 1
        seen[f"{layer.name}/{calls[layer.name]}"] = layer.place
    return sorted(names, key=lambda name: seen.get(name, len(layers)))


def _tokens_fit(seen: Seen) -> bool:
    """Whether all attention maps are over the patches, with a class token before them or without."""
    n = seen.grid[0] * seen.grid[1]
    return n > 1 and all(shape[-1] == shape[-2] and shape[-1] - n in (0, 1) for shape in seen.attention)
