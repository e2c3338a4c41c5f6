"""The commands, their flags and their help texts. Imports neither JAX nor TensorFlow."""

import shutil
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from imgclf_jax.cli.flags import FLAGS, PROCESSES, Flag

_MOST_COLUMNS = 120  # of help texts; narrower terminals have fewer


def _width() -> int:
    return max(40, min(_MOST_COLUMNS, shutil.get_terminal_size((_MOST_COLUMNS, 24)).columns))


@dataclass(frozen=True)
class Command:
    """A command `launch.py NAME`, run by `main` of its module (see `module_of`).

    `config_from` says where its config comes from: the file `--config`; the run in `--workdir`; "run or weights", the
    run unless `--config.init_from` names weights for `--config`; "run or file", the run if `--workdir` is given; the
    record named first; or "none". `main` gets the config, the work directory (None without a run), the files if it
    takes any, and its other flags by name. A command with "none" gets only files and flags.
    """

    summary: str
    config_from: Literal["file", "run", "run or weights", "run or file", "record", "none"]
    flags: tuple[str, ...] = ()
    files: str = ""  # the placeholder for its files in help texts; empty if it takes none
    more: str = ""  # a paragraph for its help
    examples: tuple[str, ...] = ()  # each without "launch.py NAME"
    formats: tuple[str, ...] = ("table", "json")  # the values of --format, if it takes that; the first is the default
    extra: str = ""  # the extra that it needs
    writes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # flags of output files → suffixes, () for any
    before_jax: str = ""  # "module:function", called with files and flags before JAX is imported
    needs_command_line: bool = False  # `main` gets the CommandLine too

    def flag(self, name: str) -> Flag:
        """Returns a flag as this command defines it."""
        if name == "workdir" and self.config_from == "run or file":
            return Flag("the run's directory (default: none; --config is used instead)", "DIR")
        if name == "workdir" and self.config_from in ("run", "run or weights"):
            return Flag("the directory of the run to use (default: runs/digits)", "DIR")
        if name != "format":
            return FLAGS[name]
        text = f"the output format (default: {self.formats[0]})"
        return Flag(text, "|".join(self.formats), self.formats[0], choices=self.formats)

    @property
    def distributed(self) -> bool:
        """Whether the command can run in several processes."""
        return "coordinator" in self.flags


