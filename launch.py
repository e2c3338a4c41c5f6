"""Flags to config to command. Prints help without importing JAX or TensorFlow.

Usage: launch.py [COMMAND] [--config=FILE.py[:ARG]] [--workdir=DIR] [--config.KEY=VALUE …] [FILE|DIR …]
"""

import os
import sys

if __name__ == "__main__":
    # What is installed comes first: a file beside this one that is called jax.py is not JAX.
    _here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [folder for folder in sys.path if folder != _here] + [_here]
    from imgclf_jax.core import signals

    signals.install()

import contextlib
import re
import traceback
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from imgclf_jax import config as configs
from imgclf_jax.core.errors import UserError, unknown
from imgclf_jax.core.text import prepare_streams, printable
from imgclf_jax.run import environment

COMMANDS = {
    "train": "train, or resume, the run in the work directory (the default command)",
    "evaluate": "the metrics of a trained run on each of its evaluation sets",
    "predict": "classify new images, FILE or DIR …, with a trained run",
    "dryrun": "compile the run for --chips, which need not be here: memory, time, what bounds it",
    "config": "print every key's value and documentation",
}

FLAGS = ("workdir", "checkpoint", "format", "top_k", "profile", "extend", "trust", "predictions", "chips", "shape",
         "classes", "examples", "grace", "coordinator", "num_processes", "process_id", "local_devices",
         "heartbeat")  # fmt: skip

HELP = f"""usage: launch.py [COMMAND] [flags] [FILE|DIR ...]

commands:
{chr(10).join(f"  {name:<10} {text}" for name, text in COMMANDS.items())}

flags:
  --config=FILE.py[:ARG]      the config file (default: configs/digits.py); ARG is passed to its get_config
  --config.KEY=VALUE          override a key; `launch.py config` lists them all
  --workdir=DIR               where the run lives (default: runs/<config name>)
  --config.init_from=PATH     evaluate, predict: with these weights and --config, instead of with a run
  --checkpoint=WHICH          evaluate, predict: best, latest or a step (default: best if one is kept, else latest)
  --format=table|json         evaluate, predict, dryrun: how to print (default: table)
  --predictions=FILE          evaluate: write those of each example, as .csv, .jsonl or .parquet by the name
  --top_k=K                   predict: how many classes to show (default: 3)
  --extend                    train: go on with a run up to a larger --config.total, if its schedule allows it
  --trust                     evaluate, predict: let the run's config import the modules that it names
  --chips=KIND:SHAPE          dryrun: v5e:4x4, v6e:8x8, v5p:4x4x4, h100:8, a100:8x8 (hosts x GPUs) or cpu:8
  --shape=H,W,C --classes=N --examples=N
                              dryrun: what the training images are, where the data are not here
  --grace=SECONDS             train: the longest that a stop by signal may take, saving included (default: any time)
  --coordinator=HOST:PORT --num_processes=N --process_id=I
                              train, evaluate, predict: this is process I of N; HOST is that of process 0. Slurm, Open
                              MPI and Cloud TPU tell it themselves. --num_processes=1: alone, in a cluster too
  --local_devices=all|0,1     which devices of this host the process takes
  --heartbeat=SECONDS         a process that is silent for so long is taken for dead (default: 100)
  --profile=FIRST:LAST        train: trace these steps, for TensorBoard or Perfetto, into WORKDIR/profile

exit status: 0 done, 1 failed, 2 wrong usage, 75 stopped by a signal with a checkpoint saved: run the same again,
             130 (SIGINT), 143 (SIGTERM), 129 (SIGHUP) stopped by a signal with nothing to save

examples:
  launch.py                                                      train on scikit-learn's digits
  launch.py --config configs/folder.py:photos --workdir runs/a   train on your own images
  launch.py predict new.jpg --workdir runs/a                     classify a new one
"""


class UsageError(Exception):
    """A wrong flag: exit status 2."""


