"""The flags of the commands. Imports neither JAX nor TensorFlow."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from absl import flags


@dataclass(frozen=True)
class Flag:
    """A flag of commands. `value` stands for its value in help texts; it is empty for a switch."""

    text: str
    value: str = ""
    default: Any = ""
    least: Any = None  # the smallest number that is allowed
    choices: tuple[str, ...] = ()
    many: bool = False  # may be given several times: a list

    def define(self, name: str, values: flags.FlagValues) -> None:
        """Adds the flag to `values`: a switch, one of the choices, or what its default's type is."""
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


# A flag means the same to every command that takes it. What differs in name differs in meaning.
FLAGS: Mapping[str, Flag] = {
    "workdir": Flag("where the run lives (default: runs/<config name>)", "DIR"),
    "checkpoint": Flag("best, latest or a step (default: best if one is kept, else latest)", "WHICH"),
    "checkpoints": Flag("the metrics at several checkpoints: all, or steps", "all|100,200"),
    "corruptions": Flag("the accuracy on corrupted images, at five severities: all, or names", "all|fog,snow"),
    "frost": Flag("the folder of the authors' photographs frost1.png to frost5.jpg, for the corruption frost", "DIR"),
    "attack": Flag("the accuracy on adversarial examples: \"pgd(eps='8/255', steps=20)\", or an import path", "SPEC"),
    "format": Flag("how to print", "FORMAT"),  # see `Command.flag`
    "predictions": Flag("write those of each example, as .csv, .jsonl or .parquet by the name", "FILE"),
    "top_k": Flag("how many classes to show or write (default: 3)", "K", 3, least=1),
    "threshold": Flag("of several labels, the probability from which a class is predicted (default: 0.5); with commas "
                      "one for each class", "P"),
    "extend": Flag("go on with a run up to a larger --config.total, if its schedule allows it"),
    "trust": Flag("let the run's config import the modules and read over the network what it names"),
    "chips": Flag("v5e:4x4, v6e:8x8, v5p:4x4x4, h100:8, a100:8x8 (hosts x GPUs) or cpu:8", "KIND:SHAPE"),
    "shape": Flag("what the training images are, where the data are not here", "H,W,C"),
    "classes": Flag("how many classes there are, where the data are not here", "N", None, least=2),
    "targets": Flag("how many targets an example has in place of a class, where the data are not here", "N", None,
                    least=1),
    "examples": Flag("how many training images there are, where the data are not here", "N", None, least=1),
    "grace": Flag("the longest that a stop by signal may take, saving included (default: any time)", "SECONDS", 0.0,
                  least=0.0),
    "coordinator": Flag("this is one of several processes; HOST is that of process 0. Slurm, Open MPI and Cloud TPU "
                        "tell these three flags themselves", "HOST:PORT"),
    "num_processes": Flag("how many processes there are; 1 is alone, in a cluster too", "N", None, least=1),
    "process_id": Flag("which of them this one is, from 0", "I", None, least=0),
    "local_devices": Flag("which devices of this host the process takes", "all|0,1"),
    "heartbeat": Flag("a process that is silent for so long is taken for dead (default: 100)", "SECONDS", 100,
                      least=1),
    "gives": Flag("what the function of the file gives (default: probabilities)", "probabilities|logits|features",
                  "probabilities", choices=("probabilities", "logits", "features")),
    "names": Flag("whose names PyTorch's weights get: torchvision, timm, own, … (default: the usual ones)", "WHOSE"),
    "host": Flag("the address to listen on (default: 127.0.0.1, this machine alone; 0.0.0.0: all)", "ADDRESS",
                 "127.0.0.1"),
    "port": Flag("the port to listen on (default: 8000; 0: a free one)", "N", 8000, least=0),
    "sweep": Flag("values of a key, between semicolons; 'KEY=0..4' for whole numbers, \"KEY=['a', 'b']\" for any "
                  "texts; again for more keys", "'KEY=VALUE; VALUE'", many=True),
    "jobs": Flag("how many runs go on at once (default: 1); they share the cores, and the accelerators' memory", "N", 1,
                 least=1),
    "print": Flag("print the command of each run and start none"),
    "html": Flag("where to write the page, one file that needs no network and no script", "FILE"),
    "test": Flag("evaluate each run that is done, and keep what it predicts in its directory, for paired tests"),
    "output": Flag("where to write: a file, or a folder where there are several", "PATH"),
    "split": Flag("a split of the data, such as train, 'test[:100]' or \"folder('new')/train\" (default: the run's "
                  "evaluation sets)", "SPLIT"),
    "method": Flag("how to explain (default: auto, which suits the network)", "auto|gradcam|rollout|occlusion", "auto",
                   choices=("auto", "gradcam", "rollout", "occlusion")),
    "class": Flag("the class to explain (default: the predicted one)", "NAME"),
    "layer": Flag("the layer whose feature maps Grad-CAM takes (default: the last one that has any)", "NAME"),
    "window": Flag("the side of the square that covers a part, in pixels (default: a seventh of the image)", "N", 0,
                   least=0),
    "k": Flag("how many neighbours, one number or several (default: 1,5,20,100)", "K,...", "1,5,20,100"),
    "draws": Flag("how many times the few images of a class are drawn (default: 5)", "N", 5, least=2),
    "plot": Flag("draw the accuracies, as .png; this needs matplotlib: uv run --extra plot", "FILE"),
    "steps": Flag("how many steps to train (default: all that are recorded; find-lr: 200)", "N", None, least=1),
    "low": Flag("the first learning rate (default: 1e-7)", "X", 1e-7),
    "high": Flag("the last learning rate (default: 10)", "X", 10.0),
    "tolerance": Flag("the largest relative difference of a metric that counts as the same (default: 0, every bit)",
                      "X", 0.0, least=0.0),
    "bundle": Flag("train nothing, and write the run's record into this zip file, which reproduce takes elsewhere",
                   "FILE"),
    "step": Flag("which step, 0 being the first (default: 0)", "K", 0, least=0),
    "raw": Flag("before the device ops and mixing, as host ops give the images"),
    "count": Flag("how many examples to show, from the first one of the batch on (default: 128)", "N", 128, least=1),
    "profile": Flag("trace these steps, for TensorBoard or Perfetto, into WORKDIR/profile", "FIRST:LAST"),
}  # fmt: skip

PROCESSES = ("coordinator", "num_processes", "process_id", "local_devices", "heartbeat")
