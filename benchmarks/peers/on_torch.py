"""PyTorch, eager or compiled: channels-last images, fused Adam, and no loader, since all images are in memory."""

import functools
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager

import numpy as np
import torch
from networks import Network
from variants import Measure, Prepare

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def device() -> str:
    """The GPU's name, or cpu."""
    return torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"


def open_variant(network: Network, compiled: bool, precision: str) -> Prepare:
    """PyTorch, with `torch.compile` or without, in float32 or under autocast to bfloat16."""
    torch._dynamo.config.recompile_limit = 64  # a program for each batch size
    precise = functools.partial(torch.autocast, DEVICE, torch.bfloat16, enabled=precision == "bfloat16")
    loaded: list[tuple[torch.Tensor, torch.Tensor]] = []  # once, for all modes and batch sizes

    def prepare(examples: tuple[np.ndarray, np.ndarray], mode: str, batch_size: int) -> Measure:
        if not loaded:
            images = torch.from_numpy(examples[0]).to(DEVICE).float() / 255  # [n, h, w, c]
            loaded.append((images, torch.from_numpy(examples[1]).to(DEVICE).long()))
        model = network.torch().to(DEVICE, memory_format=torch.channels_last)
        module = torch.compile(model, dynamic=False) if compiled else model
        if mode == "train":
            return _training(module, model.parameters(), *loaded[0], batch_size, precise)
        return _inference(module.eval(), loaded[0][0], batch_size, precise)

    return prepare


def _wait() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def _channels_last(images: torch.Tensor) -> torch.Tensor:
    return images.permute(0, 3, 1, 2)  # a view: [b, h, w, c] in memory is what PyTorch calls channels-last


def _order(count: int, batch_size: int) -> Iterator[torch.Tensor]:
    while True:
        yield from torch.randperm(count, device=DEVICE)[: count // batch_size * batch_size].split(batch_size)


def _training(
    module: torch.nn.Module, parameters: Iterator[torch.nn.Parameter], images: torch.Tensor, labels: torch.Tensor,
    batch_size: int, precise: functools.partial[AbstractContextManager],
) -> Measure:  # fmt: skip
    optimizer = torch.optim.Adam(parameters, lr=1e-3, fused=True)
    order = _order(len(images), batch_size)
    total = torch.zeros((), device=DEVICE)  # of the losses, so that no step waits for the device

    def train_step() -> None:
        some = next(order)
        optimizer.zero_grad(set_to_none=True)
        with precise():
            logits = module(_channels_last(images[some]))
        loss = torch.nn.functional.cross_entropy(logits.float(), labels[some])
        loss.backward()
        optimizer.step()
        total.add_(loss.detach())

    def measure(seconds: float) -> tuple[float, float]:
        steps, began = 0, time.perf_counter()
        while not steps or time.perf_counter() - began < seconds:
            for _ in range(4):
                train_step()
            steps += 4
        _wait()
        return steps * batch_size, time.perf_counter() - began

    measure(0)  # compiles
    measure(0)
    return measure


def _inference(
    module: torch.nn.Module, images: torch.Tensor, batch_size: int, precise: functools.partial[AbstractContextManager]
) -> Measure:
    batches = images.split(batch_size)[: len(images) // batch_size]

    def measure(seconds: float) -> tuple[float, float]:
        results: list[torch.Tensor] = []
        began = time.perf_counter()
        with torch.inference_mode(), precise():
            while not results or time.perf_counter() - began < seconds:
                batch = batches[len(results) % len(batches)]
                results.append(module(_channels_last(batch)).argmax(-1))
        torch.cat(results).cpu().numpy()  # waits for the device
        return len(results) * batch_size, time.perf_counter() - began

    for _ in range(4):  # compiles
        measure(0)
    return measure