COMMANDS: Mapping[str, Command] = {
    "train": Command(
        "train or resume the run in the work directory (the default command)", "file",
        ("workdir", "extend", "profile", *PROCESSES),
        more="If the work directory has checkpoints, the run resumes from the latest. If its config differs, the "
             "command stops and shows the difference.",
        examples=("", "--config folder:photos --workdir runs/a", "--config.total='20 epochs'"),
    ),
    "evaluate": Command(
        "evaluate a trained run on each of its evaluation sets", "run or weights",
        ("workdir", "checkpoint", "checkpoints", "corruptions", "frost", "attack", "format", "predictions", "top_k",
         "trust", *PROCESSES),
        more="Any split, folder or .npz file can be an evaluation set: --config.data.eval.NAME=SPLIT, or "
             "--config.data.eval.NAME=SOURCE/SPLIT.",
        examples=("--workdir runs/a", "--workdir runs/a --predictions all.csv", "--workdir runs/a --checkpoints=all",
                  "--workdir runs/a --corruptions=all", "--workdir runs/a --attack \"pgd(eps='8/255', steps=20)\"",
                  "--workdir runs/a --config.data.eval.new=\"folder('new')/train\""),
        writes={"predictions": (".csv", ".jsonl")},
    ),
    "predict": Command(
        "classify new images with a trained run", "run or weights",
        ("workdir", "checkpoint", "format", "top_k", "threshold", "trust", *PROCESSES), "FILE|DIR|GLOB|-",
        more="Quote a GLOB, such as 'photos/**/*.jpg'. With - the command reads file names from standard input, one "
             "per line. Results appear in this order as they are computed.",
        examples=("new.jpg --workdir runs/a", "photos --workdir runs/a --format csv > classes.csv",
                  "- --workdir runs/a < files.txt"),
        formats=("table", "json", "jsonl", "csv"),
    ),
    "report": Command(
        "write a page about a trained run: learning curves, scores, confusions, worst mistakes, provenance", "run",
        ("workdir", "checkpoint", "html", "trust", *PROCESSES),
        more="The page goes to WORKDIR/report.html, or to --html. --config.data.eval.NAME=SPLIT adds an evaluation "
             "set. If the data are gone, the page omits the sections that need them.",
        examples=("--workdir runs/a", "--workdir runs/a --checkpoint=best --html a.html"),
        writes={"html": ()},
    ),
    "export": Command(
        "export a trained model for JAX, TensorFlow, ONNX or PyTorch", "run or weights",
        ("workdir", "checkpoint", "gives", "names", "trust", *PROCESSES), "FILE",
        more="The suffix selects the format. .stablehlo: the function with its class names, for JAX on CPU, GPU and "
             "TPU. .savedmodel: the same for TensorFlow, as a folder. .onnx: the same for ONNX runtimes. .safetensors: "
             "the weights, under the parameter names of a PyTorch model.",
        examples=("digits.stablehlo --workdir runs/digits", "digits.savedmodel --workdir runs/digits",
                  "resnet.safetensors --workdir runs/a --names=torchvision"),
        before_jax="tools.export.formats:check",
    ),
    "serve": Command(
        "serve a trained run as a web page and an HTTP API", "run or weights",
        ("workdir", "checkpoint", "host", "port", "cors", "request_log", "trust"),
        more="Drop, paste, draw or photograph images on the page. Programs send images to POST /predict; "
             "/openapi.json describes the API.",
        examples=("--workdir runs/a", "--workdir runs/a --host 0.0.0.0 --port 80"),
        extra="serve",
    ),
    "sweep": Command(
        "train a run for each combination of the values of several keys", "file",
        ("workdir", "sweep", "jobs", "print"),
        more="Each run is a plain `train` in WORKDIR/KEY=VALUE,…, with its output in WORKDIR/KEY=VALUE,….log. Run the "
             "same command again to continue: it skips finished runs and resumes the others. For any other list of "
             "runs, let a function get_sweep() in the config file return dicts of keys and values. Several jobs on one "
             "accelerator must fit into its memory together.",
        examples=("--workdir runs/rates --sweep 'schedule=constant(1e-3); constant(3e-3)' --sweep seed=0..2",
                  "--workdir runs/rates --sweep seed=0..2 --print > commands.txt"),
        before_jax="tools.sweep.plan:use_cpu", needs_command_line=True,
    ),
    "compare": Command(
        "compare runs: results by the keys that differ, averaged over seeds, with paired tests and curves", "none",
        ("format", "html", "test", "trust", *PROCESSES), "DIR",
        more="The command finds every run below DIR. Runs that differ only in their seed share a row. The paired tests "
             "need predictions: add --test, or have `evaluate --predictions` write predictions.csv into a run's "
             "directory.",
        examples=("runs/rates", "runs/rates --test --html rates.html", "runs/a runs/b --format csv > both.csv"),
        formats=("table", "csv", "json"), writes={"html": ()},
    ),
    "status": Command(
        "show how far runs are, what went wrong, and where their time went", "none", ("format",), "DIR",
        more="The command finds every run below DIR. Goodput is the fraction of the wall time, over all restarts of a "
             "run, that went into training steps. For one run, a second table has the time by phase.",
        examples=("runs/a", "runs", "runs/a --format json"),
    ),
    "features": Command(
        "write the network's features for images: one vector each, with names and labels", "run or weights",
        ("workdir", "checkpoint", "output", "split", "trust", *PROCESSES), "[FILE|DIR|GLOB|-]",
        more="Without images on the command line, the command uses those of --split.",
        examples=("--workdir runs/a --output test.npz", "--workdir runs/a --split train --output train.npz",
                  "photos --workdir runs/a --output photos.npz"),
        writes={"output": (".npz",)},
    ),
    "probe": Command(
        "measure the features: nearest neighbors, a linear probe, few-shot classification", "run or weights",
        ("workdir", "checkpoint", "format", "k", "draws", "plot", "trust", *PROCESSES),
        more="Each probe is fitted to the features of the training set and scored on each evaluation set.",
        examples=("--workdir runs/a", "--workdir runs/a --plot curve.png",
                  "--config my_config.py --config.init_from=weights.safetensors"),
        writes={"plot": (".png",)},
    ),
    "explain": Command(
        "draw heatmaps of the image regions that a trained run's predictions depend on", "run or weights",
        ("workdir", "checkpoint", "format", "method", "class", "layer", "window", "output", "trust", *PROCESSES),
        "FILE|DIR|GLOB|-",
        more="gradcam works for networks with feature maps, rollout for attention over patches, occlusion for any "
             "network. The heatmaps go to the folder --output (default: explained).",
        examples=("new.jpg --workdir runs/a", "photos --workdir runs/a --method occlusion --output heat",
                  "new.jpg --workdir runs/a --class dog"),
    ),
    "reproduce": Command(
        "train a run again from its record, and compare every digest and metric", "record",
        ("output", "steps", "tolerance", "format", "bundle", "trust", *PROCESSES), "WORKDIR|BUNDLE",
        more="The command names the first recorded step and parameter that differ, and all differences in config, "
             "data, code, versions and devices. It trains in --output (default: a temporary directory, removed if "
             "nothing differs). The exit status is 0 if the runs are equal, else 1.",
        examples=("runs/a", "runs/a --steps=100", "runs/a --bundle=a.zip", "a.zip --config.data.data_dir=/data"),
    ),
    "show-batch": Command(
        "draw the batch that a step trains on, with labels and ids", "run or file",
        ("workdir", "step", "raw", "count", "output", "format", "trust"),
        more="The pixels are the step's input, after host ops, device ops and mixing. Nothing is trained. --output is "
             "a .png file (default: batch-K.png in --workdir, else in the working directory).",
        examples=("--step=0 --config digits", "--workdir runs/a --step=100"),
    ),
    "dryrun": Command(
        "compile a run for absent chips: memory, time and bottleneck", "file",
        ("workdir", "chips", "shape", "classes", "targets", "examples", "format"),
        examples=("--config imagenet_resnet50 --chips v5e:2x4",),
        before_jax="tools.dryrun.topology:prepare_from_flags",
    ),
    "find-lr": Command(
        "suggest a learning rate by a range test: a short run whose learning rate grows until the loss diverges",
        "file", ("steps", "low", "high", "format", "html"),
        more="Smith's range test: the loss over the learning rate, where it falls fastest, and a schedule to try. It "
             "leaves no run behind. --html writes the plot.",
        examples=("--config digits", "--config fashion_mnist --html lr.html",
                  "--config digits --config.optimizer='sgd(momentum=0.9)' --low=1e-4 --high=10"),
    ),
    "config": Command("print the value and documentation of every key", "file"),
}  # fmt: skip

