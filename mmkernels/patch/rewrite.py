"""Replace one known fragment of a function's body; keep the rest of the function and its decorators.

``Rewrite.apply(function)`` takes five steps:

1. *Peel* (``_peel``): follow ``__wrapped__`` through the decorators to the plain function.
2. *Read* (``_Source``): parse the file of that function, and check that it compiles to the loaded code.
3. *Substitute* (``Rewrite._substitute``): find the pattern in the syntax tree of the function, exactly once,
   and make it the ``else`` branch of an ``if``.
4. *Compile* (``_Source.close_over``, ``_Source.compile``): compile the changed file without executing it,
   and take the code of the one function. The helpers are closure variables of it.
5. *Wrap again* (``_rewrap``): copy each wrapper of step 1, with the new function in its closure.

For the pattern of ``recognisers/transformers.py`` the body of a ``forward`` changes so::

    before                                                  after

    HIDDEN stands for hidden_states                         (_mmkernels_mix and _mmkernels_mixable are
    WEIGHTS stands for norm_weights                         closure variables of the new function)

    if self.config.use_weighted_layer_sum:                  if self.config.use_weighted_layer_sum:
        hidden_states = outputs[2]                              hidden_states = outputs[2]
                                                                if _mmkernels_mixable(hidden_states, ...):
                                                                    hidden_states = _mmkernels_mix(...)
                                                                else:
        hidden_states = torch.stack(hidden_states, dim=1)           hidden_states = torch.stack(...)
        norm_weights = nn.functional.softmax(...)                   norm_weights = nn.functional.softmax(...)
        hidden_states = (hidden_states * ...).sum(dim=1)            hidden_states = (...).sum(dim=1)
    else:                                                   else:
        hidden_states = outputs[0]                              hidden_states = outputs[0]
"""

from __future__ import annotations
import __future__

import ast
import dataclasses
import functools
import inspect
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import CellType, CodeType, FunctionType
from typing import Any

import torch

from mmkernels.patch.recogniser import Unsupported

_FUTURE_FLAGS = functools.reduce(
    lambda flags, name: flags | getattr(__future__, name).compiler_flag, __future__.all_feature_names, 0
)


@dataclass(frozen=True)
class Rewrite:
    """A fragment of a function and its replacement.

    ``pattern`` is a block of statements; each upper-case name in it stands for one variable. In the function
    the block becomes ``if condition: replacement, else: block``.
    """

    pattern: str
    meanings: Mapping[str, object]
    """Global names in the pattern, and the objects that they must be bound to."""
    condition: str
    replacement: str
    helpers: Mapping[str, Callable[..., Any]]
    """Functions that ``condition`` and ``replacement`` call; closure variables of the new function."""

    def apply(self, function: Callable[..., Any]) -> FunctionType:
        """A copy of ``function`` with the fragment replaced in its innermost function.

        Raises:
            Unsupported: the source is missing or not that of the loaded code, the pattern does not occur
                exactly once, or a decorator hides the function that it wraps.
        """
        wrappers, inner = _peel(function)
        source = _Source(inner)
        self._substitute(source.definition, inner)
        source.close_over(self.helpers)
        code = source.compile()
        rewritten = _with_code(inner, code, self.helpers)
        return functools.reduce(
            lambda wrapped, wrapper: _rewrap(wrapper, wrapped), reversed(wrappers), rewritten
        )

    def _substitute(self, tree: ast.FunctionDef, function: FunctionType) -> None:
        """Step 3, in place."""
        pattern = ast.parse(textwrap.dedent(self.pattern)).body
        found = [match for block in _blocks(tree) for match in _matches(pattern, block)]
        if len(found) != 1:
            raise Unsupported(
                f"unknown layout: the expected statements occur {len(found)} times in its {tree.name}"
            )
        block, start, variables = found[0]
        original = block[start : start + len(pattern)]
        self._check_names(tree, function, original, variables)
        conditional = ast.parse(f"if {self.condition}:\n{textwrap.indent(self.replacement, '  ')}").body[0]
        assert isinstance(conditional, ast.If)
        for node in ast.walk(conditional):
            if isinstance(node, ast.Name):
                node.id = variables.get(node.id, node.id)
            if isinstance(node, (ast.stmt, ast.expr)):
                ast.copy_location(node, original[0])
        conditional.orelse = original
        block[start : start + len(pattern)] = [conditional]

    def _check_names(
        self,
        tree: ast.FunctionDef,
        function: FunctionType,
        original: list[ast.stmt],
        variables: dict[str, str],
    ) -> None:
        for name, meaning in self.meanings.items():
            if name in function.__code__.co_varnames or function.__globals__.get(name) is not meaning:
                raise Unsupported(f"unknown layout: {name!r} in its {tree.name} is not the expected object")
        taken = set(self.helpers) & {*function.__code__.co_varnames, *function.__code__.co_names}
        if taken:
            raise Unsupported(f"unknown layout: its {tree.name} uses the name {taken.pop()!r}")
        assigned = {
            node.id
            for statement in original
            for node in ast.walk(statement)
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
        }
        for variable, name in variables.items():
            # A variable that the fragment sets and the replacement does not must not be read after it.
            unset = name in assigned and variable not in self.replacement
            if unset and _uses(name, [tree]) != _uses(name, original):
                raise Unsupported(
                    f"unknown layout: its {tree.name} uses {name!r} outside the expected statements"
                )


