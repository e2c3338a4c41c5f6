"""The shape of the code: imports run downward only, files stay short, heavy imports stay where they belong."""

import ast
import functools
import graphlib
import re
from pathlib import Path

from imgclf_jax.cli import table

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "imgclf_jax"

# The rooms and modules of the package in tiers, lowest first. A module imports from its own tier and from those below.
TIERS = [
    "core",
    "config losses methods metrics models optim scores",
    "augment data",
    "run step",
    "datasets programs recipe",
    "weights",
    "trained",
    "cli train",
    "tools",
    "__main__ launch",
]
# The tools that others build on, each on those before it. All other tools can be deleted one by one.
SHARED_TOOLS = ("pages", "evaluate", "explain")
OPTIONAL = {"tensorflow", "tensorflow_datasets", "clu", "sklearn"}
TIER = {room: number for number, rooms in enumerate(TIERS) for room in rooms.split()}
PACKAGES = {  # of a docstring alone; `methods` is a module too
    ".".join(f.parent.relative_to(PACKAGE).parts) for f in PACKAGE.rglob("__init__.py")
} - {"methods"}


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


def tier(name):
    return TIER[name.split(".")[0]]


def test_imports_run_downward_only():
    for name, file in FILES.items():
        used = own_imports(file)
        wrong = used if name in PACKAGES else {u for u in used if u in PACKAGES or tier(u) > tier(name)}
        assert not wrong, f"{name} imports {wrong}, which are not below it"


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


def test_each_tool_has_a_command():
    """So a test that skips because a tool is deleted does not hide one whose line of the table was lost."""
    modules = [command.module for command in table.COMMANDS.values()]
    assert {tool_of(name) for name in modules} - {""} == {tool_of(name) for name in FILES} - {"", "pages"}


def test_private_modules_of_other_libraries_are_imported_in_one_place():
    for name, file in FILES.items():
        private = [one for one in imports(file) if re.search(r"(^|\.)_(?!_)", one)]
        assert not private or name == "core.internals", f"{name}: {private}"


def test_what_may_be_missing_is_imported_inside_functions():
    for name, file in FILES.items():
        assert not {used.split(".")[0] for used in imports(file, top_level=True)} & OPTIONAL, name


def test_configs_import_the_config_module_alone():
    files = sorted((ROOT / "configs").glob("*.py"))
    for file in files:
        assert {name.rpartition(".")[0] for name in imports(file)} == {"imgclf_jax.config"}, file


def test_files_are_short_and_have_a_purpose():
    files = [f for d in ("imgclf_jax", "configs", "tests") for f in (ROOT / d).rglob("*.py")] + [ROOT / "launch.py"]
    for file in files:
        text = file.read_text()
        assert len(text.splitlines()) <= 600, file  # a file is one thing: this is where to ask whether it still is
        assert file.stem not in ("utils", "util", "helpers", "common", "misc"), file
        assert ast.get_docstring(parsed(file)), f"{file} begins with a sentence that says what it is"


def test_public_functions_of_the_package_are_documented():
    for name, file in FILES.items():
        for node in parsed(file).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{name}.{node.name}"


def test_the_training_loop_fits_on_a_screen():
    [loop] = [n for n in parsed(FILES["train.loop"]).body if getattr(n, "name", "") == "train"]
    assert loop.end_lineno - loop.lineno < 60
