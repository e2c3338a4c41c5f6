"""The published definitions of the common corruptions, computed slowly and directly by NumPy, SciPy and Pillow.

Each takes one image f64[h, w, c] from 0 to 1, a constant and the draws, and gives uint8[h, w, c].
"""

import colorsys

import numpy as np
from PIL import Image
from scipy import ndimage, stats


def truncated(values: np.ndarray) -> np.ndarray:
    """As np.uint8 does, what is within 1e-9 of a whole level being that level."""
    return np.floor(np.clip(values, 0, 1) * 255 + 1e-9).astype(np.uint8)


def gaussian_noise(x, c, noise):
    return truncated(x + c * noise)


def shot_noise(x, c, draws):
    return truncated(stats.poisson.ppf(draws.astype(float), x * c).clip(0) / c)


def impulse_noise(x, c, draws):
    hit, salt = draws
    out = x.copy()
    out[(hit <= c) & (salt <= 0.5)] = 1
    out[(hit <= c) & (salt > 0.5)] = 0
    return truncated(out)


def defocus_blur(x, c, _):
    radius, sigma = c
    reach, size = (8, 3) if radius <= 8 else (radius, 5)
    kernel = np.array([[float(i * i + j * j <= radius**2) for i in range(-reach, reach + 1)]
                       for j in range(-reach, reach + 1)])  # fmt: skip
    kernel /= kernel.sum()
    line = np.array([np.exp(-(i**2) / (2 * sigma**2)) for i in range(-(size // 2), size // 2 + 1)])
    soft = np.outer(line, line) / line.sum() ** 2
    kernel = ndimage.correlate(kernel, soft, mode="mirror")
    return truncated(np.stack([ndimage.correlate(x[..., i], kernel, mode="mirror") for i in range(x.shape[2])], -1))


def glass_blur(x, c, moves):
    sigma, reach, rounds = c

    def blurred(values):
        return ndimage.gaussian_filter(values, (sigma, sigma, 0), mode="nearest", truncate=4)

    pixels = truncated(blurred(x))
    h, w, _ = x.shape
    for i in range(rounds):
        for row in range(h - reach, reach, -1):
            for column in range(w - reach, reach, -1):
                dy, dx = moves[i, :, row, column]
                one, other = (row, column), (row + dy, column + dx)
                pixels[one], pixels[other] = pixels[other], pixels[one]  # views: see the module's docstring
    return truncated(blurred(pixels / 255))


def motion_line(x, radius, sigma, degrees):
    """ImageMagick's MotionBlurImage, the virtual pixels outside being those of the edge."""
    count = 2 * int(np.ceil(radius)) + 1
    kernel = np.exp(-(np.arange(count) ** 2) / (2 * sigma**2)) / (np.sqrt(2 * np.pi) * sigma)
    kernel /= kernel.sum()
    h, w, _ = x.shape
    out = np.zeros(x.shape)
    for i in range(count):
        down = int(np.ceil(i * np.sin(np.radians(float(degrees))) - 0.5))
        right = int(np.ceil(i * np.cos(np.radians(float(degrees))) - 0.5))
        rows, columns = np.clip(np.arange(h) + down, 0, h - 1), np.clip(np.arange(w) + right, 0, w - 1)
        out += kernel[i] * x[rows][:, columns]
    return out


def motion_blur(x, c, degrees):
    return np.floor(motion_line(x * 255, *c, degrees) + 0.5).astype(np.uint8)


def clipped_zoom(x, factor):
    n = x.shape[0]
    taken = int(np.ceil(n / factor))
    top = (n - taken) // 2
    large = ndimage.zoom(x[top : top + taken, top : top + taken], (factor, factor, 1), order=1, mode="nearest")
    cut = (large.shape[0] - n) // 2
    return large[cut : cut + n, cut : cut + n]


def zoom_blur(x, c, _):
    factors = np.arange(*c)
    return truncated((x + sum(clipped_zoom(x, factor) for factor in factors)) / (len(factors) + 1))


def snow(x, c, draws):
    flakes, degrees = draws
    layer = clipped_zoom(c[0] + c[1] * flakes[..., None].astype(np.float64), c[2])
    layer[layer < c[3]] = 0
    layer = np.floor(motion_line(truncated(layer).astype(float), c[4], c[5], degrees) + 0.5) / 255
    luma = x @ [[0.299], [0.587], [0.114]] if x.shape[2] == 3 else x
    white = c[6] * x + (1 - c[6]) * np.maximum(x, luma * 1.5 + 0.5)
    return truncated(white + layer + np.rot90(layer, k=2))


def diamond_square(draws, decay):
    n = len(draws)
    field, step, w = np.zeros((n, n)), n, 100.0
    while step >= 2:
        half = step // 2
        for places, ways in (
            ([(half, half)], [(-half, -half), (-half, half), (half, -half), (half, half)]),
            ([(0, half), (half, 0)], [(-half, 0), (half, 0), (0, -half), (0, half)]),
        ):
            for y0, x0 in places:
                for y in range(y0, n, step):
                    for x in range(x0, n, step):
                        near = [field[(y + dy) % n, (x + dx) % n] for dy, dx in ways]
                        field[y, x] = sum(near) / 4 + w * w * draws[y, x]
        step, w = half, w / decay
    return (field - field.min()) / (field.max() - field.min())


def fog(x, c, draws):
    h, w, _ = x.shape
    field = diamond_square(draws, c[1])[:h, :w, None]
    return truncated((x + c[0] * field) * x.max() / (x.max() + c[0]))


def brightness(x, c, _):
    out = np.empty((*x.shape[:2], 3))
    for place in np.ndindex(*x.shape[:2]):
        hue, saturation, value = colorsys.rgb_to_hsv(*np.broadcast_to(x[place], 3))
        out[place] = colorsys.hsv_to_rgb(hue, saturation, min(value + c, 1))
    return truncated(out[..., : x.shape[2]])


def contrast(x, c, _):
    mean = x.mean((0, 1))
    return truncated((x - mean) * c + mean)


def elastic_transform(x, c, draws):
    strength, sigma, affine = c
    points, ways = draws
    h, w, channels = x.shape
    centre, s = np.array([w // 2, h // 2]), min(h, w) // 3
    before = centre + s * np.array([[1, 1], [1, -1], [-1, -1]])  # (x, y)
    after = before + affine * points
    matrix = np.linalg.solve(np.column_stack([after, np.ones(3)]), before)  # from the new place to the old one
    grid = np.stack([*np.meshgrid(np.arange(w), np.arange(h)), np.ones((h, w))], -1)
    from_x, from_y = np.moveaxis(grid @ matrix, -1, 0)
    smooth = [ndimage.gaussian_filter(ways[..., i].astype(float), sigma, mode="reflect", truncate=3) if sigma else 0
              for i in (0, 1)]  # fmt: skip
    to_x, to_y = grid[..., 0] + strength * smooth[0], grid[..., 1] + strength * smooth[1]
    out = []
    for i in range(channels):
        moved = ndimage.map_coordinates(x[..., i], [from_y, from_x], order=1, mode="mirror")
        out.append(ndimage.map_coordinates(moved, [to_y, to_x], order=1, mode="reflect"))
    return truncated(np.stack(out, -1))


def pixelate(x, c, _):
    h, w, channels = x.shape
    image = Image.fromarray(np.round(x * 255).astype(np.uint8).squeeze())
    image = image.resize((int(w * c), int(h * c)), Image.Resampling.BOX).resize((w, h), Image.Resampling.BOX)
    return np.asarray(image).reshape(h, w, channels)


# The constants of ImageNet-C and of CIFAR-10-C, severity 1 to 5.
DEFINITIONS = {
    gaussian_noise: ([0.08, 0.12, 0.18, 0.26, 0.38], [0.04, 0.06, 0.08, 0.09, 0.10]),
    shot_noise: ([60, 25, 12, 5, 3], [500, 250, 100, 75, 50]),
    impulse_noise: ([0.03, 0.06, 0.09, 0.17, 0.27], [0.01, 0.02, 0.03, 0.05, 0.07]),
    defocus_blur: ([(3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)],
                   [(0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)]),
    glass_blur: ([(0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)],
                 [(0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)]),
    motion_blur: ([(10, 3), (15, 5), (15, 8), (15, 12), (20, 15)], [(6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)]),
    zoom_blur: ([(1, 1.11, 0.01), (1, 1.16, 0.01), (1, 1.21, 0.02), (1, 1.26, 0.02), (1, 1.31, 0.03)],
                [(1, 1.06, 0.01), (1, 1.11, 0.01), (1, 1.16, 0.01), (1, 1.21, 0.01), (1, 1.26, 0.01)]),
    snow: ([(0.1, 0.3, 3, 0.5, 10, 4, 0.8), (0.2, 0.3, 2, 0.5, 12, 4, 0.7), (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
            (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65), (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55)],
           [(0.1, 0.2, 1, 0.6, 8, 3, 0.95), (0.1, 0.2, 1, 0.5, 10, 4, 0.9), (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85), (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8)]),
    fog: ([(1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)],
          [(0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)]),
    brightness: ([0.1, 0.2, 0.3, 0.4, 0.5], [0.05, 0.1, 0.15, 0.2, 0.3]),
    contrast: ([0.4, 0.3, 0.2, 0.1, 0.05], [0.75, 0.5, 0.4, 0.3, 0.15]),
    elastic_transform: ([(488, 170.8, 24.4), (488, 19.52, 48.8), (12.2, 2.44, 4.88), (17.08, 2.44, 4.88),
                         (29.28, 2.44, 4.88)],
                        [(0, 0, 2.56), (1.6, 6.4, 2.24), (2.56, 1.92, 1.92), (3.2, 1.28, 1.6), (3.2, 0.96, 0.96)]),
    pixelate: ([0.6, 0.5, 0.4, 0.3, 0.25], [0.95, 0.9, 0.85, 0.75, 0.65]),
}  # fmt: skip
