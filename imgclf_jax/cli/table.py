"""Every command: what it does, which flags it takes, and its help. Imports neither JAX nor TensorFlow."""

import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from imgclf_jax.cli.flags import FLAGS, PROCESSES, Flag

WIDTH = 120


@dataclass(frozen=True)
class Command:
    """A command `launch.py NAME`, run by `main` of its module, see `module_of`.

    `of` says what its config is: that of the file `--config`; that of the run in `--workdir`; or either, the file's
    where `--config.init_from` names weights. `main` is given the config, the work directory (None for weights), the
    files if it takes some, and its other flags by their names. A command of "nothing" has neither config nor work
    directory, and its `main` is given files and flags alone.
    """

    summary: str
    of: Literal["config", "run", "run or weights", "run or config", "record", "nothing"]
    flags: tuple[str, ...] = ()
    files: str = ""  # what stands for its files in help texts; it takes none if this is empty
    more: str = ""  # a paragraph for its help
    examples: tuple[str, ...] = ()  # what follows "launch.py NAME"
    formats: tuple[str, ...] = ("table", "json")  # what --format may be, if it takes that; the first one is the default

    def flag(self, name: str) -> Flag:
        """What a flag is to this command."""
        if name == "workdir" and self.of == "run or config":
            return Flag("where the run lives (default: none, and --config says what to do)", "DIR")
        if name != "format":
            return FLAGS[name]
        text = f"how to print (default: {self.formats[0]})"
        return Flag(text, "|".join(self.formats), self.formats[0], choices=self.formats)

    @property
    def in_processes(self) -> bool:
        """Whether it can be run in several processes."""
        return "coordinator" in self.flags


