"""The declared entry of a plain .cu: which function is called, with what, and what it fills.

    // specgen: entry=row_softmax(in0, weight.scale, out0, in0.shape[0]:int, in0.shape[1]:int, stream)
    // specgen: out0=like(in0)
    // specgen: tmp0=float32[in0.shape[0], 2]
    extern "C" int row_softmax(const float* x, const float* scale, float* y, int rows, int columns, cudaStream_t stream)

in0, in1 ... are the inputs (tensors and numbers of a nest, depth first), weight.NAME the reference's parameters and
buffers, init0 ... the numbers the model is constructed with. Values are integer arithmetic over .shape[k], .stride[k],
.numel and numbers. The function returns a cudaError_t; what it launches goes to `stream`.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

C_TYPES = ("int", "int64", "float", "double", "bool")
FLAGS = re.compile(
    r"--use_fast_math|-maxrregcount=\d{1,3}|--maxrregcount=\d{1,3}|-std=c\+\+(?:17|20)|-O[0-3]|-lineinfo"
)
_LINE = re.compile(r"^[ \t]*//[ \t]*specgen:[ \t]*(?P<key>\w+)[ \t]*=[ \t]*(?P<value>.*?)[ \t]*$", re.MULTILINE)
_CALL = re.compile(r"(?P<name>[A-Za-z_]\w*)\s*\((?P<arguments>.*)\)")
_POINTER = re.compile(r"(?:in|out|tmp)\d+|weight\.[\w.]+|stream")
_MADE = re.compile(r"(?:out|tmp)\d+")
_LIKE = re.compile(r"like\(\s*(in\d+)\s*\)")
_SHAPED = re.compile(r"(?P<dtype>[a-z]\w*|in\d+\.dtype)\[(?P<shape>.*)\]")


class EntryError(ValueError):
    """A declaration that can't be read; the message names its line and says what is allowed."""


class Argument(NamedTuple):
    """One argument of the entry. kind: 'pointer' (text names it) or a C type (text is an expression)."""

    kind: str
    text: str


class Buffer(NamedTuple):
    """A tensor made for a call. like: the input whose shape and dtype it has; else dtype and shape expressions."""

    name: str
    like: str
    dtype: str
    shape: tuple[str, ...]


@dataclass(frozen=True)
class Entry:
    name: str
    arguments: tuple[Argument, ...]
    outputs: tuple[Buffer, ...]
    scratch: tuple[Buffer, ...] = ()
    flags: tuple[str, ...] = field(default=())

    def defined_in(self, source: str) -> bool:
        code = re.sub(r"//[^\n]*|/\*.*?\*/", " ", source, flags=re.DOTALL)
        definition = rf"\b(?:int|cudaError_t)\s+(?:__host__\s+)?{self.name}\s*\("
        return re.search(definition, code) is not None and 'extern "C"' in code


def parse_entry(source: str) -> Entry:
    """Raises EntryError."""
    lines = [
        (source[: found.start()].count("\n") + 1, found["key"], found["value"]) for found in _LINE.finditer(source)
    ]
    calls = [(number, value) for number, key, value in lines if key == "entry"]
    if len(calls) != 1:
        raise EntryError(
            f"a plain .cu needs one line '// specgen: entry=NAME(in0, ..., out0, ..., stream)'; it has {len(calls)}"
        )
    number, text = calls[0]
    call = _CALL.fullmatch(text)
    if call is None:
        raise EntryError(f"line {number}: entry={text!r} is not NAME(argument, ...)")
    arguments = tuple(_argument(part, number) for part in _split(call["arguments"]))
    made = [_buffer(key, value, number) for number, key, value in lines if _MADE.fullmatch(key)]
    flags = tuple(flag for number, key, value in lines if key == "flags" for flag in _flags(value, number))
    for number, key, _ in lines:
        if key not in ("entry", "flags") and not _MADE.fullmatch(key):
            raise EntryError(f"line {number}: {key} is none of entry, outN, tmpN, flags")
    outputs = tuple(sorted((one for one in made if one.name.startswith("out")), key=lambda one: int(one.name[3:])))
    if not outputs:
        raise EntryError("no line '// specgen: out0=like(in0)' or '// specgen: out0=float32[in0.shape[0]]'")
    known = {one.name for one in made}
    for argument in arguments:
        if _MADE.fullmatch(argument.text) and argument.kind == "pointer" and argument.text not in known:
            raise EntryError(f"line {calls[0][0]}: {argument.text} is passed but no line declares its shape")
    scratch = tuple(one for one in made if one.name.startswith("tmp"))
    return Entry(call["name"], arguments, outputs, scratch, flags)


