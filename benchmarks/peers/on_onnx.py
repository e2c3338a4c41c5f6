"""Inference engines, onnxruntime and OpenVINO: PyTorch's network exported to ONNX for each batch size."""

import itertools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from networks import Network
from variants import Measure, Prepare


def device() -> str:
    """Both run on CPU."""
    return "cpu"


def open_variant(network: Network, engine: str, precision: str) -> Prepare:
    """The engine with its default settings, but for OpenVINO's precision."""
    load = {"onnxruntime": _load_onnxruntime, "openvino": _load_openvino}[engine](precision)

    def prepare(examples: tuple[np.ndarray, np.ndarray], mode: str, batch_size: int) -> Measure:
        images = np.ascontiguousarray(examples[0].astype(np.float32).transpose(0, 3, 1, 2) / 255)  # [n, c, h, w]
        batches = images[: len(images) // batch_size * batch_size].reshape(-1, batch_size, *images.shape[1:])
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "network.onnx"
            torch.onnx.export(network.torch().eval(), (torch.from_numpy(batches[0]),), path, dynamo=True, verbose=False)
            run = load(path)

        def measure(seconds: float) -> tuple[float, float]:
            done, began = 0, time.perf_counter()
            for batch in itertools.cycle(batches):
                run(batch).argmax(-1)
                done += batch_size
                if time.perf_counter() - began >= seconds:
                    break
            return done, time.perf_counter() - began

        measure(0)
        return measure

    return prepare


def _load_onnxruntime(precision: str) -> Callable[[Path], Callable[[np.ndarray], np.ndarray]]:
    import onnxruntime

    def load(path: Path) -> Callable[[np.ndarray], np.ndarray]:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        return lambda images: session.run(None, {name: images})[0]

    return load


def _load_openvino(precision: str) -> Callable[[Path], Callable[[np.ndarray], np.ndarray]]:
    import openvino

    core: Any = openvino.Core()
    short = {"float32": "f32", "bfloat16": "bf16"}[precision]
    if precision == "bfloat16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise ValueError("OpenVINO computes in float32 on this CPU")

    def load(path: Path) -> Callable[[np.ndarray], np.ndarray]:
        model = core.compile_model(core.read_model(path), "CPU", {"INFERENCE_PRECISION_HINT": short})
        request = model.create_infer_request()
        return lambda images: request.infer([images])[0]

    return load
