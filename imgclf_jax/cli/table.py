"""The commands and their flags, with the help texts. Imports neither JAX nor TensorFlow."""

import argparse
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from imgclf_jax.cli import openers


def _flag(text: str, value: str, default: Any = "", **more: Any) -> dict[str, Any]:
    """Arguments of `add_argument` for a flag with the placeholder `value`."""
    return {"help": text, "metavar": value, "default": default, **more}


def _switch(text: str) -> dict[str, Any]:
    return {"help": text, "action": "store_true"}


def _at_least(least: float) -> Callable[[str], float]:
    """The type of a flag whose numbers, of the type of `least`, are `least` or more."""

    def number(text: str) -> float:
        value = type(least)(text)
        if not value >= least:  # nor is NaN
            raise argparse.ArgumentTypeError(f"{text}: must be {least} or more")
        return value

    return number


def _steps(text: str) -> tuple[int, int]:
    """Parses '10:20' to (10, 20)."""
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if not match or int(match[1]) >= int(match[2]):
        raise argparse.ArgumentTypeError(f"{text}: must be FIRST:LAST with FIRST < LAST, such as 10:20")
    return int(match[1]), int(match[2])


def _output(text: str) -> str:
    """The type of a flag for a file to write."""
    if "://" not in text and not Path(text).parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: the directory {str(Path(text).parent)!r} does not exist")
    return text


_POSITIVE, _NATURAL = _at_least(1), _at_least(0)

# A flag means the same in every command.
FLAGS: Mapping[str, dict[str, Any]] = {
    "workdir": _flag("the run's directory (default: runs/<config name>)", "DIR"),
    "checkpoint": _flag("best, latest or a step (default: best if one is kept, else latest)", "WHICH"),
    "corruptions": _flag("measure accuracy on corrupted images, at five severities: all, or names", "all|NAME,..."),
    "attack": _flag("measure accuracy under attack: \"pgd(eps='8/255', steps=20)\", or an import path", "SPEC"),
    "calibrate": {"help": "fit the calibration of probabilities to the set val, and write it into the run",
                  "default": "", "choices": ("temperature", "vector", "none")},
    "ood": _flag("measure how well scores tell these images from the evaluation sets", "DIR|SOURCE/SPLIT"),
    "temperature": _flag("divide logits by T, instead of the run's calibration", "T", None, type=_at_least(1e-3)),
    "reject": _flag("leave the least confident undecided: this fraction, measured on val", "RATE", None, type=float),
    "coverage": _flag("show the set of classes that holds the true one this often", "P", None, type=float),
    "format": {"help": "the output format (default: the first)"},  # see `Command.formats`
    "predictions": _flag("write the prediction for each example to a .csv or .jsonl file", "FILE", type=_output),
    "top_k": _flag("how many classes to show or write (default: 3)", "K", 3, type=_POSITIVE),
    "threshold": _flag("for multi-label models, predict classes of at least this probability (default: 0.5); give one "
                       "for all classes, or one per class, separated by commas", "P"),
    "trust": _switch("let the run's config import modules and read from the network"),
    "chips": _flag("v5e:4x4, v6e:8x8, v5p:4x4x4, h100:8, a100:8x8 (hosts x GPUs) or cpu:8", "KIND:SHAPE"),
    "shape": _flag("the shape of the training images, if the data are absent", "H,W,C"),
    "classes": _flag("the number of classes, if the data are absent", "N", None, type=_at_least(2)),
    "targets": _flag("the number of targets, instead of classes, if the data are absent", "N", None, type=_POSITIVE),
    "examples": _flag("the number of training images, if the data are absent", "N", None, type=_POSITIVE),
    "coordinator": _flag("run as one of several processes; HOST is the host of process 0. Slurm, Open MPI and Cloud "
                         "TPU set this flag and the next two automatically", "HOST:PORT"),
    "num_processes": _flag("the number of processes; 1: a single one, even in a cluster", "N", None, type=_POSITIVE),
    "process_id": _flag("the index of this process, from 0", "I", None, type=_NATURAL),
    "local_devices": _flag("which devices of this host the process uses", "all|0,1"),
    "heartbeat": _flag("declare a process dead after this much silence (default: 100)", "SECONDS", 100, type=_POSITIVE),
    "gives": {"help": "the output of the exported function (default: probabilities)", "default": "probabilities",
              "choices": ("probabilities", "logits", "features")},
    "names": _flag("the naming scheme of PyTorch weights: torchvision, timm, own, … (default: the usual one of the "
                   "architecture)", "SCHEME"),
    "host": _flag("the address to listen on (default: 127.0.0.1; 0.0.0.0: all)", "ADDRESS", "127.0.0.1"),
    "port": _flag("the port to listen on (default: 8000; 0: a free one)", "N", 8000, type=_NATURAL),
    "cors": _flag("let pages of this origin send requests, or of any with '*'; repeat the flag for more (default: only "
                  "this server's page)", "ORIGIN", [], action="append"),
    "sweep": _flag("the values of a key, separated by semicolons; 'KEY=0..4' for integers, \"KEY=['a', 'b']\" for "
                   "strings with semicolons; repeat the flag for more keys", "'KEY=VALUE; VALUE'", [], action="append"),
    "jobs": _flag("how many runs train at once (default: 1); they share the cores and the accelerators' memory", "N", 1,
                  type=_POSITIVE),
    "print": _switch("print the command of each run without starting any"),
    "html": _flag("where to write the page, a self-contained HTML file without scripts", "FILE", type=_output),
    "test": _switch("evaluate each finished run and save its predictions in its directory, for paired tests"),
    "output": _flag("where to write: a file, or a folder if there are several", "PATH"),
    "split": _flag("a split of the data, such as train, 'test[:100]' or \"folder('new')/train\" (default: the run's "
                   "evaluation sets)", "SPLIT"),
    "method": {"help": "the attribution method (default: auto, which fits the network)", "default": "auto",
               "choices": ("auto", "gradcam", "occlusion")},
    "class": _flag("the class to explain (default: the predicted one)", "NAME"),
    "layer": _flag("the layer whose feature maps Grad-CAM uses (default: the last one with feature maps)", "NAME"),
    "window": _flag("the side of the occluding square, in pixels (default: an image's / 7)", "N", 0, type=_NATURAL),
    "k": _flag("how many neighbors, one number or several (default: 1,5,20,100)", "K,...", "1,5,20,100"),
    "draws": _flag("how many few-shot subsets to draw (default: 5)", "N", 5, type=_at_least(2)),
    "steps": _flag("how many steps to train (default: all recorded ones; of find-lr: 200)", "N", None, type=_POSITIVE),
    "low": _flag("the first learning rate (default: 1e-7)", "X", 1e-7, type=float),
    "high": _flag("the last learning rate (default: 10)", "X", 10.0, type=float),
    "tolerance": _flag("the largest relative difference of equal metrics (default: 0)", "X", 0.0, type=_at_least(0.0)),
    "bundle": _flag("only write the run's record to this zip file, for `reproduce` on another machine", "FILE"),
    "step": _flag("which step, starting at 0 (default: 0)", "K", 0, type=_NATURAL),
    "raw": _switch("show the images before device ops and mixing, as the host ops return them"),
    "count": _flag("how many of the batch's first examples to show (default: 128)", "N", 128, type=_POSITIVE),
    "profile": _flag("trace these steps into WORKDIR/profile, for TensorBoard", "FIRST:LAST", None, type=_steps),
}  # fmt: skip