def _argument(text: str, line: int) -> Argument:
    if _POINTER.fullmatch(text):
        return Argument("pointer", text)
    expression, colon, kind = text.rpartition(":")
    if not colon:
        expression, kind = text, "int"
    kind = kind.strip()
    if kind not in C_TYPES:
        raise EntryError(f"line {line}: {text!r}: the type {kind!r} is none of {', '.join(C_TYPES)}")
    _parse_expression(expression, line)
    return Argument(kind, expression.strip())


def _buffer(name: str, text: str, line: int) -> Buffer:
    like = _LIKE.fullmatch(text)
    if like:
        return Buffer(name, like[1], "", ())
    shaped = _SHAPED.fullmatch(text)
    if shaped is None:
        raise EntryError(f"line {line}: {name}={text!r}: use like(inN) or DTYPE[size, ...]")
    sizes = tuple(_split(shaped["shape"]))
    for size in sizes:
        _parse_expression(size, line)
    return Buffer(name, "", shaped["dtype"], sizes)


def _flags(text: str, line: int) -> list[str]:
    for flag in text.split():
        if not FLAGS.fullmatch(flag):
            raise EntryError(f"line {line}: the flag {flag!r} is not allowed; use {FLAGS.pattern}")
    return text.split()


def _split(text: str) -> list[str]:
    """At commas outside brackets."""
    parts, depth, start = [], 0, 0
    for index, char in enumerate(text):
        depth += (char in "([") - (char in ")]")
        if char == "," and depth == 0:
            parts.append(text[start:index].strip())
            start = index + 1
    last = text[start:].strip()
    return [*parts, last] if last or parts else []


@functools.lru_cache(maxsize=256)  # a call's values are computed within its timed region
def _parse_expression(text: str, line: int = 0) -> ast.expr:
    where = f"line {line}: " if line else ""
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except SyntaxError:
        raise EntryError(f"{where}{text!r} is no expression") from None
    allowed = (ast.BinOp, ast.UnaryOp, ast.Constant, ast.Name, ast.Attribute, ast.Subscript, ast.operator, ast.unaryop)
    for node in ast.walk(tree):
        if not isinstance(node, (*allowed, ast.expr_context)):
            raise EntryError(f"{where}{text!r}: only numbers, inN, initN, .shape[k], .stride[k], .numel and + - * // %")
        if isinstance(node, ast.Name) and not re.fullmatch(r"(?:in|init)\d+", node.id):
            raise EntryError(f"{where}{text!r}: {node.id} is neither inN nor initN")
        if isinstance(node, ast.Attribute) and node.attr not in ("shape", "stride", "numel"):
            raise EntryError(f"{where}{text!r}: .{node.attr} is none of .shape[k], .stride[k], .numel")
    return tree


_OPERATORS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.FloorDiv: lambda a, b: a // b,
    ast.Mod: lambda a, b: a % b,
}


def value_of(text: str, names: dict[str, Any]) -> Any:
    """An expression's value; names has in0 ... (tensors or numbers) and init0 ... Raises EntryError."""

    def walk(node: ast.expr) -> Any:
        if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
            return node.value
        if isinstance(node, ast.Name):
            if node.id not in names:
                raise EntryError(f"{text!r}: there is no {node.id} here; there are {', '.join(names) or 'none'}")
            return names[node.id]
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -walk(node.operand)
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
            return _OPERATORS[type(node.op)](walk(node.left), walk(node.right))
        if isinstance(node, ast.Attribute) and node.attr == "numel":
            return walk(node.value).numel()
        if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Attribute):
            tensor = walk(node.value.value)
            sizes = tensor.shape if node.value.attr == "shape" else tensor.stride()
            return int(sizes[walk(node.slice)])
        raise EntryError(f"{text!r}: can't be computed")

    try:
        return walk(_parse_expression(text))
    except (AttributeError, IndexError, TypeError, ZeroDivisionError) as error:
        raise EntryError(f"{text!r}: {error}") from None
