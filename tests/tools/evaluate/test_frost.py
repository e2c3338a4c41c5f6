"""The corruption `frost`, against its published definition, on synthetic photographs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import thorough
from PIL import Image
from scipy import ndimage, stats

from imgclf_jax.core.errors import UserError
from imgclf_jax.tools.evaluate import corruptions, frost

SHARES = {False: [(1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)],
          True: [(1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)]}  # fmt: skip
SIZES = [(240, 250), (233, 290), (188, 262), (197, 199), (251, 190)]  # rows, columns


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Five photographs, some with an alpha channel, some as JPEG."""
    folder, random = tmp_path_factory.mktemp("frost"), np.random.default_rng(0)
    for name, size in zip(frost.FILES, SIZES, strict=True):
        smooth = ndimage.gaussian_filter(random.normal(size=(*size, 3)), (2, 2, 0)) * 400 + 128
        pixels = np.clip(smooth, 0, 255).astype(np.uint8)
        if name.endswith("png"):
            pixels = np.dstack([pixels, random.integers(256, size=size, dtype=np.uint8)])
        Image.fromarray(pixels).save(folder / name)
    return folder


@pytest.fixture(scope="module")
def photographs(folder):
    return frost.read(folder)


def made(images, severity, photographs, seed=0):
    """(the corrupted images, their draws)."""
    tables = corruptions.make_tables("frost", severity, images.shape[1:], photographs)
    keys = jax.random.split(jax.random.key(seed), len(images))
    draws = jax.jit(jax.vmap(frost.draw, (0, 0, None)))(keys, images, tables)
    return np.asarray(jax.jit(frost.frost)(images, tables, draws)), np.asarray(draws)


def test_photographs_are_read_without_alpha(folder, photographs):
    assert [one.shape for one in photographs] == [(*size, 3) for size in SIZES]
    np.testing.assert_array_equal(photographs[0], np.asarray(Image.open(folder / "frost1.png"))[..., :3])


@pytest.mark.parametrize("severity", [1, 5, *thorough(2, 3, 4)])
@pytest.mark.parametrize("side", [32, 96])
def test_definition(photographs, side, severity):
    """Below 85 pixels the photographs are resized to a fifth, interpolated between pixel centres."""
    images = np.random.default_rng(1).integers(256, size=(12, side, side - 1, 3), dtype=np.uint8)
    found, draws = made(images, severity, photographs)
    image_share, frost_share = SHARES[side == 32][severity - 1]
    for image, (which, top, left), out in zip(images, draws, found, strict=True):
        seen = photographs[which].astype(float)
        if side == 32:
            rows, columns = (np.arange(round(n / 5)) * 5 + 2 for n in seen.shape[:2])  # (i + 0.5) * 5 - 0.5
            grid = np.meshgrid(rows, columns, indexing="ij")
            seen = np.stack([ndimage.map_coordinates(seen[..., c], grid, order=1) for c in range(3)], -1)
        cut = seen[top : top + side, left : left + side - 1]
        assert cut.shape == image.shape
        wanted = np.clip(image_share * image + frost_share * cut, 0, 255).astype(np.uint8)
        difference = np.abs(out.astype(int) - wanted)
        assert difference.max() <= 1
        assert (difference > 0).mean() < 0.03  # sums that are whole levels, of which float64 is sometimes short


@pytest.mark.thorough
def test_places_are_drawn_evenly(photographs):
    images = np.zeros((4000, 9, 8, 1), np.uint8)
    draws = made(images, 1, photographs)[1]
    assert stats.chisquare(np.bincount(draws[:, 0], minlength=5)).pvalue > 1e-3
    for which, (rows, columns) in enumerate((round(h / 5), round(w / 5)) for h, w in SIZES):
        own = draws[draws[:, 0] == which]
        for place, n in ((own[:, 1], rows - 9), (own[:, 2], columns - 8)):
            assert (place.min(), place.max()) == (0, n - 1)
            assert stats.chisquare(np.bincount(place, minlength=n)).pvalue > 1e-4


@pytest.mark.thorough
def test_grey_images_get_grey_frost(photographs):
    images = np.zeros((3, 20, 20, 1), np.uint8)
    found, draws = made(images, 5, photographs)
    for (which, top, left), out in zip(draws, found, strict=True):
        seen = photographs[which][2::5, 2::5][top : top + 20, left : left + 20] @ [0.299, 0.587, 0.114]
        assert np.abs(out[..., 0] - 0.45 * seen).max() <= 1.5


@pytest.mark.thorough
def test_images_that_are_larger_than_photographs():
    """Photographs are enlarged until they cover the image."""
    white = [np.full((30, 50, 3), 255, np.uint8), np.full((300, 400, 3), 255, np.uint8)]
    images = np.zeros((8, 120, 100, 3), np.uint8)
    found, draws = made(images, 1, white)
    assert set(draws[:, 0]) == {0, 1}
    assert np.unique(found).tolist() == [102]  # 0.4 of white, everywhere
    tables = frost.fit_photographs(white, (120, 100, 3), small=False)
    assert tables["sizes"].tolist() == [[121, 202], [300, 400]]


@pytest.mark.thorough
def test_mistakes(folder, photographs, tmp_path):
    images = jnp.zeros((1, 16, 16, 3), jnp.uint8)
    places = jnp.zeros(1, jnp.int32)
    with pytest.raises(UserError, match=r"frost overlays photographs: pass `photographs=frost.read"):
        corruptions.corrupt("frost", images, 1, places)
    assert corruptions.corrupt("frost", images, 1, places, photographs=photographs).max() > 0
    for name in frost.FILES[1:]:
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    with pytest.raises(UserError, match=r"the folder lacks frost1.png; .* ImageNet-C/create_c of github.com/hendrycks"):
        frost.read(tmp_path)
    (tmp_path / "frost1.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"cannot read .*frost1.png as an image .*download it again from"):
        frost.read(tmp_path)
