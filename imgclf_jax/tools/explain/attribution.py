"""Attribution methods as pure functions: Grad-CAM and occlusion.

Each returns a map of the importance of image regions. Flax's method interceptors read the layers' outputs, so any linen
network works unchanged.
"""

import collections
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.core import tracers

from imgclf_jax.core import dtypes
from imgclf_jax.core.errors import UserError, unknown
from imgclf_jax.core.typing import Arguments, Function, ModelState, Params, PyTree, Variables
from imgclf_jax.models.classifier import Classifier

# (params, model_state, images uint8[b, h, w, c], labels i32[b]) → f32[b, h', w']
type Explain = Callable[[Params, ModelState, jax.Array, jax.Array], jax.Array]


class Layer(NamedTuple):
    """A call of a backbone layer: its name such as "layer4_1/conv2", its output shape, and the number of the call.

    `call` counts the calls of this name from 0. It is None within a transformation such as a scan, remat or jit, where
    the output is out of reach.
    """

    name: str
    shape: tuple[int, ...]
    call: int | None


def without_remat(model: Classifier) -> Classifier:
    """Returns the classifier without `remat`, which hides its blocks' layers from interceptors."""
    outer = model.backbone
    inner = getattr(outer, "base", outer)  # the backbone within LoRA
    if not getattr(inner, "remat", ""):
        return model
    plain = inner.clone(remat="")
    return model.clone(backbone=plain if inner is outer else outer.clone(base=plain))


def inspect(model: nn.Module, variables: Variables, image_shape: Sequence[int]) -> list[Layer]:
    """Traces the classifier on an image [h, w, c], without computing; the backbone's layer calls in order."""
    layers: list[Layer] = []

    def run(variables: Variables, images: jax.Array) -> PyTree:
        def record(name: str, call: int | None, y: PyTree) -> PyTree:
            if name.startswith("backbone/") and isinstance(y, jax.Array):
                layers.append(Layer(name.removeprefix("backbone/"), y.shape, call))
            return y

        with nn.intercept_methods(_on_outputs(record)):
            return model.apply(variables, images, train=False)

    jax.eval_shape(run, variables, jax.ShapeDtypeStruct((1, *image_shape), jnp.float32))
    return layers


def best_method(layers: Sequence[Layer]) -> str:
    """Returns "gradcam" if the last output with more than one position is a feature map in reach, else "occlusion"."""
    outputs = [layer for layer in layers if len(layer.shape) > 2 and np.prod(layer.shape[1:-1]) > 1]
    return "gradcam" if outputs and len(outputs[-1].shape) == 4 and outputs[-1].call is not None else "occlusion"


def choose_layer(layers: Sequence[Layer], name: str = "") -> Layer:
    """Returns the layer for Grad-CAM: the last call of `name`, or of any layer, with feature maps [b, h, w, c].

    Raises UserError if there is none.
    """
    spatial = [x for x in layers if len(x.shape) == 4 and x.shape[1] * x.shape[2] > 1 and x.call is not None]
    if not spatial:
        raise UserError("gradcam needs a layer with feature maps [b, h, w, c], which this network lacks; "
                        "--method=occlusion explains any network")  # fmt: skip
    matches = [layer for layer in spatial if name in ("", layer.name)]
    if not matches:
        raise UserError(unknown("layer with feature maps", name, {layer.name for layer in spatial}))
    return matches[-1]


