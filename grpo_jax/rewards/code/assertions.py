"""Static check that a test can fail: that it reaches an assertion whose truth depends on the program."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator, Sequence

ASSERTING = ("assert", "fail", "raises")
Function = ast.FunctionDef | ast.AsyncFunctionDef
Definition = Function | ast.ClassDef


def can_fail(tree: ast.Module) -> bool:
    """Whether code of a test that is run asserts or raises.

    Functions that nothing calls, branches whose condition is constant and code after a ``return`` are not run.
    Assertions that are always true, such as ``f(1) or True`` or ``1 == 1``, do not count.
    """
    for node in run_nodes(tree):
        match node:
            case ast.Raise():
                return True
            case ast.Assert(test=test):
                if _truth(test) is False or (_truth(test) is None and not _is_fixed(test)):
                    return True
            case ast.Call(func=ast.Attribute(attr=name) | ast.Name(id=name), args=args) if name.lower().startswith(
                ASSERTING
            ):
                if not args or not name.startswith("assert") or not all(map(_is_fixed, args)):
                    return True
    return False


def run_nodes(tree: ast.Module) -> Iterator[ast.AST]:
    """The nodes of a test that can be run: statements, definitions that the test runner calls, and what these use."""
    defined: dict[str, list[Definition]] = defaultdict(list)
    used: set[str] = set()
    blocks = [tree.body]
    blocks += [
        body for each in tree.body if isinstance(each, Definition) and _is_collected(each) for body in _run(each)
    ]
    while blocks:
        for node in _reached(blocks.pop()):
            yield node
            if isinstance(node, Definition):
                defined[node.name].append(node)
            elif isinstance(node, ast.Name):
                used.add(node.id)
        for name in used & defined.keys():
            blocks += [body for each in defined.pop(name) for body in _run(each)]


def _is_collected(node: Definition) -> bool:
    """Whether pytest, unittest or HumanEval would run something that a test defines."""
    if not isinstance(node, ast.ClassDef):
        return node.name.startswith("test") or node.name == "check"
    has_tests = any(getattr(each, "name", "").startswith("test") for each in node.body)
    return has_tests and (node.name.startswith("Test") or any("TestCase" in ast.unparse(base) for base in node.bases))


def _run(definition: Definition) -> list[list[ast.stmt]]:
    """The blocks that run when a definition is used: the body of a function, or of every method of a class."""
    if isinstance(definition, ast.ClassDef):
        return [each.body for each in definition.body if isinstance(each, Function)]
    return [definition.body]


def _reached(block: Sequence[ast.stmt]) -> Iterator[ast.AST]:
    """The nodes of a block that can be run, without the bodies of functions that it defines."""
    for statement in block:
        if isinstance(statement, Definition):
            yield statement
            for decorator in statement.decorator_list:
                yield from ast.walk(decorator)
            if isinstance(statement, ast.ClassDef):
                yield from _reached(statement.body)
            continue
        yield statement
        branches = _branches(statement)
        for part in ast.iter_child_nodes(statement):
            if not isinstance(part, (ast.stmt, ast.excepthandler, ast.match_case)):
                yield from ast.walk(part)
        for branch in branches:
            yield from _reached(branch)
        if _ends(statement):
            return


def _branches(statement: ast.AST) -> list[Sequence[ast.stmt]]:
    """The blocks of a compound statement that can be run."""
    match statement:
        case ast.If(test=test, body=body, orelse=orelse):
            truth = _truth(test)
            return [branch for branch, is_out in ((body, truth is False), (orelse, truth is True)) if not is_out]
        case ast.While(test=test, body=body, orelse=orelse):
            return [orelse] if _truth(test) is False else [body, orelse]
        case ast.Try(body=body, handlers=handlers, orelse=orelse, finalbody=finalbody):
            return [body, *(handler.body for handler in handlers), orelse, finalbody]
        case ast.Match(cases=cases):
            return [case.body for case in cases]
    return [block for name in ("body", "orelse") if isinstance(block := getattr(statement, name, None), list)]


def _ends(statement: ast.stmt) -> bool:
    """Whether the statements that follow this one in its block are never run."""
    if isinstance(statement, (ast.Return, ast.Raise, ast.Break, ast.Continue)):
        return True
    if not isinstance(statement, ast.If):
        return False
    branches = _branches(statement)
    has_both = len(branches) == 1 or bool(statement.orelse)
    return has_both and all(any(map(_ends, branch)) for branch in branches)


def _truth(expression: ast.expr) -> bool | None:
    """The truth value of an expression if it does not depend on the values of names; None if it does."""
    match expression:
        case ast.Constant(value=value):
            return bool(value)
        case ast.Tuple(elts=elements) | ast.List(elts=elements) if not any(
            isinstance(each, ast.Starred) for each in elements
        ):
            return bool(elements)
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            truth = _truth(operand)
            return None if truth is None else not truth
        case ast.BoolOp(op=operator, values=values):
            truths, decides = {_truth(each) for each in values}, isinstance(operator, ast.Or)
            return decides if decides in truths else None if None in truths else not decides
    return None


def _is_fixed(expression: ast.expr) -> bool:
    """Whether an expression contains no names, so that its value does not depend on the program."""
    return not any(isinstance(node, ast.Name) for node in ast.walk(expression))
