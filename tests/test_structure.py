"""The shape of the code: imports run downward only, files stay short, heavy imports stay where they belong."""

import ast
import functools
import graphlib
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "imgclf_jax"

# The rooms and modules of the package in tiers, lowest first. A module imports from its own tier and from those below.
TIERS = [
    "core",
    "config losses methods metrics models optim scores",
    "augment data",
    "run step",
    "datasets diagnose programs recipe",
    "weights",
    "trained",
    "cli train",
    "tools",
    "__main__ launch",
]
# The tools that others build on, each on those before it. All other tools can be deleted one by one.
SHARED_TOOLS = ("pages", "evaluate", "explain")
MAX_IMPORTS = 24  # of `train.loop`, where all that a run does and records meets
TIER = {room: number for number, rooms in enumerate(TIERS) for room in rooms.split()}
PACKAGES = {  # of a docstring alone; `methods` is a module too
    ".".join(f.parent.relative_to(PACKAGE).parts) for f in PACKAGE.rglob("__init__.py")
} - {"methods"}

# Who may import what is slow to import or not installed everywhere, at the top or inside a function.
HEAVY = {
    "tensorflow": {"core.tensorflow_import", "tools.export.saved_model"},
    "tensorflow_datasets": {"data.prepare"},
    "clu": {"run.workdir", "run.writers"},
    "sklearn": {"tools.probe.probing"},
    "orbax": {"core.internals", "run.checkpoint"},
}
INSIDE_FUNCTIONS_ONLY = {"tensorflow", "tensorflow_datasets", "clu", "sklearn"}
# What prints help and configs, and so must not import JAX: these and all that they import.
LIGHT = {
    "launch",
    "__main__",
    "cli.arguments",
    "cli.command_line",
    "tools.pages.inputs",
    "cli.main",
    "cli.openers",
    "cli.table",
    "core.cache",
    "core.memory",
    "run.environment",
    "config",
    "core.cpuinfo",
    "core.errors",
    "core.extras",
    "core.paths",
    "core.internals",
    "core.processes",
    "core.spec",
    "core.split_folders",
    "core.stopping",
    "core.terminal",
    "core.text",
    "core.typing",
    "data.image_files",
    "tools.export.formats",
}


def module_files():
    files = {".".join(f.relative_to(PACKAGE).with_suffix("").parts): f for f in PACKAGE.rglob("*.py")}
    files = {name.removesuffix("__init__").removesuffix("."): f for name, f in files.items()}
    return {**files, "launch": ROOT / "launch.py"}


FILES = module_files()


@functools.cache
def parsed(file):
    return ast.parse(file.read_text())


@functools.cache
def imports(file, top_level=False):
    """Dotted names of all modules that a file imports; with `top_level` those outside of functions alone."""
    found = set()

    def walk(node):
        if top_level and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            walk(child)

    walk(parsed(file))
    return found


def own_imports(file, top_level=False):
    """The modules of this package among them: `imgclf_jax.data.stream.Images` is `data.stream`."""
    found = set()
    for name in imports(file, top_level):
        parts = name.split(".")
        if parts[0] == "imgclf_jax":
            candidates = [".".join(parts[1:end]) for end in range(len(parts), 0, -1)]
            found.add(next(c for c in candidates if c in FILES))
    return found - {""}  # the package itself, which holds its version


def tool_of(name):
    """`pages` for a module of `tools/pages`, and "" for what belongs to no tool."""
    return name.split(".")[1] if name.startswith("tools.") else ""


def roots(file, top_level=False):
    return {name.split(".")[0] for name in imports(file, top_level)}


def tier(name):
    return TIER[name.split(".")[0]]


def test_imports_run_downward_only():
    for name, file in FILES.items():
        used = own_imports(file)
        wrong = used if name in PACKAGES else {u for u in used if u in PACKAGES or tier(u) > tier(name)}
        assert not wrong, f"{name} imports {wrong}, which are not below it"
        used -= {"core.typing"}  # names of types alone
        assert len(used) <= MAX_IMPORTS, f"{name} imports {len(used)} modules of the package: {sorted(used)}"


def test_no_imports_run_in_a_circle():
    graph = {name: own_imports(file) for name, file in FILES.items()}
    assert len(list(graphlib.TopologicalSorter(graph).static_order())) == len(FILES)  # raises CycleError


def test_a_tool_builds_on_no_other_but_the_shared_ones():
    """So each of the others is deleted by removing its folder and its line of the command table."""
    for name, file in FILES.items():
        for tool in {tool_of(used) for used in own_imports(file)} - {"", tool_of(name)}:
            own = tool_of(name)
            assert own, f"{name}, of the core, imports tools/{tool}"
            below = SHARED_TOOLS[: SHARED_TOOLS.index(own)] if own in SHARED_TOOLS else SHARED_TOOLS
            assert tool in below, f"{name} imports tools/{tool}"


def test_heavy_packages_are_imported_where_they_are_needed_alone():
    for package, allowed in HEAVY.items():
        assert {name for name, file in FILES.items() if package in roots(file)} == allowed
    top = set().union(*(roots(file, top_level=True) for file in FILES.values()))
    assert not top & INSIDE_FUNCTIONS_ONLY