@dataclass(frozen=True)
class Body:
    """The whole of a function: a definition whose upper-case names each stand for one variable.

    Annotations, defaults and a docstring are not compared.
    """

    definition: str
    meanings: Mapping[str, object] = dataclasses.field(default_factory=dict)
    """Global names in the definition, and the objects that they must be bound to."""

    def matches(self, function: object) -> bool:
        """Whether a plain function has this source, and was compiled from it."""
        if not isinstance(function, FunctionType) or "__wrapped__" in function.__dict__:
            return False
        try:
            found = _Source(function).definition
        except Unsupported:
            return False
        wanted = ast.parse(textwrap.dedent(self.definition)).body[0]
        assert isinstance(wanted, ast.FunctionDef)
        return (
            not found.decorator_list
            and _argument_names(wanted) == _argument_names(found)
            and _unify(wanted.body, _without_docstring(found.body), {})
            and all(function.__globals__.get(name) is meaning for name, meaning in self.meanings.items())
        )


class KnownFunctions:
    """Names of functions by their source; each function is read once."""

    def __init__(self, *bodies: tuple[str, Body]) -> None:
        self._bodies = bodies
        self._names: dict[object, str | None] = {}

    def name(self, function: object) -> str | None:
        """The name of the first body that the function has, or None.

        Raises:
            Unsupported: torch.compile is tracing a function that was not read before.
        """
        if function not in self._names:
            if torch.compiler.is_compiling():
                raise Unsupported("not examined before torch.compile")
            self._names[function] = next(
                (name for name, body in self._bodies if body.matches(function)), None
            )
        return self._names[function]


def innermost(function: Any) -> FunctionType | None:
    """The plain function under a stack of decorators; None for anything that is not a function."""
    function = inspect.unwrap(function) if callable(function) else None
    return function if isinstance(function, FunctionType) else None


def _peel(function: Callable[..., Any]) -> tuple[list[FunctionType], FunctionType]:
    """The wrappers of a function, the outermost first, and the plain function under them."""
    wrappers: list[FunctionType] = []
    while isinstance(function, FunctionType):
        wrapped = function.__dict__.get("__wrapped__")
        if wrapped is None:
            return wrappers, function
        if sum(_holds(cell, wrapped) for cell in function.__closure__ or ()) != 1:
            break
        wrappers.append(function)
        function = wrapped
    raise Unsupported(
        f"unknown layout: {getattr(function, '__qualname__', function)!r} hides the function it wraps"
    )


def _holds(cell: CellType, value: object) -> bool:
    try:
        return cell.cell_contents is value
    except ValueError:  # an empty cell
        return False


def _rewrap(wrapper: FunctionType, wrapped: FunctionType) -> FunctionType:
    """The decorator's wrapper around another function: a copy whose closure holds that one instead."""
    previous = wrapper.__dict__["__wrapped__"]
    closure = tuple(
        CellType(wrapped) if _holds(cell, previous) else cell for cell in wrapper.__closure__ or ()
    )
    clone = FunctionType(
        wrapper.__code__, wrapper.__globals__, wrapper.__name__, wrapper.__defaults__, closure
    )
    functools.update_wrapper(clone, wrapper)
    clone.__kwdefaults__ = wrapper.__kwdefaults__
    clone.__dict__["__wrapped__"] = wrapped
    return clone


