"""Device ops against NumPy on the same draws, their distribution, and equal results on any number of devices."""

import functools
import itertools
import math
import re
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import noise, thorough
from tolerance import rounding

from imgclf_jax.augment import mixing, ops
from imgclf_jax.augment.ops import cutout, normalize, pad_crop, random_erasing
from imgclf_jax.core import kinds, rng, sharding
from imgclf_jax.core.errors import UserError
from imgclf_jax.data import placement, sampling, sources, stream

KEY = jax.random.key(3)
BY_EXAMPLE = np.uint32(1), np.arange(64, dtype=np.int32), np.zeros(64, np.int32)  # seed, ids and epochs of 64 images
ALL = "flip_lr|pad_crop(2, mode='reflect')|normalize(mean=(0.1, 0.2, 0.3), std=0.5)|cutout(4, fill=0.25)"


def compiled(op, key, images, *args):
    """The compiled `op(key, images, *args)`, as NumPy."""
    return np.asarray(jax.jit(lambda key, images: op(key, images, *args))(key, images))


def numpy_pad_crop(key, images, pad, mode):
    _, h, w, _ = images.shape
    corners = np.asarray(jax.random.randint(key, (len(images), 2), 0, 2 * pad + 1))
    padded = [np.pad(image, ((pad, pad), (pad, pad), (0, 0)), mode=mode) for image in images]
    return np.stack([p[top : top + h, left : left + w] for p, (top, left) in zip(padded, corners, strict=True)])


def numpy_cutout(key, images, size, fill):
    n, h, w, _ = images.shape
    key_y, key_x = jax.random.split(key)
    rows = np.asarray(jax.random.randint(key_y, (n, 1, 1, 1), 0, h)).reshape(-1)
    columns = np.asarray(jax.random.randint(key_x, (n, 1, 1, 1), 0, w)).reshape(-1)
    out = images.copy()
    for image, y, x in zip(out, rows - size // 2, columns - size // 2, strict=True):
        image[max(0, y) : max(0, y + size), max(0, x) : max(0, x + size)] = fill
    return out


def numpy_normalize(images, mean, std):
    return (images / 255 - np.array(mean)) / np.array(std)


@pytest.mark.parametrize("mode", ["constant", "reflect", "edge"])
@pytest.mark.parametrize(("shape", "pad"), [((16, 8, 9, 3), 4), *thorough(((8, 5, 5, 1), 1), ((4, 6, 6, 2), 0))])
def test_pad_crop_is_a_slice_of_numpys_pad(shape, pad, mode):
    images = noise(*shape)
    out = compiled(pad_crop, KEY, images, pad, mode)
    assert out.dtype == np.uint8
    np.testing.assert_array_equal(out, numpy_pad_crop(KEY, images, pad, mode))


@pytest.mark.parametrize(("size", "fill"), [(3, 0.0), (40, 7.0), *thorough((1, 0.0), (2, 7.0), (6, 7.0), (40, 0.0))])
def test_cutout_fills_a_square_cut_off_at_the_border(size, fill):
    """In uint8 and float32; 40 pixels cover every image wherever the centre is."""
    images = noise(32, 9, 12, 3)
    for dtype in (np.uint8, np.float32):
        out = compiled(cutout, KEY, images.astype(dtype), size, fill)
        assert out.dtype == dtype
        np.testing.assert_array_equal(out, numpy_cutout(KEY, images, size, fill))


def numpy_erasing(key, images, probability, area, aspect):
    """The erased pixels bool[b, h, w], by the paper's procedure on the same draws, one image at a time."""
    n, h, w, _ = images.shape
    key_apply, key_area, key_aspect, key_y, key_x, _ = jax.random.split(key, 6)
    areas = np.asarray(jax.random.uniform(key_area, (10, n), minval=area[0], maxval=area[1])) * np.float32(h * w)
    logs = [math.log(a) for a in aspect]
    ratios = np.exp(np.asarray(jax.random.uniform(key_aspect, (10, n), minval=logs[0], maxval=logs[1])))
    apply = np.asarray(jax.random.bernoulli(key_apply, probability, (n,)))
    sizes = []
    for i in range(n):
        pairs = zip(areas[:, i], ratios[:, i], strict=True)
        tries = [(round(math.sqrt(a * r)), round(math.sqrt(a / r))) for a, r in pairs]
        sizes.append(next(((y, x) for y, x in tries if y < h and x < w), None))
    highest = [h - (size or (0, 0))[0] + 1 for size in sizes]
    rightmost = [w - (size or (0, 0))[1] + 1 for size in sizes]
    tops = np.asarray(jax.random.randint(key_y, (n,), 0, jnp.asarray(highest)))
    lefts = np.asarray(jax.random.randint(key_x, (n,), 0, jnp.asarray(rightmost)))
    erased = np.zeros((n, h, w), bool)
    for i, size in enumerate(sizes):
        if apply[i] and size:
            erased[i, tops[i] : tops[i] + size[0], lefts[i] : lefts[i] + size[1]] = True
    return erased


@pytest.mark.parametrize(
    ("h", "w", "fill", "dtype"),  # the size decides where the boxes lie, the other two what is in them
    [(32, 32, 0, np.uint8),
     *thorough(*((12, 20, *what) for what in product((0, 7.0, "pixel", "color"), (np.uint8, np.float32))))],
)  # fmt: skip
def test_random_erasing_fills_the_papers_box(h, w, fill, dtype):
    images = np.full((200, h, w, 3), 9, dtype)
    args = (0.7, (0.05, 0.9), (0.3, 3.3))
    out = compiled(random_erasing, KEY, images, *args, fill)
    assert out.dtype == dtype
    erased = numpy_erasing(KEY, images, *args)
    if not isinstance(fill, str):
        np.testing.assert_array_equal(out, np.where(erased[..., None], np.asarray(fill, dtype), images))
        return
    np.testing.assert_array_equal(out[~erased], images[~erased])
    noise = out[erased].astype(np.float64)
    mean, deviation = (127.5, 73.9) if dtype == np.uint8 else (0, 1)
    if fill == "pixel":
        assert abs(noise.mean() - mean) < 5 * deviation / math.sqrt(noise.size)
        assert abs(noise.std() / deviation - 1) < 0.02
    for image, box in zip(out, erased, strict=True):
        if box.sum() > 1:
            assert (len(np.unique(image[box], axis=0)) == 1) == (fill == "color")


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.5, 0.25), ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])
def test_normalize(mean, std):
    images = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, -1)
    out = normalize(jnp.asarray(images), mean, std)
    assert out.dtype == jnp.float32
    expected = numpy_normalize(images, mean, std)
    np.testing.assert_allclose(out, expected, rtol=0, atol=rounding(3) * np.abs(expected).max())


