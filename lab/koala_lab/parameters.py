"""The parameters cell of a notebook as a schema.

Where papermill only warns about a parameter that a notebook does not have and takes any type for any name,
`resolve` refuses.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from koala_lab.checks import check_known

SEEDS = 2**32  # what numpy can be seeded with
PRESETS = ("quick", "desktop", "paper")
_SCALARS: dict[str, type] = {"int": int, "float": float, "str": str, "bool": bool}


@dataclass(frozen=True)
class Parameter:
    """One line of a parameters cell: ``name: kind = default``."""

    name: str
    kind: str
    default: Any


def declared(source: str, where: str = "parameters cell") -> dict[str, Parameter]:
    """Parse a parameters cell.

    The grammar is what papermill's own line-based reader also understands: one ``name: type = literal`` a
    line, the type one of int, float, str, bool, ``list[...]`` and ``Optional[...]`` of these; comments without
    an equals sign.

    Args:
        source: Text of the cell.
        where: What to call the cell in an error.

    Returns:
        The parameters by name, in the order of the cell.

    Raises:
        ValueError: For a line outside the grammar or a default of another type than annotated.
    """
    parameters: dict[str, Parameter] = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.ImportFrom) and ast.unparse(node) == "from typing import Optional":
            continue
        line = ast.unparse(node)
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value):
            raise ValueError(f"{where}: write '{line}' as 'name: type = literal'")
        name, kind = node.target.id, ast.unparse(node.annotation)
        try:
            default = ast.literal_eval(node.value)
        except ValueError:
            raise ValueError(f"{where}: '{line}' needs a literal; derive values in a later cell") from None
        parameters[name] = Parameter(name, kind, _checked(name, kind, default))
    return parameters


def _checked(name: str, kind: str, value: Any) -> Any:
    """Return the value as the annotated type; an int is taken for a float, nothing else is converted."""
    if kind.startswith("Optional["):
        return None if value is None else _checked(name, kind[len("Optional[") : -1], value)
    if kind.startswith("list["):
        if not isinstance(value, list):
            raise ValueError(f"parameter {name}: expected {kind}, got {type(value).__name__} {value!r}")
        return [_checked(name, kind[len("list[") : -1], item) for item in value]
    if kind not in _SCALARS:
        known = ", ".join([*_SCALARS, "list[...]", "Optional[...]"])
        raise ValueError(f"parameter {name}: type {kind} is none of {known}")
    if kind == "float" and type(value) is int:
        return float(value)
    if kind == "float" and isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"parameter {name}: expected a finite number, got {value!r}")
    if type(value) is not _SCALARS[kind]:
        hint = f" (YAML needs {_yaml_float(value)})" if kind == "float" and _yaml_float(value) else ""
        raise ValueError(f"parameter {name}: expected {kind}, got {type(value).__name__} {value!r}{hint}")
    return value


def _yaml_float(value: Any) -> str:
    """Return how YAML wants to see a number that it read as text: 1e-3 is a string there, 1.0e-3 is not."""
    try:
        float(value)
    except (TypeError, ValueError):
        return ""
    mantissa, _, exponent = str(value).lower().partition("e")
    if not exponent:
        return mantissa
    sign = "" if exponent[0] in "+-" else "+"
    return f"{mantissa if '.' in mantissa else mantissa + '.0'}e{sign}{exponent}"


def from_text(parameters: Mapping[str, Parameter], texts: Mapping[str, str]) -> dict[str, Any]:
    """Read a command line's texts as the declared types: text stays text, everything else is a Python literal.

    What cannot be read so is passed on as text, for `resolve` to refuse.
    """

    def read(name: str, text: str) -> Any:
        if name in parameters and parameters[name].kind in ("str", "Optional[str]"):
            return text
        try:
            return ast.literal_eval(text)
        except (ValueError, SyntaxError):
            return text

    return {name: read(name, text) for name, text in texts.items()}


def resolve(parameters: Mapping[str, Parameter], given: Mapping[str, Any]) -> dict[str, Any]:
    """Override the defaults by what was given, checked.

    Args:
        parameters: The declared parameters.
        given: Overrides by name.

    Returns:
        The value of every declared parameter.

    Raises:
        ValueError: For an unknown name (with the nearest known one), a wrong type or an unknown preset.
    """
    for name in given:
        check_known("parameter", name, parameters)
    values = {p.name: _checked(p.name, p.kind, given.get(p.name, p.default)) for p in parameters.values()}
    check_known("parameter preset:", values.get("preset", "quick"), PRESETS)
    first, number = values.get("seed", 0), values.get("n_seeds", 1)
    if not 0 <= first < SEEDS - max(number, 1):
        raise ValueError(f"parameter seed: expected a whole number >= 0, the last of {number} below 2^32, got {first}")
    if number < 1:
        raise ValueError(f"parameter n_seeds: expected at least 1 seed, got {values['n_seeds']}")
    return values
