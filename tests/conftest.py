"""Eight virtual CPU devices, strict dtype promotion: sharding and dtypes are exercised by every test."""

import gc
import itertools
import logging
import os
import re
import sys
from pathlib import Path

# The tests start a dozen processes: each would spend seconds compiling its imports where caches are switched off.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
# As the command line sets it before JAX starts: this process gives the bits of those that it starts.
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_prefer_vector_width=512")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
os.environ["KERAS_BACKEND"] = "tensorflow"

import pytest


def pytest_configure(config):
    """In the processes that run tests: where xdist starts others, the first one imports nothing of this."""
    if getattr(config.option, "dist", "no") != "no":
        return
    import jax
    import tensorflow  # noqa: F401  whole, before tests of what waits for its import in a thread import more of it
    from hypothesis import settings

    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_traceback_in_locations_limit", 0)  # no test reads which line of Python an operation is from
    settings.register_profile("default", deadline=None, derandomize=True, max_examples=50)
    settings.load_profile("default")


@pytest.hookimpl(trylast=True)
def pytest_collection_finish():
    """What has been imported stays. To look through it for garbage again and again takes a twentieth of all time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000)


# Why a test may skip: of a package, a compiler, a processor or a permission that this machine lacks.
MAY_SKIP = (r"`(peers|onnx|browser|heic)`|needs Chromium|needs a compiler|oneDNN|Linux's|not permitted|devices round|"
            r"tool is deleted|imgclf_jax\.tools")  # fmt: skip
TOOLS = ["evaluate", "predict", "report", "export", "serve", "sweep", "compare", "status", "features", "probe",
         "explain", "reproduce", "show-batch", "dryrun", "find-lr"]  # fmt: skip


def pytest_sessionfinish(session):
    """A test that skips for any other reason fails the run: nobody would notice that it never runs."""
    terminal = session.config.pluginmanager.get_plugin("terminalreporter")  # none in the processes of xdist
    for report in terminal.stats.get("skipped", ()) if terminal else ():
        if not re.search(MAY_SKIP, report.longrepr[2]):
            terminal.write_line(f"\n{report.nodeid} may not skip (see conftest.py): {report.longrepr[2]}", red=True)
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(scope="session", autouse=True)
def _compiled_once(tmp_path_factory):
    """What several tests compile, in any process, is compiled once, in a folder of this run or the one a user names.

    A process keeps its last programs itself too: those on oneDNN are in no folder (see `internals.not_cached`).
    """
    base = tmp_path_factory.getbasetemp()  # with xdist each process has its own, in a folder of them all
    of_this_run = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "compiled"
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(of_this_run)
    import jax
    from jax._src import compiler
    from jax._src.interpreters import mlir

    os.environ["JAX_COMPILATION_CACHE_DIR"], os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = folder, "0"
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    last, whole = {}, compiler.compile_or_get_cached

    def compile(backend, program, devices, options, callbacks, *more):
        key = mlir.module_to_bytecode(program), options.SerializeAsString(), *(device.id for device in devices.flat)
        found = last.pop(key, None) or whole(backend, program, devices, options, callbacks, *more)
        if len(key[0]) > 4000 and not callbacks:
            last[key] = found
            if len(last) > 32:
                del last[next(iter(last))]
        return found

    compiler.compile_or_get_cached = compile


@pytest.fixture(scope="session", autouse=True)
def _deleted_tools_are_skipped():
    """A test that runs the command of a tool without its folder and its line of the table, which may be deleted."""
    from imgclf_jax.cli import arguments, table

    def parse(argv, *others, whole=arguments.parse):
        if argv and argv[0] in TOOLS and argv[0] not in table.COMMANDS:
            pytest.skip(f"the tool is deleted: {argv[0]}")
        return whole(argv, *others)

    arguments.parse = parse


_number = itertools.count()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    """No test reads or writes the user's cache folder, or another test's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "caches" / str(next(_number))))


