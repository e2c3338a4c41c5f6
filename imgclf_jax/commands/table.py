"""Every command: what it does, which flags it takes, and its help. Imports neither JAX nor TensorFlow."""

import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from absl import flags

WIDTH = 120


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
    "format": Flag("how to print", "FORMAT"),  # see `Command.flag`
    "predictions": Flag("write those of each example, as .csv, .jsonl or .parquet by the name", "FILE"),
    "top_k": Flag("how many classes to show or write (default: 3)", "K", 3, least=1),
    "extend": Flag("go on with a run up to a larger --config.total, if its schedule allows it"),
    "trust": Flag("let the run's config import the modules that it names"),
    "chips": Flag("v5e:4x4, v6e:8x8, v5p:4x4x4, h100:8, a100:8x8 (hosts x GPUs) or cpu:8", "KIND:SHAPE"),
    "shape": Flag("what the training images are, where the data are not here", "H,W,C"),
    "classes": Flag("how many classes there are, where the data are not here", "N", None, least=2),
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
    "html": Flag("write a page with the tables and the learning curves, in one file that needs no network", "FILE"),
    "test": Flag("evaluate each run that is done, and keep what it predicts in its directory, for paired tests"),
    "profile": Flag("trace these steps, for TensorBoard or Perfetto, into WORKDIR/profile", "FIRST:LAST"),
}  # fmt: skip

PROCESSES = ("coordinator", "num_processes", "process_id", "local_devices", "heartbeat")


@dataclass(frozen=True)
class Command:
    """A command `launch.py NAME`, run by `main` of the module `imgclf_jax.commands.NAME`.

    `of` says what its config is: that of the file `--config`; that of the run in `--workdir`; or either, the file's
    where `--config.init_from` names weights. `main` is given the config, the work directory (None for weights), the
    files if it takes some, and its other flags by their names. A command of "nothing" has neither config nor work
    directory, and its `main` is given files and flags alone.
    """

    summary: str
    of: Literal["config", "run", "run or weights", "nothing"]
    flags: tuple[str, ...] = ()
    files: str = ""  # what stands for its files in help texts; it takes none if this is empty
    more: str = ""  # a paragraph for its help
    examples: tuple[str, ...] = ()  # what follows "launch.py NAME"
    formats: tuple[str, ...] = ("table", "json")  # what --format may be, if it takes that; the first one is the default

    def flag(self, name: str) -> Flag:
        """What a flag is to this command."""
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
        ("workdir", "checkpoint", "checkpoints", "corruptions", "format", "predictions", "top_k", "trust", *PROCESSES),
        more="Any split, folder or .npz file can be an evaluation set: --config.data.eval.NAME=SPLIT, or "
             "--config.data.eval.NAME=SOURCE/SPLIT.",
        examples=("--workdir runs/a", "--workdir runs/a --predictions all.csv", "--workdir runs/a --checkpoints=all",
                  "--workdir runs/a --corruptions=all",
                  "--workdir runs/a --config.data.eval.new=\"folder('new')/train\""),
    ),
    "predict": Command(
        "classify new images with a trained run", "run or weights",
        ("workdir", "checkpoint", "format", "top_k", "trust", *PROCESSES), "FILE|DIR|GLOB|-",
        more="A GLOB such as 'photos/**/*.jpg' stands in quotes. With - the names of files are read from standard "
             "input, a line each. Results are printed in this order, while others are computed.",
        examples=("new.jpg --workdir runs/a", "photos --workdir runs/a --format csv > classes.csv",
                  "- --workdir runs/a < files.txt"),
        formats=("table", "json", "jsonl", "csv"),
    ),
    "export": Command(
        "write a trained model to a file that other programs run", "run or weights",
        ("workdir", "checkpoint", "gives", "names", "trust"), "FILE",
        more="The suffix says the kind. .stablehlo: the whole function with its class names, for JAX alone, on CPU, "
             "GPU and TPU. .onnx: the same for ONNX's runtimes. .safetensors: the weights by the names of a PyTorch "
             "model.",
        examples=("digits.stablehlo --workdir runs/digits", "resnet.safetensors --workdir runs/a --names=torchvision"),
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
        ("format", "html", "test", "trust"), "DIR",
        more="Each directory below DIR that holds a run counts. Runs that differ in their seed alone are one row. Runs "
             "whose predictions are known are tested in pairs: --test makes them known, and so does a file "
             "predictions.csv in a run's directory, as `evaluate --predictions` writes it.",
        examples=("runs/rates", "runs/rates --test --html rates.html", "runs/a runs/b --format csv > both.csv"),
        formats=("table", "csv", "json"),
    ),
    "dryrun": Command(
        "compile the run for chips that need not be here: memory, time, what bounds it", "config",
        ("workdir", "chips", "shape", "classes", "examples", "format"),
        examples=("--config configs/imagenet_resnet50.py --chips v5e:2x4",),
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
    usage = f"usage: launch.py {name}{f' {command.files} ...' if command.files else ''} [flags]"
    shown = {} if command.of == "nothing" else dict(_CONFIG) | (_WEIGHTS if command.of == "run or weights" else {})
    if command.of == "run":
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