def main(argv: list[str]) -> int:
    """Runs the command line `argv`, without the program's name; returns the exit status."""
    prepare_streams()
    try:
        status = _run(argv)
        sys.stdout.flush()
        return status
    except UsageError as e:
        print(f"error: {printable(str(e))}\nsee launch.py --help", file=sys.stderr)
        return 2
    except UserError as e:
        print(f"error: {printable(str(e))}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # who read the output, such as `head`, wants no more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would complain at exit
        return 1
    except OSError as e:
        if e.strerror is None:
            raise
        what = f"{e.filename or 'a file or the output'}: {e.strerror}"
        print(f"error: {printable(what)}; fix the cause and run the same command again", file=sys.stderr)
        return 1


def _run(argv: list[str]) -> int:
    if any(a in ("--help", "-help", "-h", "--helpfull", "--helpshort") for a in argv):
        print(HELP, end="")
        return 0
    config_path, argv = _take_config(argv)
    command = argv.pop(0) if argv and not argv[0].startswith("-") else "train"
    if command not in COMMANDS:
        raise UsageError(unknown("command", command, COMMANDS))
    try:
        values = flags.FlagValues()
        flags.DEFINE_string("workdir", "", "", flag_values=values)
        flags.DEFINE_string("checkpoint", "", "", flag_values=values)
        flags.DEFINE_enum("format", "table", ["table", "json"], "", flag_values=values)
        flags.DEFINE_integer("top_k", 3, "", lower_bound=1, flag_values=values)
        flags.DEFINE_string("profile", "", "", flag_values=values)
        flags.DEFINE_bool("extend", False, "", flag_values=values)
        flags.DEFINE_bool("trust", False, "", flag_values=values)
        flags.DEFINE_string("predictions", "", "", flag_values=values)
        flags.DEFINE_string("chips", "", "", flag_values=values)
        flags.DEFINE_list("shape", None, "", flag_values=values)
        flags.DEFINE_integer("classes", None, "", lower_bound=2, flag_values=values)
        flags.DEFINE_integer("examples", None, "", lower_bound=1, flag_values=values)
        flags.DEFINE_float("grace", 0.0, "", lower_bound=0.0, flag_values=values)
        flags.DEFINE_string("coordinator", "", "", flag_values=values)
        flags.DEFINE_integer("num_processes", None, "", lower_bound=1, flag_values=values)
        flags.DEFINE_integer("process_id", None, "", lower_bound=0, flag_values=values)
        flags.DEFINE_string("local_devices", "", "", flag_values=values)
        flags.DEFINE_integer("heartbeat", 100, "", lower_bound=1, flag_values=values)
        values.set_gnu_getopt(True)  # flags may stand after files
        rest = values(["launch.py", *argv], known_only=True)[1:]
    except flags.Error as e:
        raise UsageError(str(e)) from e
    workdir = values.workdir or str(Path("runs", Path(config_path.partition(":")[0]).stem))
    config = configs.load_file(config_path)
    elsewhere = any(re.match(r"--?config\.init_from(=|$)", word) for word in rest)  # evaluate weights, not a run
    if command in ("evaluate", "predict"):
        from imgclf_jax.run.workdir import Workdir

        if not elsewhere:
            config = Workdir.named(workdir).load_config()  # a trained model keeps the config that it was trained with
        elif values.checkpoint or (values.workdir and Workdir.named(workdir).config.is_file()):
            flag = "checkpoint" if values.checkpoint else "workdir"
            raise UsageError(f"{command}: --{flag} names a run's, --config.init_from weights without one; drop either")
    files = _override(config, rest)
    if files and command != "predict":
        raise UsageError(f"{command} takes no files, found {files[0]!r}; did you forget '--'?")
    configs.validate(config)
    return _dispatch(command, config, None if elsewhere and command != "train" else workdir, values, files)


def _override(config: ConfigDict, words: list[str]) -> list[str]:
    """Applies each --config.KEY=VALUE in `words` to `config`; returns the words that are no flags."""
    for word in words:
        key = word.lstrip("-").partition("=")[0].removeprefix("config.")
        if word.startswith(("--config.", "-config.")) and key not in configs.flatten(config):
            name = key.removeprefix("data.eval.")
            if name in ("", key) or "." in name:
                raise UsageError(unknown("config key", key, configs.KEYS))
            with config.unlocked():  # one more evaluation set
                config.data.eval[name] = ""
    values = flags.FlagValues()
    values.set_gnu_getopt(True)
    try:
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=["launch.py", *words])
        return values(["launch.py", *words])[1:]
    except flags.UnrecognizedFlagError as e:
        raise UsageError(unknown("flag", e.flagname, ("config", *FLAGS))) from e
    except flags.Error as e:
        match = re.match(r"flag --config\.([\w.]+)=", str(e))
        if not match:
            raise UsageError(str(e)) from e
        old = configs.flatten(config)[match[1]]
        given = next((w for w in words if w.lstrip("-").startswith(f"config.{match[1]}=")), f"--config.{match[1]}")
        raise UsageError(f"{given}: wants a value of type {type(old).__name__}, such as {old!r}") from e


