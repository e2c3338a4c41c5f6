"""The mini-language `name(arg, key=value)|name2(...)` by which a config names sources, ops, models and the rest.

A spec is text, readable in the config and in the run's record. Arguments are Python literals, parsed by
`ast.literal_eval` and never evaluated. User code is named by its import path: `my_pkg.my_module:my_function(width=3)`.
"""

import ast
import contextlib
import functools
import importlib.util
import inspect
import re
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from imgclf_jax.core.errors import Untrusted, UserError, shown, unknown
from imgclf_jax.core.typing import Function, Value

_CALL = re.compile(r"\s*([A-Za-z_][\w.]*(?::[A-Za-z_]\w*)?)\s*(\(.*\))?\s*", re.DOTALL)
_TOKEN = re.compile(  # a string, a comment or a character
    r"""'''.*?'''|""\".*?""\"|'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*"|#[^\n]*|.""", re.DOTALL
)

type Table = Mapping[str, Any]  # the registry of one kind: functions and classes by name


@dataclass(frozen=True)
class Call:
    """One `name(args, **kwargs)` of a spec; `str()` returns text that parses to an equal Call."""

    name: str
    args: tuple[Value, ...] = ()
    kwargs: dict[str, Value] = field(default_factory=dict)

    def __str__(self) -> str:
        parts = [repr(a) for a in self.args] + [f"{k}={v!r}" for k, v in self.kwargs.items()]
        return f"{self.name}({', '.join(parts)})" if parts else self.name


def parse(text: str) -> list[Call]:
    """Parses a spec of any number of calls joined by `|`; empty text is an empty list.

    Raises UserError for text outside the grammar and for an argument that is not a Python literal.
    """
    return [_parse_call(part, text) for part in split_calls(text)] if text.strip() else []


def parse_one(text: str) -> Call:
    """Parses a spec of exactly one call."""
    calls = parse(text)
    if len(calls) != 1:
        raise UserError(f"in spec {shown(text)}: expected exactly one name(...), found {len(calls)}")
    return calls[0]


def split_calls(text: str) -> list[str]:
    """Splits a spec at each `|` outside brackets, strings and comments."""
    parts, depth = [""], 0
    for token in _TOKEN.findall(text):
        depth += (token in "([{") - (token in ")]}")
        if token == "|" and not depth:
            parts.append("")
        else:
            parts[-1] += token
    return parts


def _parse_call(part: str, text: str) -> Call:
    match = _CALL.fullmatch(part)
    if not match:
        raise UserError(f"in spec {shown(text)}: {shown(part.strip())} is not of the form name(arg, key=value), or "
                        "module:name(arg) with the module's name without folder and .py")  # fmt: skip
    name, arguments = match.groups()
    try:
        node = ast.parse(f"f{arguments or '()'}", mode="eval").body
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
            raise ValueError
        args = tuple(map(_literal, node.args))
        kwargs = {k.arg: _literal(k.value) for k in node.keywords if k.arg is not None}
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError) as e:
        raise UserError(
            f"in spec {shown(text)}: the arguments of {name!r} are not literals: {shown(arguments)}; write finite "
            "numbers, quoted strings, True, False, None, and tuples, lists and dicts of these"
        ) from e
    if len(kwargs) < len(node.keywords):
        raise UserError(f"in spec {shown(text)}: {name!r} is given an argument twice, or **arguments")
    return Call(name, args, kwargs)


def _literal(node: ast.expr) -> Value:
    value = ast.literal_eval(node)
    if ast.literal_eval(repr(value)) != value:  # inf has no literal, and specs must round-trip
        raise ValueError
    return value


_untrusted: list[str] = []  # the owners of specs that are being read


@contextlib.contextmanager
def untrusted(owner: str) -> Iterator[None]:
    """Refuses imports and network access by specs and paths inside, since these come from an untrusted `owner`.

    It holds for all threads, since worker threads build specs too.
    """
    _untrusted.append(owner)
    try:
        yield
    finally:
        _untrusted.remove(owner)


def check_trusted(what: str) -> None:
    """Raises Untrusted inside `untrusted`; `what` is the thing that a spec names, and what it would run."""
    for owner in _untrusted:
        raise Untrusted(f"{owner} names {what}; if you trust both, add --trust")


