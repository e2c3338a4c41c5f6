"""The Keras example on Fashion-MNIST: load, train five epochs, evaluate; prints {"accuracy": …} as its last line.

uv run benchmarks/peers/keras_example.py --seed=0 [--manual_dir=FOLDER with the four original .gz files]
"""

import argparse
import gzip
import json
import os
from pathlib import Path

os.environ["KERAS_BACKEND"] = "tensorflow"  # the fastest of its backends on CPU
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np


def load(manual_dir: str) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Loads (train, test) pairs of (images, labels), like `keras.datasets.fashion_mnist.load_data`."""
    if not manual_dir:
        return keras.datasets.fashion_mnist.load_data()

    def read(name: str, header: int) -> np.ndarray:
        return np.frombuffer(gzip.decompress(Path(manual_dir, name).read_bytes()), np.uint8, offset=header)

    train, test = (
        (read(f"{part}-images-idx3-ubyte.gz", 16).reshape(-1, 28, 28), read(f"{part}-labels-idx1-ubyte.gz", 8))
        for part in ("train", "t10k")
    )
    return train, test


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--manual_dir", default="")
    args = parser.parse_args()
    keras.utils.set_random_seed(args.seed)
    (x_train, y_train), (x_test, y_test) = load(args.manual_dir)
    x_train, x_test = (x.astype("float32")[..., None] / 255 for x in (x_train, x_test))
    model = keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            keras.layers.Conv2D(32, 3, activation="relu"),
            keras.layers.MaxPooling2D(2),
            keras.layers.Conv2D(64, 3, activation="relu"),
            keras.layers.MaxPooling2D(2),
            keras.layers.Flatten(),
            keras.layers.Dense(64, activation="relu"),
            keras.layers.Dense(10),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer="adam", loss=loss, metrics=["accuracy"])
    model.fit(x_train, y_train, epochs=5, verbose=0)
    print(json.dumps({"accuracy": model.evaluate(x_test, y_test, verbose=0)[1]}))


if __name__ == "__main__":
    main()