def test_private_modules_of_other_libraries_are_imported_in_one_place():
    """As names with an underscore, and as attributes of imported modules."""
    for name, file in FILES.items():
        tree = parsed(file)
        others = {alias.asname or alias.name.split(".")[0]: alias.name for node in ast.walk(tree)
                  if isinstance(node, ast.Import) for alias in node.names}  # fmt: skip
        others |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for node in ast.walk(tree)
                   if isinstance(node, ast.ImportFrom) for alias in node.names}  # fmt: skip
        used = {
            f"{others[node.value.id]}.{node.attr}"
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in others
        }
        private = [one for one in imports(file) | used if re.search(r"(^|\.)_(?!_)", one)]
        assert set(private) <= {"os._exit", "sys._current_frames"} or name == "core.internals", f"{name}: {private}"


def test_what_prints_help_imports_nothing_heavy():
    for name in LIGHT:
        assert own_imports(FILES[name], top_level=True) <= LIGHT
        assert not roots(FILES[name], top_level=True) & {"jax", "flax", "optax", *HEAVY}


def test_data_take_values_and_no_config():
    """`datasets` alone turns the keys of a config into sources, samplers and images."""
    for name, file in FILES.items():
        if name.startswith("data."):
            assert "ml_collections" not in roots(file), name


def test_configs_import_the_config_module_alone():
    files = sorted((ROOT / "configs").glob("*.py"))
    assert len(files) >= 4
    for file in files:
        assert {name.rpartition(".")[0] for name in imports(file)} == {"imgclf_jax.config"}, file


def test_model_files_say_nothing_of_how_arrays_lie_in_memory():
    """A model is written in [b, h, w, c] and [b, n, d]; the layers know the rest."""
    words = re.compile(r"layout|mirror|inner|features_first|features_last|channel_axis|on_cpu|platform|barrier")
    for name in ("airbench", "backbones", "classifier", "convnext", "resnet", "vit"):
        file = PACKAGE / "models" / f"{name}.py"
        assert not words.findall(file.read_text()), file
        assert not [used for used in own_imports(file) if used.startswith("models.cpu")], file


# Where a file is opened, made, moved or removed other than by `core.paths`: none of them is a stranger's.
RAW = {
    "cli/main.py": "/dev/null", "core/text.py": "standard output", "core/cpuinfo.py": "/proc",
    "tools/export/saved_model.py": "a folder of its own",
    "data/sources.py": "the package", "tools/pages/html.py": "the package",
    "run/provenance.py": "code that is imported", "run/environment.py": "the cache",
    "data/image_check.py": "the cache",
    "run/lock.py": "the lock, by its name", "run/workdir.py": "the result, by its name",
    "tools/reproduce/command.py": "a folder of its own",
    "tools/explain/command.py": "the person's output",
    "tools/reproduce/show_batch.py": "the person's output",
    "tools/dryrun/command.py": "the work directory itself",
    "run/writers.py": "a bucket",
}  # fmt: skip


def test_one_helper_opens_and_one_replaces():
    """Others follow links, wait for pipes and truncate what has the name: see `core.paths`."""
    raw = re.compile(
        r"(?<![.\w])open\(|\bos\.(open|replace|rename|remove|unlink|rmdir|makedirs|truncate)\(|\b(shutil\.(rmtree|move|copy\w*)"
        r"|tempfile\.\w+|np\.load(?!\(stream|\(io))\(|\.(read_bytes|read_text|write_bytes|write_text|unlink|rmdir|mkdir|touch|symlink_to)\("
        r"|(?<!Image)(?<!paths)(?<!self)(?<!content)(?<!archive)\.open\("
    )
    found = {
        f"{name.replace('.', '/')}.py"
        for name, file in FILES.items()
        if raw.search(re.sub(r"(?m)#.*$", "", file.read_text()))
    }
    assert found - {"core/paths.py"} == RAW.keys()


def test_files_are_short_and_have_a_purpose():
    files = [f for d in ("imgclf_jax", "configs", "tests") for f in (ROOT / d).rglob("*.py")] + [ROOT / "launch.py"]
    assert len(files) > 40
    for file in files:
        text = file.read_text()
        assert len(text.splitlines()) <= 600, file  # a file is one thing: this is where to ask whether it still is
        assert file.stem not in ("utils", "util", "helpers", "common", "misc"), file
        assert ast.get_docstring(parsed(file)), f"{file} begins with a sentence that says what it is"


def test_public_functions_of_the_package_are_documented():
    """A class or function that another module uses says what it does; so does each module."""
    for name, file in FILES.items():
        for node in parsed(file).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{name}.{node.name}"


def test_the_training_loop_fits_on_a_screen():
    [loop] = [n for n in parsed(FILES["train.loop"]).body if getattr(n, "name", "") == "train"]
    assert loop.end_lineno - loop.lineno < 60


def test_signatures_name_what_they_take():
    """`Any` is for what really is anything; `core.typing` has the names of pytrees, batches, JSON and the like."""
    lines = [line for file in FILES.values() for line in file.read_text(encoding="utf-8").splitlines()]
    assert sum(bool(re.search(r"\bAny\b", line)) for line in lines) <= 250
    named = r"(?<!\*)\b(params|model_state|opt_state|variables|batch|tree|dtype|grads): Any\b"
    assert not [line for line in lines if re.search(named, line)]