_CONFIG = {
    "--config=FILE.py[:ARG]": (
        "a config file, or the name of one that ships (default: digits); its get_config gets ARG. mnist, fashion_mnist "
        "and others whose data come from TFDS need the extra tfds and, the first time, a network"
    ),
    "--config.KEY=VALUE": "override a key; `launch.py config` lists them all",
}
_WEIGHTS = {"--config.init_from=PATH": "use these weights and --config instead of a run"}

_STATUS = """\
exit status: 0 done, 1 failed, 2 wrong usage,
             75 stopped by a signal after saving a checkpoint: run the same command again,
             130 (SIGINT), 143 (SIGTERM), 129 (SIGHUP) stopped by a signal with nothing to save"""


def overview() -> str:
    """Returns the help text of `launch.py --help`, with one line per command."""
    return "\n".join([
        "usage: launch.py [COMMAND] [flags] [FILE|DIR ...]",
        "",
        "commands (launch.py COMMAND --help lists the flags of one):",
        *_columns({name: command.summary for name, command in COMMANDS.items()}),
        "",
        "common flags:",
        *_columns({**_CONFIG, "--workdir=DIR": FLAGS["workdir"].text}),
        "",
        _STATUS,
        "",
        "examples:",
        "  launch.py                                           train on scikit-learn's digits",
        "  launch.py --config folder:photos --workdir runs/a   train on your own images",
        "  launch.py predict new.jpg --workdir runs/a          classify a new one",
        "",
    ])  # fmt: skip


def command_help(name: str) -> str:
    """Returns the help text of a command: usage, flags and examples."""
    command = COMMANDS[name]
    more_files = " ..." if command.files and command.config_from != "record" else ""
    usage = f"usage: launch.py {name}{f' {command.files}' if command.files else ''}{more_files} [flags]"
    shown = {} if command.config_from == "none" else dict(_CONFIG)
    if command.config_from == "run or weights":
        shown |= _WEIGHTS
    if command.config_from in ("run", "record"):
        del shown["--config=FILE.py[:ARG]"]
    for flag_name in command.flags:
        flag = command.flag(flag_name)
        shown[f"--{flag_name}={flag.value}" if flag.value else f"--{flag_name}"] = flag.text
    lines = [usage, "", *_wrapped(command.summary[0].upper() + command.summary[1:] + ".")]
    if command.more:
        lines += ["", *_wrapped(command.more)]
    lines += ["", "flags:", *_columns(shown), "", "launch.py --help lists the exit statuses.", ""]
    if command.examples:
        lines += ["examples:", *(f"  launch.py {name} {words}".rstrip() for words in command.examples), ""]
    return "\n".join(lines)


_MODULES = {
    "train": "train.command",
    "features": "tools.probe.features",
    "show-batch": "tools.reproduce.show_batch",
    "find-lr": "tools.find_lr.command",
}


def module_of(command: str) -> str:
    """Returns the module (within the package) whose `main` runs a command."""
    return _MODULES.get(command, f"tools.{command}.command")


def commands_with(flag: str) -> list[str]:
    """Lists the commands that take a flag."""
    return [name for name, command in COMMANDS.items() if flag in command.flags]


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, _width(), break_on_hyphens=False)


def _columns(rows: Mapping[str, str]) -> Iterable[str]:
    """Formats `rows` in two columns; a name wider than the first column gets a line of its own."""
    left = min(34, _width() // 3, max(map(len, rows)))
    for name, text in rows.items():
        first, *rest = textwrap.wrap(text, _width() - left - 4, break_on_hyphens=False)
        if len(name) > left:
            yield f"  {name}"
            yield f"  {'':<{left}}  {first}"
        else:
            yield f"  {name:<{left}}  {first}"
        yield from (f"  {'':<{left}}  {line}" for line in rest)