COMMANDS: Mapping[str, Command] = {
    "train": Command(
        "train, or resume, the run in the work directory (the default command)", "config",
        ("workdir", "extend", "grace", "profile", *PROCESSES),
        more="A work directory with checkpoints is resumed. If its config differs, it stops and shows the difference.",
        examples=("", "--config configs/folder.py:photos --workdir runs/a", "--config.total='20 epochs'"),
    ),
    "evaluate": Command(
        "the metrics and scores of a trained run on each of its evaluation sets", "run or weights",
        ("workdir", "checkpoint", "checkpoints", "corruptions", "frost", "attack", "format", "predictions", "top_k",
         "trust", *PROCESSES),
        more="Any split, folder or .npz file can be an evaluation set: --config.data.eval.NAME=SPLIT, or "
             "--config.data.eval.NAME=SOURCE/SPLIT.",
        examples=("--workdir runs/a", "--workdir runs/a --predictions all.csv", "--workdir runs/a --checkpoints=all",
                  "--workdir runs/a --corruptions=all", "--workdir runs/a --attack \"pgd(eps='8/255', steps=20)\"",
                  "--workdir runs/a --config.data.eval.new=\"folder('new')/train\""),
    ),
    "predict": Command(
        "classify new images with a trained run, or predict their numbers", "run or weights",
        ("workdir", "checkpoint", "format", "top_k", "threshold", "trust", *PROCESSES), "FILE|DIR|GLOB|-",
        more="A GLOB such as 'photos/**/*.jpg' stands in quotes. With - the names of files are read from standard "
             "input, a line each. Results are printed in this order, while others are computed.",
        examples=("new.jpg --workdir runs/a", "photos --workdir runs/a --format csv > classes.csv",
                  "- --workdir runs/a < files.txt"),
        formats=("table", "json", "jsonl", "csv"),
    ),
    "report": Command(
        "a page on a trained run: learning curves, scores, confusions, the worst mistakes, what made it", "run",
        ("workdir", "checkpoint", "html", "trust", *PROCESSES),
        more="It is written to WORKDIR/report.html, or to the file --html. More evaluation sets can be named by "
             "--config.data.eval.NAME=SPLIT. Where the data are gone, what needs them is left out.",
        examples=("--workdir runs/a", "--workdir runs/a --checkpoint=best --html a.html"),
    ),
    "export": Command(
        "write a trained model to a file that other programs run", "run or weights",
        ("workdir", "checkpoint", "gives", "names", "trust", *PROCESSES), "FILE",
        more="The suffix says the kind. .stablehlo: the whole function with its class names, for JAX alone, on CPU, "
             "GPU and TPU. .savedmodel: the same for TensorFlow alone, a folder. .onnx: the same for ONNX's runtimes. "
             ".safetensors: the weights by the names of a PyTorch model.",
        examples=("digits.stablehlo --workdir runs/digits", "digits.savedmodel --workdir runs/digits",
                  "resnet.safetensors --workdir runs/a --names=torchvision"),
    ),
    "serve": Command(
        "a web page, and an interface for programs, that classify images with a trained run", "run or weights",
        ("workdir", "checkpoint", "host", "port", "trust"),
        more="The page takes images that are dropped, pasted, drawn or photographed. Programs send an image to "
             "POST /predict; /openapi.json describes it.",
        examples=("--workdir runs/a", "--workdir runs/a --host 0.0.0.0 --port 80"),
    ),
    "sweep": Command(
        "train a run for each combination of several keys' values, one after the other or some at once", "config",
        ("workdir", "sweep", "jobs", "print"),
        more="A run is a plain `train` in WORKDIR/KEY=VALUE,…, and its output goes to WORKDIR/KEY=VALUE,….log. The "
             "same command again goes on: runs that are done are skipped, others resume. A function get_sweep() in the "
             "config file may give any list of runs, as dicts of keys and values. On an accelerator more than one job "
             "at once must fit into its memory.",
        examples=("--workdir runs/rates --sweep 'schedule=constant(1e-3); constant(3e-3)' --sweep seed=0..2",
                  "--workdir runs/rates --sweep seed=0..2 --print > commands.txt"),
    ),
    "compare": Command(
        "the results of runs beside the keys that differ, over seeds, with paired tests and learning curves", "nothing",
        ("format", "html", "test", "trust", *PROCESSES), "DIR",
        more="Each directory below DIR that holds a run counts. Runs that differ in their seed alone are one row. Runs "
             "whose predictions are known are tested in pairs: --test makes them known, and so does a file "
             "predictions.csv in a run's directory, as `evaluate --predictions` writes it.",
        examples=("runs/rates", "runs/rates --test --html rates.html", "runs/a runs/b --format csv > both.csv"),
        formats=("table", "csv", "json"),
    ),
    "features": Command(
        "write what the network makes of images: a vector each, with names and labels", "run or weights",
        ("workdir", "checkpoint", "output", "split", "trust", *PROCESSES), "[FILE|DIR|GLOB|-]",
        more="Without images on the command line they are those of --split. The name of --output ends in .npz or "
             ".parquet.",
        examples=("--workdir runs/a --output test.npz", "--workdir runs/a --split train --output train.parquet",
                  "photos --workdir runs/a --output photos.npz"),
    ),
    "probe": Command(
        "how good the features are: nearest neighbours, a linear probe, few images a class", "run or weights",
        ("workdir", "checkpoint", "format", "k", "draws", "plot", "trust", *PROCESSES),
        more="All learn from the features of the training set and are scored on each evaluation set.",
        examples=("--workdir runs/a", "--workdir runs/a --plot curve.png",
                  "--config configs/a.py --config.init_from=weights.safetensors"),
    ),
    "explain": Command(
        "draw where in images a trained run finds their class", "run or weights",
        ("workdir", "checkpoint", "format", "method", "class", "layer", "window", "output", "trust", *PROCESSES),
        "FILE|DIR|GLOB|-",
        more="gradcam is for networks with feature maps, rollout for those with attention over patches, occlusion for "
             "any. The pictures go to the folder --output (default: explained).",
        examples=("new.jpg --workdir runs/a", "photos --workdir runs/a --method occlusion --output heat",
                  "new.jpg --workdir runs/a --class dog"),
    ),
    "reproduce": Command(
        "train a run again from its record, and compare every digest and metric with it", "record",
        ("output", "steps", "tolerance", "format", "bundle", "trust", *PROCESSES), "WORKDIR|BUNDLE",
        more="It names the first recorded step and parameter that differ, and what differs in config, data, code, "
             "versions and devices. --output is the directory to train in (default: a temporary one, which is removed "
             "if nothing differs). The status is 0 if the runs are the same, and 1 if they are not.",
        examples=("runs/a", "runs/a --steps=100", "runs/a --bundle=a.zip", "a.zip --config.data.data_dir=/data"),
    ),
    "show-batch": Command(
        "a picture of the batch that a step trains on, with labels and ids", "run or config",
        ("workdir", "step", "raw", "count", "output", "format", "trust"),
        more="The pixels are those that the step is given, after host ops, device ops and mixing. Nothing is trained. "
             "--output is a .png (default: batch-K.png in the work directory of --workdir, else here).",
        examples=("--step=0 --config configs/digits.py", "--workdir runs/a --step=100"),
    ),
    "dryrun": Command(
        "compile the run for chips that need not be here: memory, time, what bounds it", "config",
        ("workdir", "chips", "shape", "classes", "targets", "examples", "format"),
        examples=("--config configs/imagenet_resnet50.py --chips v5e:2x4",),
    ),
    "find-lr": Command(
        "suggest a learning rate by a range test: a short run whose learning rate grows until the loss diverges",
        "config", ("steps", "low", "high", "format", "html"),
        more="Smith's range test: the loss over the learning rate, where it falls fastest, and a schedule to try. It "
             "leaves no run behind. --html writes the plot.",
        examples=("--config configs/digits.py", "--config configs/fashion_mnist.py --html lr.html",
                  "--config configs/digits.py --config.optimizer='sgd(momentum=0.9)' --low=1e-4 --high=10"),
    ),
    "config": Command("print every key's value and documentation", "config"),
}  # fmt: skip