def test_build_applies_the_ops_in_order_each_with_a_key_of_its_name():
    images = noise(16, 10, 10, 3)
    flip, crop, cut = (rng.fold(KEY, name, 0) for name in ("flip_lr", "pad_crop", "cutout"))
    flips = np.asarray(jax.random.bernoulli(flip, 0.5, (16, 1, 1, 1)))
    expected = numpy_pad_crop(crop, np.where(flips, images[:, :, ::-1], images), 2, "reflect")
    expected = numpy_cutout(cut, numpy_normalize(expected, (0.1, 0.2, 0.3), 0.5), 4, 0.25)
    out = jax.jit(ops.build(ALL, train=True))(KEY, images)
    np.testing.assert_allclose(out, expected, rtol=0, atol=rounding(3) * np.abs(expected).max())
    twice = jax.jit(ops.build("flip_lr|flip_lr", train=True))(KEY, images)
    assert np.abs(twice - images / np.float32(255)).max() > 0.1  # the second one has draws of its own


@pytest.mark.parametrize(
    ("width", "text", "op"),  # of images one column wide, so that mirroring does not change them
    [(1, "flip_alternating|{}", "pad_crop(3)"), (1, "flip_lr|flip_lr|{}|flip_lr", "pad_crop(3)"),
     *thorough((1, "flip_lr|{}", "pad_crop(3)"), (4, "pad_crop(0)|{}", "flip_alternating"))],
)  # fmt: skip
def test_another_op_changes_none_of_the_draws_of_an_op(width, text, op):
    alone, after = (np.asarray(jax.jit(ops.build(t.format(op), train=True))(KEY, noise(64, 9, width, 1), *BY_EXAMPLE))
                    for t in ("{}", text))  # fmt: skip
    np.testing.assert_array_equal(after, alone)


