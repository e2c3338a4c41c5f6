"""The flags of all commands. Imports neither JAX nor TensorFlow."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from absl import flags

from imgclf_jax.core.typing import Value


@dataclass(frozen=True)
class Flag:
    """A command-line flag. `value` is its placeholder in help texts, empty for a switch."""

    text: str
    value: str = ""
    default: Value = ""
    least: Any = None  # the smallest allowed number
    choices: tuple[str, ...] = ()
    many: bool = False  # may be repeated; its values make a list

    def define(self, name: str, values: flags.FlagValues) -> None:
        """Adds the flag to `values`, with the type of its default unless it is a switch or has choices."""
        if not self.value:
            flags.DEFINE_bool(name, False, "", flag_values=values)
        elif self.many:
            flags.DEFINE_multi_string(name, [], "", flag_values=values)
        elif self.choices:
            flags.DEFINE_enum(name, self.default, list(self.choices), "", flag_values=values)
        elif isinstance(self.default, float):
            flags.DEFINE_float(name, self.default, "", lower_bound=self.least, flag_values=values)
        elif self.default is None or isinstance(self.default, int):
            flags.DEFINE_integer(name, self.default, "", lower_bound=self.least, flag_values=values)
        else:
            flags.DEFINE_string(name, self.default, "", flag_values=values)


# A flag means the same in every command.
FLAGS: Mapping[str, Flag] = {
    "workdir": Flag("the run's directory (default: runs/<config name>)", "DIR"),
    "checkpoint": Flag("best, latest or a step (default: best if one is kept, else latest)", "WHICH"),
    "checkpoints": Flag("evaluate several checkpoints: all, or a list of steps", "all|100,200"),
    "corruptions": Flag("measure accuracy on corrupted images, at five severities: all, or names", "all|fog,snow"),
    "frost": Flag("the folder with the authors' photographs frost1.png to frost5.jpg, for the corruption frost", "DIR"),
    "attack": Flag("measure accuracy on adversarial examples: \"pgd(eps='8/255', steps=20)\", or an import path",
                   "SPEC"),
    "format": Flag("the output format", "FORMAT"),  # see `Command.flag`
    "predictions": Flag("write the prediction for each example to a .csv or .jsonl file", "FILE"),
    "top_k": Flag("how many classes to show or write (default: 3)", "K", 3, least=1),
    "threshold": Flag("for multi-label models, predict classes of at least this probability (default: 0.5); give one "
                      "for all classes, or one per class, separated by commas", "P"),
    "extend": Flag("continue a run up to a larger --config.total, if its schedule allows it"),
    "trust": Flag("let the run's config import modules and read from the network"),
    "chips": Flag("v5e:4x4, v6e:8x8, v5p:4x4x4, h100:8, a100:8x8 (hosts x GPUs) or cpu:8", "KIND:SHAPE"),
    "shape": Flag("the shape of the training images, if the data are absent", "H,W,C"),
    "classes": Flag("the number of classes, if the data are absent", "N", None, least=2),
    "targets": Flag("the number of targets per example (instead of classes), if the data are absent", "N", None,
                    least=1),
    "examples": Flag("the number of training images, if the data are absent", "N", None, least=1),
    "coordinator": Flag("run as one of several processes; HOST is the host of process 0. Slurm, Open MPI and Cloud TPU "
                        "set this flag and the next two automatically", "HOST:PORT"),
    "num_processes": Flag("the number of processes; 1 runs a single process, even in a cluster", "N", None, least=1),
    "process_id": Flag("the index of this process, from 0", "I", None, least=0),
    "local_devices": Flag("which devices of this host the process uses", "all|0,1"),
    "heartbeat": Flag("declare a process dead after this much silence (default: 100)", "SECONDS", 100, least=1),
    "gives": Flag("the output of the exported function (default: probabilities)", "probabilities|logits|features",
                  "probabilities", choices=("probabilities", "logits", "features")),
    "names": Flag("the naming scheme of PyTorch weights: torchvision, timm, own, … (default: the usual one of the "
                  "architecture)", "SCHEME"),
    "host": Flag("the address to listen on (default: 127.0.0.1, this machine only; 0.0.0.0: all)", "ADDRESS",
                 "127.0.0.1"),
    "port": Flag("the port to listen on (default: 8000; 0: a free one)", "N", 8000, least=0),
    "cors": Flag("let pages of this origin send requests, or of any with '*'; repeat the flag for more (default: only "
                 "this server's page)", "ORIGIN", many=True),
    "request_log": Flag("append a line of JSON per request to this file; - for standard error (default: no log)",
                        "FILE"),
    "sweep": Flag("the values of a key, separated by semicolons; 'KEY=0..4' for integers, \"KEY=['a', 'b']\" for "
                  "strings with semicolons; repeat the flag for more keys", "'KEY=VALUE; VALUE'", many=True),
    "jobs": Flag("how many runs train at once (default: 1); they share the cores and the accelerators' memory", "N", 1,
                 least=1),
    "print": Flag("print the command of each run without starting any"),
    "html": Flag("where to write the page, a self-contained HTML file without scripts", "FILE"),
    "test": Flag("evaluate each finished run and save its predictions in its directory, for paired tests"),
    "output": Flag("where to write: a file, or a folder if there are several", "PATH"),
    "split": Flag("a split of the data, such as train, 'test[:100]' or \"folder('new')/train\" (default: the run's "
                  "evaluation sets)", "SPLIT"),
    "method": Flag("the attribution method (default: auto, which fits the network)", "auto|gradcam|rollout|occlusion",
                   "auto", choices=("auto", "gradcam", "rollout", "occlusion")),
    "class": Flag("the class to explain (default: the predicted one)", "NAME"),
    "layer": Flag("the layer whose feature maps Grad-CAM uses (default: the last one with feature maps)", "NAME"),
    "window": Flag("the side of the occluding square, in pixels (default: a seventh of the image)", "N", 0, least=0),
    "k": Flag("how many neighbors, one number or several (default: 1,5,20,100)", "K,...", "1,5,20,100"),
    "draws": Flag("how many few-shot subsets to draw (default: 5)", "N", 5, least=2),
    "plot": Flag("plot the accuracies to a .png file; needs matplotlib", "FILE"),
    "steps": Flag("how many steps to train (default: all recorded steps; find-lr: 200)", "N", None, least=1),
    "low": Flag("the first learning rate (default: 1e-7)", "X", 1e-7),
    "high": Flag("the last learning rate (default: 10)", "X", 10.0),
    "tolerance": Flag("the largest relative difference at which metrics count as equal (default: 0, bit-exact)", "X",
                      0.0, least=0.0),
    "bundle": Flag("only write the run's record to this zip file, for `reproduce` on another machine", "FILE"),
    "step": Flag("which step, starting at 0 (default: 0)", "K", 0, least=0),
    "raw": Flag("show the images before device ops and mixing, as the host ops return them"),
    "count": Flag("how many examples to show, from the start of the batch (default: 128)", "N", 128, least=1),
    "profile": Flag("trace these steps into WORKDIR/profile, for TensorBoard or Perfetto", "FIRST:LAST"),
}  # fmt: skip

PROCESSES = ("coordinator", "num_processes", "process_id", "local_devices", "heartbeat")