@pytest.fixture(scope="module", autouse=True)
def _process_as_it_was():
    """What a command sets for its whole process."""
    root = logging.getLogger()
    before = root.handlers[:], root.level, sys.path[:], sys.unraisablehook
    yield
    root.handlers[:], root.level, sys.path[:], sys.unraisablehook = before


@pytest.fixture
def fake_config():
    from cases import short_config

    return short_config()


@pytest.fixture
def printed(capsys):
    """Runs a command line, which must succeed; gives its standard output."""
    import launch

    def run(*words) -> str:
        capsys.readouterr()
        assert launch.main([str(word) for word in words]) == 0
        return capsys.readouterr().out

    return run


@pytest.fixture
def float64():
    import jax

    with jax.enable_x64(True):
        yield


@pytest.fixture(params=["cpu", "gpu"])
def form(request):
    """Traces a test for each platform whose layers differ; both forms run on CPU."""
    from imgclf_jax.core import platform

    with platform.tracing_for(request.param):
        yield request.param


def _optimize(fully: bool):
    """How this process, and those that it starts, compile."""
    import jax

    jax.config.update("jax_disable_most_optimizations", not fully)
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = str(not fully).lower()


@pytest.fixture(scope="module", autouse=True)
def _fixtures_are_compiled_as_their_tests(request):
    """Also what fixtures of a module compile, so that its tests find the same programs compiled."""
    _optimize(request.node.get_closest_marker("optimized") is not None)


@pytest.fixture(autouse=True)
def _quick_compilation(request, _fixtures_are_compiled_as_their_tests):
    """Compiles in three quarters of the time, but for tests marked `optimized`."""
    _optimize(request.node.get_closest_marker("optimized") is not None)
    yield
    _optimize(request.node.parent.get_closest_marker("optimized") is not None)


@pytest.fixture(scope="module")
def one_device():
    """Meshes of one device, where sharding is not what the tests are about: programs compile in less time."""
    import jax

    from imgclf_jax.core import sharding

    make = sharding.make_mesh
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "make_mesh", lambda devices=None, *args, **kwargs: make(
            devices or jax.devices()[:1], *args, **kwargs))  # fmt: skip
        yield


@pytest.fixture
def shallow(monkeypatch):
    """Networks with every kind of layer of their family, in few blocks: they compile in seconds."""
    from imgclf_jax.models import convnext, efficientnet, regnet, resnet, squeezenet, vit

    small = {"stem": 8, "features": 16}
    nets = efficientnet._EFFICIENTNETS, efficientnet._MOBILENETS
    for net, name, stages in ((0, "B0", "ds/se 1 3 1 1 8; er 1 3 2 2 8; ir/se 2 5 2 3 16"),
                              (1, "V3-L", "ds 1 3 1 1 8; ir/hard 2 3 2 3 8; cn 1 1 1 1 16"),
                              (1, "V4-S", "cn 1 3 2 1 8; ib 1 3+5 2 2 8, ib 1 0+3 1 2 8, ib 1 3+0 1 2 8")):  # fmt: skip
        monkeypatch.setitem(nets[net], name, nets[net][name]._replace(stages=stages, **small, relu_stages=1))
    monkeypatch.setitem(regnet._VARIANTS, "4GF", (8, 8, 2.0, 4, 3))
    monkeypatch.setattr(squeezenet, "_SQUEEZED", (1, 2, 2))
    monkeypatch.setitem(convnext._VARIANTS, "V2-Atto", ((1, 1), (8, 16)))
    monkeypatch.setitem(resnet._STAGES, 18, (1, 1))
    monkeypatch.setitem(convnext._VARIANTS, "T", ((1, 1), (8, 16)))
    monkeypatch.setitem(vit._VIT, "Ti", (32, 2, 2))
    monkeypatch.setitem(vit._MIXER, "S", (16, 2, 8, 24))


@pytest.fixture(scope="module")
def a_gigabyte():
    """Only so much more memory than now may be taken, also by C code; on other systems than Linux any."""
    if sys.platform != "linux":
        yield
        return
    import resource

    import jax
    from fuzzing import MAX

    jax.devices()  # the stacks of its threads would count
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MAX, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)