@kinds.random
def to_float(key, images):
    return images.astype(jnp.float32)


@kinds.random
def to_uint8(key, images):
    return jnp.clip(255 * images, 0, 255).astype(jnp.uint8)


@pytest.mark.parametrize(("text", "says"), [
    ("to_float", "makes float32 images in training, but uint8 ones in evaluation"),  # the model got 0 … 255, then 0 … 1
    ("normalize|to_uint8", "makes uint8 images in training, but float32 ones in evaluation"),
    ("to_float|normalize", ""),
    ("normalize|to_float", ""),
    ("flip_lr", ""),
])  # fmt: skip
def test_a_random_op_does_not_change_the_scale_of_training_alone(text, says):
    text = re.sub(r"(to_\w+)", rf"{__name__}:\1", text)
    images = jnp.full((2, 4, 4, 1), 100, jnp.uint8)
    train, evaluate = (functools.partial(ops.build(text, train), KEY, images) for train in (True, False))
    assert jax.eval_shape(evaluate).dtype == jnp.float32
    if says:
        with pytest.raises(UserError, match=says):
            jax.eval_shape(train)
    else:
        np.testing.assert_array_equal(train(), evaluate())
        np.testing.assert_allclose(evaluate(), 100 / 255, rtol=1e-6)


@pytest.mark.thorough
@pytest.mark.parametrize(("text", "mix"), [
    (ALL, "mixup(0.4)"), ("", "mixup(per_batch=True)"),
    ("trivialaugment|randaugment(1, 15)|randaugment(1, 10, ops='big_vision')|color_jitter(0.4, 0.4, 0.4, 0.1)",
     "mixup(probability=0)|cutmix(probability=1)"),
])  # fmt: skip
def test_the_ops_give_the_same_bits_on_one_device_and_on_eight(text, mix):
    """Of device ops, and of mixing ops after them."""
    images, augment, mixed = noise(40, 16, 16, 3), ops.build(text, train=True), mixing.build(mix)
    results = []
    for devices in (jax.devices()[:1], jax.devices()):
        mesh = sharding.make_mesh(devices)
        placed = sharding.put_batch({"image": images}, mesh)["image"]
        augmented = jax.jit(augment, out_shardings=sharding.sharded(mesh))(KEY, placed)
        out = jax.jit(mixed, out_shardings=sharding.sharded(mesh))(KEY, augmented)
        results.append([np.asarray(x).tobytes() for x in (augmented, *out)])
    assert len(jax.devices()) == 8
    assert results[0] == results[1]


SEED, TEXT = 7, "flip_alternating|normalize"
APPLY = jax.jit(ops.build(TEXT, train=True))


@pytest.mark.parametrize("place", ["host", "device"])
@pytest.mark.parametrize("batch_size", [8, 12])
def test_two_epochs_show_each_example_both_ways(place, batch_size):
    """Batches of 12 straddle the epochs of 40."""
    images = stream.Images(sources.fake(40, (6, 8, 1), 4)["train"], "decode(1)", SEED)
    everything = images.read(np.arange(40), np.arange(40))["image"]
    spec, mesh = stream.StreamSpec(SEED, batch_size, needs_ids=True), sharding.make_mesh(jax.devices()[:1])
    flips = {}
    for step, batch in placement.batches(place, images, spec, range(-(-4 * 40 // batch_size)), mesh):
        out = np.asarray(APPLY(None, batch["image"], jnp.uint32(SEED), batch["id"], batch["epoch"])) * 255
        ids = sampling.example_ids(SEED, step, batch_size, 40)
        np.testing.assert_array_equal(batch["id"], ids)
        for position, own, id_ in zip(itertools.count(step * batch_size), np.round(out), ids, strict=False):
            same, mirrored = (own == everything[id_]).all(), (own == everything[id_][:, ::-1]).all()
            assert same != mirrored
            flips[position // 40, id_] = mirrored
    for epoch in range(3):
        for id_ in range(40):
            assert flips[epoch, id_] != flips[epoch + 1, id_]
    first = [flips[0, id_] for id_ in range(40)]
    assert 0 < sum(first) < 40