_CONFIG = {
    "--config=FILE.py[:ARG]": "the config file (default: configs/digits.py); ARG is passed to its get_config",
    "--config.KEY=VALUE": "override a key; `launch.py config` lists them all",
}
_WEIGHTS = {"--config.init_from=PATH": "with these weights and --config, instead of with a run"}

_STATUS = """\
exit status: 0 done, 1 failed, 2 wrong usage, 75 stopped by a signal with a checkpoint saved: run the same again,
             130 (SIGINT), 143 (SIGTERM), 129 (SIGHUP) stopped by a signal with nothing to save"""


def overview() -> str:
    """The help of all: each command in a line."""
    return "\n".join([
        "usage: launch.py [COMMAND] [flags] [FILE|DIR ...]",
        "",
        "commands (launch.py COMMAND --help shows the flags of one):",
        *_columns({name: command.summary for name, command in COMMANDS.items()}),
        "",
        "flags of all:",
        *_columns({**_CONFIG, "--workdir=DIR": FLAGS["workdir"].text}),
        "",
        _STATUS,
        "",
        "examples:",
        "  launch.py                                                      train on scikit-learn's digits",
        "  launch.py --config configs/folder.py:photos --workdir runs/a   train on your own images",
        "  launch.py predict new.jpg --workdir runs/a                     classify a new one",
        "",
    ])  # fmt: skip


def help_of(name: str) -> str:
    """The help of the command `name`: its usage, its flags and examples."""
    command = COMMANDS[name]
    more_files = " ..." if command.files and command.of != "record" else ""
    usage = f"usage: launch.py {name}{f' {command.files}' if command.files else ''}{more_files} [flags]"
    shown = {} if command.of == "nothing" else dict(_CONFIG) | (_WEIGHTS if command.of == "run or weights" else {})
    if command.of in ("run", "record"):
        del shown["--config=FILE.py[:ARG]"]
    for flag in command.flags:
        about = command.flag(flag)
        shown[f"--{flag}={about.value}" if about.value else f"--{flag}"] = about.text
    lines = [usage, "", *_wrapped(command.summary[0].upper() + command.summary[1:] + ".")]
    if command.more:
        lines += ["", *_wrapped(command.more)]
    lines += ["", "flags:", *_columns(shown), "", _STATUS, ""]
    if command.examples:
        lines += ["examples:", *(f"  launch.py {name} {words}".rstrip() for words in command.examples), ""]
    return "\n".join(lines)


_MODULES = {
    "train": "train.loop",
    "features": "tools.probe.features",
    "show-batch": "tools.reproduce.show_batch",
    "find-lr": "tools.find_lr.command",
}


def module_of(command: str) -> str:
    """The module of the package whose `main` runs a command."""
    return _MODULES.get(command, f"tools.{command}.command")


def commands_with(flag: str) -> list[str]:
    """The commands that take a flag."""
    return [name for name, command in COMMANDS.items() if flag in command.flags]


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, break_on_hyphens=False)


def _columns(rows: Mapping[str, str]) -> Iterable[str]:
    """Two columns; what does not fit beside the first stands below it."""
    left = min(34, max(map(len, rows)))
    for name, text in rows.items():
        first, *rest = textwrap.wrap(text, WIDTH - left - 4, break_on_hyphens=False)
        if len(name) > left:
            yield f"  {name}"
            yield f"  {'':<{left}}  {first}"
        else:
            yield f"  {name:<{left}}  {first}"
        yield from (f"  {'':<{left}}  {line}" for line in rest)