def lookup(call: Call, table: Table, kind: str) -> Function:
    """Looks up the function or class that `call` names, in `table` or by import path; UserError if there is none."""
    if ":" not in call.name:
        if call.name not in table:
            if not table:
                raise UserError(f"unknown {kind} {call.name!r}: write the import path of yours, module:name")
            raise UserError(unknown(kind, call.name, table) + ", or an import path module:name")
        return table[call.name]
    module_name, _, attribute = call.name.partition(":")
    check_trusted(f"{kind} {call.name!r}, which would import the module {module_name!r} and run its code")
    try:
        module = _import(module_name)
    except (ImportError, SyntaxError) as e:
        raise UserError(f"cannot import {module_name!r} for {kind} {call.name!r}: {e}; it must be in the config's "
                        "folder, the current one or PYTHONPATH, and is named without .py") from e  # fmt: skip
    if not callable(getattr(module, attribute, None)):
        names = [n for n in dir(module) if callable(getattr(module, n)) and not n.startswith("_")]
        raise UserError(unknown(kind, call.name, [f"{module_name}:{name}" for name in names]))
    return getattr(module, attribute)


folders: list[str] = []  # where a user's own modules are


def _import(name: str) -> Any:
    """Imports a user's module. Only now their folders are searched, after the installed packages.

    Before, a file there, which may be a stranger's, would stand in for an optional package that is not installed.
    """
    package = name.partition(".")[0]
    if package not in sys.modules and not importlib.util.find_spec(package):
        sys.path += [folder for folder in folders if folder not in sys.path]
    return importlib.import_module(name)


def bind(
    call: Call, table: Table, kind: str, leading: tuple[str, ...] = (), by_name: Collection[str] = ()
) -> functools.partial[Any]:
    """Looks up `call` and binds its arguments: `functools.partial(function, *args, **kwargs)`.

    `leading` names the first arguments that the caller passes, such as `key` and `images`; the spec cannot set those
    parameters, whatever their names. The caller also passes the parameters in `by_name`, unless the spec sets them by
    name. Raises UserError if the arguments do not fit the signature.
    """
    function = lookup(call, table, kind)
    try:
        signature = inspect.signature(function).parameters
    except ValueError as e:
        raise UserError(f"in {kind} {str(call)!r}: {call.name} has no readable signature: {e}") from e
    named = [name for name, p in signature.items() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(named) < len(leading) and not any(p.kind is p.VAR_POSITIONAL for p in signature.values()):
        raise UserError(f"{kind} {call.name!r} takes ({', '.join(signature)}); it must take ({', '.join(leading)}), "
                        "and then its own arguments")  # fmt: skip
    positional = named[: len(leading)]
    linen = ("parent", "name") if "parent" in signature else ()  # fields that flax adds to every module
    own = [p for name, p in signature.items() if name not in positional and name not in linen]
    own = [p.replace(kind=p.KEYWORD_ONLY, default=None) if p.name in by_name else p for p in own]
    own.sort(key=lambda p: p.kind)
    for key in call.kwargs:
        if key not in {p.name for p in own} and not any(p.kind is p.VAR_KEYWORD for p in own):
            raise UserError(f"in {kind} {str(call)!r}: " + unknown("argument", key, [p.name for p in own]))
    try:
        inspect.signature(function).replace(parameters=own).bind(*call.args, **call.kwargs)
    except TypeError as e:
        raise UserError(f"in {kind} {str(call)!r}: {e}; its arguments: {', '.join(p.name for p in own)}") from e
    if positional or by_name:
        return functools.partial(function, **dict(zip((p.name for p in own), call.args, strict=False)), **call.kwargs)
    return functools.partial(function, *call.args, **call.kwargs)


def names_code(text: str) -> bool:
    """Whether a spec, or a spec among its arguments, names code by an import path."""
    calls = parse(text)
    values = [value for call in calls for value in (*call.args, *call.kwargs.values()) if isinstance(value, str)]
    nested = [value for value in values if _CALL.fullmatch(value) and ":" in value]
    return any(":" in call.name for call in calls) or any(map(names_code, nested))


def occurrences(calls: Sequence[Call]) -> list[int]:
    """The number of earlier calls of the same name, for each call. With the name, it keys the call's random draws."""
    return [[c.name for c in calls[:i]].count(call.name) for i, call in enumerate(calls)]


def declared(function: Function, name: str, default: Any) -> Any:
    """The attribute `name` of a function, or else of the one that it binds or wraps; `default` if none has it.

    `functools.partial` hides the attributes of the function that it binds, and has attributes of its own.
    """
    while not hasattr(function, name):
        inner = getattr(function, "func", getattr(function, "__wrapped__", None))  # of a partial, or as of jax.jit
        if inner is None:
            return default
        function = inner
    return getattr(function, name)


def takes(function: Function, first: str) -> bool:
    """Whether the first parameter of a function has this name; False if Python does not know its parameters."""
    try:
        return next(iter(inspect.signature(function).parameters), None) == first
    except ValueError:  # of builtins, and in Python 3.12.1 of type aliases such as `Callable[[int], int]`
        return False
