"""The host ops of evaluation are deterministic: random ones in `preprocess` are replaced or refused."""

import numpy as np
import pytest

from imgclf_jax.data import decode


def darker(image, by=2):
    """A user's deterministic host op."""
    return image // np.uint8(by)


@pytest.mark.parametrize(("preprocess", "expected"), [
    ("decode(3)|random_resized_crop(224)", "decode(3)|resize_small(256)|central_crop(224)"),
    ("decode(3)|random_resized_crop(32, scale=(0.5, 1.0))", "decode(3)|resize_small(37)|central_crop(32)"),
    ("decode(1)|random_resized_crop(height=8, width=12, method='bicubic')",
     "decode(1)|resize_small(14, method='bicubic')|central_crop(8, 12)"),
    (f"decode(3)|random_resized_crop(16)|{__name__}:darker(by=3)",
     f"decode(3)|resize_small(18)|central_crop(16)|{__name__}:darker(by=3)"),
    ("decode(3)|resize( 8,6 )", "decode(3)|resize( 8,6 )"),  # as it is written
])  # fmt: skip
def test_an_empty_key_follows_preprocess(preprocess, expected):
    """With the same shape, for images of any shape, and without random draws."""
    assert decode.evaluation_spec("", preprocess) == expected
    assert decode.evaluation_spec(expected, preprocess) == expected
    ops, random = decode.build(expected)
    assert not random
    train, _ = decode.build(preprocess)
    for shape in ((40, 30, 3), (9, 70, 3), (8, 6, 3)):
        image = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
        assert ops(image, 0, 0).shape == train(image, 1, 2).shape
        np.testing.assert_array_equal(ops(image, 0, 0), ops(image, 1, 2))