def _with_code(
    function: FunctionType, code: CodeType, helpers: Mapping[str, Callable[..., Any]]
) -> FunctionType:
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    cells |= {name: CellType(helper) for name, helper in helpers.items()}
    closure = tuple(cells[name] for name in code.co_freevars)
    clone = FunctionType(code, function.__globals__, function.__name__, function.__defaults__, closure)
    functools.update_wrapper(clone, function)
    clone.__kwdefaults__ = function.__kwdefaults__
    del clone.__dict__["__wrapped__"]
    return clone


class _Source:
    """The file that a function comes from, as a syntax tree, and the function's definition in it.

    The whole file is compiled, because the code of a function depends on its surroundings: the imports of the
    module, and the classes and functions around it. Nothing is executed.
    """

    def __init__(self, function: FunctionType) -> None:
        self._code = function.__code__
        try:
            lines, _ = inspect.findsource(function)
            self._module = ast.parse("".join(lines))
        except (OSError, TypeError, SyntaxError) as error:
            raise Unsupported("its source is not available") from error
        found = [
            (block, node) for block in _blocks(self._module) for node in block if self._defines_function(node)
        ]
        if len(found) != 1 or not _same_code(self.compile(), self._code):
            raise Unsupported("its source on disk is not that of the loaded code")
        self._block, definition = found[0]
        assert isinstance(definition, ast.FunctionDef)
        self.definition = definition

    def _defines_function(self, node: ast.stmt) -> bool:
        if not isinstance(node, ast.FunctionDef) or node.name != self._code.co_name:
            return False
        first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        return first == self._code.co_firstlineno

    def close_over(self, names: Iterable[str]) -> None:
        """Make names free variables of the function, by a function around it that has them as parameters."""
        enclosing = ast.parse(f"def enclosing({', '.join(names)}): pass").body[0]
        assert isinstance(enclosing, ast.FunctionDef)
        enclosing.body = [self.definition]
        self._block[self._block.index(self.definition)] = enclosing

    def compile(self) -> CodeType:
        """The function's code object, or the file's where it does not hold the function."""
        flags = self._code.co_flags & _FUTURE_FLAGS
        file = compile(self._module, self._code.co_filename, "exec", flags=flags, dont_inherit=True)
        place = self._code.co_name, self._code.co_firstlineno
        return next((code for code in _nested(file) if (code.co_name, code.co_firstlineno) == place), file)


def _nested(code: CodeType) -> Iterator[CodeType]:
    for const in code.co_consts:
        if isinstance(const, CodeType):
            yield const
            yield from _nested(const)


def _same_code(left: CodeType, right: CodeType) -> bool:
    def essence(code: CodeType) -> tuple[Any, ...]:
        consts = tuple(
            essence(const) if isinstance(const, CodeType) else repr(const) for const in code.co_consts
        )
        return code.co_code, code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars, consts

    return essence(left) == essence(right)


def _blocks(tree: ast.AST) -> Iterator[list[ast.stmt]]:
    for node in ast.walk(tree):
        for field in ("body", "orelse", "finalbody"):
            block = getattr(node, field, None)
            if isinstance(block, list):
                yield block


def _matches(
    pattern: list[ast.stmt], block: list[ast.stmt]
) -> Iterator[tuple[list[ast.stmt], int, dict[str, str]]]:
    for start in range(len(block) - len(pattern) + 1):
        variables: dict[str, str] = {}
        if all(_unify(want, have, variables) for want, have in zip(pattern, block[start:], strict=False)):
            yield block, start, variables


def _unify(pattern: Any, node: Any, variables: dict[str, str]) -> bool:
    """Whether the trees are equal, up to one consistent naming of the pattern's upper-case names."""
    if type(pattern) is not type(node):
        return False
    if isinstance(pattern, ast.Name) and pattern.id.isupper():
        return variables.setdefault(pattern.id, node.id) == node.id
    if isinstance(pattern, ast.AST):
        return all(
            _unify(value, getattr(node, field, None), variables) for field, value in ast.iter_fields(pattern)
        )
    if isinstance(pattern, list):
        return len(pattern) == len(node) and all(
            _unify(p, n, variables) for p, n in zip(pattern, node, strict=True)
        )
    return bool(pattern == node)


def _argument_names(definition: ast.FunctionDef) -> list[str]:
    return [node.arg for node in ast.walk(definition.args) if isinstance(node, ast.arg)]


def _without_docstring(body: list[ast.stmt]) -> list[ast.stmt]:
    first = body[0]
    documented = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    return body[1:] if documented else body


def _uses(name: str, trees: list[Any]) -> int:
    return sum(isinstance(node, ast.Name) and node.id == name for tree in trees for node in ast.walk(tree))