PROCESSES = ("coordinator", "num_processes", "process_id", "local_devices", "heartbeat")


@dataclass(frozen=True)
class Command:
    """A command `launch.py NAME`, run by `main` of `module`.

    `main` gets the config and work directory that `opens` returns, unless the command has no config; the files, if it
    takes any; the CommandLine, if it needs that; and its other flags by name.
    """

    summary: str
    module: str  # within the package
    opens: openers.Opener
    flags: tuple[str, ...] = ()
    files: str = ""  # the placeholder for its files in help texts; empty if it takes none
    more: str = ""  # a paragraph for its help
    formats: tuple[str, ...] = ("table", "json")  # the values of --format, the first is the default
    extra: str = ""  # the extra that it needs
    before_jax: str = ""  # "module:function", called with files and flags before JAX is imported
    needs_command_line: bool = False


COMMANDS: Mapping[str, Command] = {
    "train": Command(
        "train or resume the run in the work directory (the default command)",
        "train.command", openers.from_file, ("workdir", "profile", *PROCESSES),
        more="A work directory with checkpoints resumes from the latest, if the config is the same.",
    ),
    "evaluate": Command(
        "evaluate a trained run on each of its evaluation sets",
        "tools.evaluate.command", openers.from_run_or_weights,
        ("workdir", "checkpoint", "corruptions", "attack", "calibrate", "ood", "format", "predictions", "top_k",
         "trust", *PROCESSES),
    ),
    "predict": Command(
        "classify new images with a trained run",
        "tools.predict.command", openers.from_run_or_weights,
        ("workdir", "checkpoint", "format", "top_k", "threshold", "temperature", "reject", "coverage", "trust"),
        "FILE|DIR|GLOB|-",
        more="Quote a GLOB, such as 'photos/**/*.jpg'. - reads file names from standard input, one per line.",
        formats=("table", "json", "jsonl", "csv"), before_jax="tools.pages.inputs:check",
    ),
    "report": Command(
        "write a page about a trained run: learning curves, scores, confusions, worst mistakes, provenance",
        "tools.report.command", openers.from_run, ("workdir", "checkpoint", "html", "trust"),
        more="The page goes to WORKDIR/report.html, or to --html.",
    ),
    "export": Command(
        "export a trained model for JAX, TensorFlow, ONNX or PyTorch",
        "tools.export.command", openers.from_run_or_weights,
        ("workdir", "checkpoint", "gives", "names", "temperature", "trust"), "FILE",
        more="The suffix selects the format: .stablehlo for JAX, .savedmodel for TensorFlow (a folder), .onnx, or "
             ".safetensors, the weights under the parameter names of a PyTorch model.",
        before_jax="tools.export.formats:check",
    ),
    "serve": Command(
        "serve a trained run as a web page and an HTTP API",
        "tools.serve.command", openers.from_run_or_weights,
        ("workdir", "checkpoint", "host", "port", "cors", "temperature", "trust"),
        extra="serve",
    ),
    "sweep": Command(
        "train a run for each combination of the values of several keys",
        "tools.sweep.command", openers.from_file, ("workdir", "sweep", "jobs", "print"),
        more="Each run is a plain `train` in WORKDIR/KEY=VALUE,…. Run the same command again to continue.",
        before_jax="tools.sweep.plan:use_cpu", needs_command_line=True,
    ),
    "compare": Command(
        "compare runs: results by the keys that differ, averaged over seeds, with paired tests and curves",
        "tools.compare.command", openers.without_config, ("format", "html", "test", "trust"), "DIR",
        more="The command finds every run below DIR. Runs that differ only in their seed share a row.",
        formats=("table", "csv", "json"),
    ),
    "status": Command(
        "show how far runs are, what went wrong, and where their time went",
        "tools.status.command", openers.without_config, ("format",), "DIR",
        more="The command finds every run below DIR. For one run, a second table has the time by phase.",
    ),
    "features": Command(
        "write the network's features for images: one vector each, with names and labels",
        "tools.probe.features", openers.from_run_or_weights,
        ("workdir", "checkpoint", "output", "split", "trust"), "[FILE|DIR|GLOB|-]",
        more="--output is an .npz file. Without images on the command line, the command uses those of --split.",
        before_jax="tools.pages.inputs:check",
    ),
    "probe": Command(
        "measure the features: nearest neighbors, a linear probe, few-shot classification",
        "tools.probe.command", openers.from_run_or_weights,
        ("workdir", "checkpoint", "format", "k", "draws", "trust"),
    ),
    "explain": Command(
        "draw heatmaps of the image regions that a trained run's predictions depend on",
        "tools.explain.command", openers.from_run_or_weights,
        ("workdir", "checkpoint", "format", "method", "class", "layer", "window", "output", "trust"),
        "FILE|DIR|GLOB|-",
        more="The heatmaps go to the folder --output (default: explained).",
        before_jax="tools.pages.inputs:check",
    ),
    "reproduce": Command(
        "train a run again from its record, and compare every digest and metric",
        "tools.reproduce.command", openers.from_record,
        ("output", "steps", "tolerance", "format", "bundle", "trust", *PROCESSES), "WORKDIR|BUNDLE",
        more="It trains in --output (default: a temporary directory), and exits with 0 if the runs are equal, else 1.",
    ),
    "show-batch": Command(
        "draw the batch that a step trains on, with labels and ids",
        "tools.reproduce.show_batch", openers.from_run_or_file,
        ("workdir", "step", "raw", "count", "output", "format", "trust"),
        more="--output is a .png file (default: batch-K.png in --workdir, else in the working directory).",
    ),
    "dryrun": Command(
        "compile a run for absent chips: memory, time and bottleneck",
        "tools.dryrun.command", openers.from_file,
        ("workdir", "chips", "shape", "classes", "targets", "examples", "format"),
        before_jax="tools.dryrun.topology:prepare_from_flags",
    ),
    "find-lr": Command(
        "suggest a learning rate by a range test: a short run whose learning rate grows until the loss diverges",
        "tools.find_lr.command", openers.from_file, ("steps", "low", "high", "format", "html"),
    ),
    "config": Command("print the value and documentation of every key", "", openers.from_file),
}  # fmt: skip