def _dispatch(command: str, config: ConfigDict, workdir: str | None, values: flags.FlagValues, files: list[str]) -> int:
    if command == "config":
        values_now = configs.flatten(config)
        for key, (_, documentation) in configs.KEYS.items():
            print(f"{key} = {values_now[key]!r}\n    {documentation}")
        return 0

    # From here on JAX is wanted.
    environment.prepare(config.deterministic)
    if command == "dryrun":
        return _dryrun(config, Path(workdir or "runs"), values)
    from imgclf_jax.run.workdir import Workdir

    place = Workdir.named(workdir) if workdir else None
    with contextlib.ExitStack() as stack:
        stack.enter_context(_joined(values))
        if command == "train" and place:
            from imgclf_jax.commands import train

            return train.main(config, place, _steps(values.profile), values.extend, values.grace)
        if place and not values.trust:
            stack.enter_context(place.without_code())
        if command == "evaluate":
            from imgclf_jax.commands import evaluate

            return evaluate.main(config, place, values.checkpoint, values.format, values.predictions, values.top_k)
        from imgclf_jax.commands import predict

        return predict.main(config, place, values.checkpoint, values.format, files, values.top_k)


def _joined(values: flags.FlagValues) -> contextlib.AbstractContextManager[None]:
    """Inside, this process is one of those of the run, if there are several."""
    number, process = values.num_processes, values.process_id
    if number != 1 and any((values.coordinator, number, process is not None)):
        if not (values.coordinator and number and process is not None):
            raise UsageError("--coordinator, --num_processes and --process_id are given together, to every process")
        if process >= number:
            raise UsageError(f"--process_id={process}: the processes are numbered 0 to {number - 1}")
        if not re.fullmatch(r".+:\d+", values.coordinator):
            raise UsageError(f"--coordinator={values.coordinator}: wants HOST:PORT, such as node1:12345")
    if not re.fullmatch(r"(all|\d+(,\d+)*)?", values.local_devices):
        raise UsageError(f"--local_devices={values.local_devices}: wants 'all', or numbers such as 0,1")
    from imgclf_jax.commands import together

    return together.joined(values.coordinator, number, process, values.local_devices, values.heartbeat)


def _dryrun(config: ConfigDict, folder: Path, values: flags.FlagValues) -> int:
    from imgclf_jax.chips import topology

    if not values.chips:
        raise UsageError(f"dryrun wants --chips, the chips to compile for; {topology.ALLOWED}")
    shape = values.shape
    if shape is not None and not (len(shape) == 3 and all(re.fullmatch(r"[1-9]\d*", n) for n in shape)):
        raise UsageError(f"--shape={','.join(shape)}: wants height, width and channels, such as 224,224,3")
    chips = topology.parse(values.chips)
    topology.prepare(chips)
    from imgclf_jax.commands import dryrun

    given = {"shape": shape and tuple(map(int, shape)), "classes": values.classes, "examples": values.examples}
    return dryrun.main(config, chips, given, values.format, folder)


def _take_config(argv: list[str]) -> tuple[str, list[str]]:
    """The value of --config, and the command line without it."""
    path = str(Path(__file__).parent / "configs" / "digits.py")
    rest = []
    words = iter(argv)
    for word in words:
        if word in ("--config", "-config"):
            path = next(words, "")
        elif word.startswith(("--config=", "-config=")):
            path = word.partition("=")[2]
        elif word == "--":
            rest += [word, *words]
        else:
            rest.append(word)
    if not path:
        raise UsageError("--config wants a file, such as --config=configs/digits.py")
    # A user's own modules are found beside the config and in the working directory, behind those that are installed.
    sys.path += [str(Path(path.partition(":")[0]).resolve().parent), str(Path.cwd())]
    return path, rest


def _steps(text: str) -> tuple[int, int] | None:
    """'10:20' to (10, 20); None for the empty text."""
    if not text:
        return None
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if not match or int(match[1]) >= int(match[2]):
        raise UsageError(f"--profile={text}: wants FIRST:LAST, two steps, the first one smaller, such as 10:20")
    return int(match[1]), int(match[2])


if __name__ == "__main__":
    try:
        _status = main(sys.argv[1:])
    except Exception:  # which no person has caused
        traceback.print_exc()
        _status = 1
    if "imgclf_jax.core.processes" in sys.modules:
        sys.modules["imgclf_jax.core.processes"].end(_status)
    sys.exit(_status)