def make_gradcam(model: nn.Module, augment: Callable[..., jax.Array], layer: Layer, num_seeds: int = 1) -> Explain:
    """Returns Grad-CAM of `layer` (Selvaraju et al. 2017, arXiv:1610.02391, equations 1 and 2), maps f32[b, h', w'].

    With A_k the layer's feature map k and y the label's logit, the map is ReLU(sum_k w_k A_k), where w_k is the spatial
    mean of dy / dA_k. `augment` applies the device ops of evaluation. With several seeds, params and model_state are
    [num_seeds, …], and the result is the mean of the seeds' maps.
    """

    def gradcam(params: Params, model_state: ModelState, images: jax.Array, labels: jax.Array) -> jax.Array:
        variables, images = {"params": params, **model_state}, augment(None, images)

        def logit(delta: jax.Array) -> tuple[jax.Array, jax.Array]:
            """Returns the sum of the labels' logits, with `delta` added to the feature maps, and these maps."""
            outputs: list[jax.Array] = []

            def shift(name: str, call: int | None, y: PyTree) -> PyTree:
                if (name, call) != (f"backbone/{layer.name}", layer.call):
                    return y
                outputs.append(y)
                return y + delta.astype(y.dtype)

            with nn.intercept_methods(_on_outputs(shift)):
                logits: Any = model.apply(variables, images, train=False)
            return dtypes.upcast(jnp.take_along_axis(logits, labels[:, None], 1)).sum(), dtypes.upcast(outputs[0])

        zeros = jnp.zeros((len(images), *layer.shape[1:]), jnp.float32)
        gradients, features = jax.grad(logit, has_aux=True)(zeros)
        weights = jnp.mean(gradients, (1, 2))  # [b, c]
        return nn.relu(jnp.sum(weights[:, None, None] * features, -1))  # [b, h', w']

    if num_seeds == 1:
        return gradcam
    return lambda *args: jnp.mean(jax.vmap(gradcam, (0, 0, None, None))(*args), 0)


def occlusion(
    predict: Callable[[np.ndarray], np.ndarray], images: np.ndarray, labels: np.ndarray, window: int = 0,
    size: int = 128,
) -> np.ndarray:  # fmt: skip
    """Returns occlusion maps f64[n, h, w]: the drop of a label's probability (Zeiler and Fergus 2014, arXiv:1311.2901).

    A square in the image's mean color slides over the image, by half its side. A pixel's value is the mean drop over
    the squares that cover it, negative if the probability rises.

    - `predict` returns the probabilities f32[b, classes] of images uint8[b, h, w, c].
    - `images` are uint8[n, h, w, c], `labels` int[n].
    - `window` is the side of the square in pixels (default: a seventh of the image's shorter side, at least
      2 if that fits).
    - `size` bounds the batch of a call of `predict`.
    """
    n, h, w = images.shape[:3]
    window = window or min(max(2, round(min(h, w) / 7)), h, w)
    if not 1 <= window <= min(h, w):
        raise UserError(f"--window={window}: must be 1 to {min(h, w)}, because the network's input is {h} x {w} pixels")
    corners = list(itertools.product(_starts(h, window), _starts(w, window)))

    def occluded(image: np.ndarray) -> Iterator[np.ndarray]:
        """Yields the image, followed by its occlusions."""
        yield image
        color = np.round(image.mean((0, 1))).astype(np.uint8)
        for i, j in corners:
            copy = image.copy()
            copy[i : i + window, j : j + window] = color
            yield copy

    drop, count = np.zeros((n, h, w)), np.zeros((h, w))
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        batches = itertools.batched(occluded(image), size)
        whole, *covered = np.concatenate([predict(np.stack(batch))[:, label] for batch in batches])
        for value, (i, j) in zip(covered, corners, strict=True):
            drop[number, i : i + window, j : j + window] += whole - value
    for i, j in corners:
        count[i : i + window, j : j + window] += 1
    return drop / count


def _starts(length: int, window: int) -> list[int]:
    """Returns the squares' offsets along one side: half a window apart, the last one at the end."""
    last = length - window
    return sorted({*range(0, last, max(1, window // 2)), last})


def _on_outputs(replace: Callable[[str, int | None, PyTree], PyTree]) -> Function:
    """Returns an interceptor that replaces the output of each module call by `replace(name, call, output)`.

    `call` is as in `Layer`; within a transformation JAX may take a module from its cache, without calling it.
    """
    outside = tracers.current_trace()
    calls: collections.Counter[str] = collections.Counter()

    def intercept(
        call: Function, args: tuple[Any, ...], kwargs: Arguments, context: nn.module.InterceptorContext
    ) -> PyTree:
        y, name = call(*args, **kwargs), "/".join(context.module.path)
        if context.method_name != "__call__":
            return y
        if tracers.current_trace() != outside:
            return replace(name, None, y)
        calls[name] += 1
        return replace(name, calls[name] - 1, y)

    return intercept
