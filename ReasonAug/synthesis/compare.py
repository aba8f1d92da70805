"""Decide whether two final results are the same: numbers, units, expressions, or words.

Nothing that a model wrote is evaluated by Python: expressions are parsed into a syntax tree, of
which only arithmetic and a few functions are computed. Two expressions with letters are compared
at points drawn once: equal at all of them means equal.
"""

from __future__ import annotations

import ast
import cmath
import functools
import math
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

_LONGEST = 300  # characters of an expression
_POINTS = (0.5, 0.7310, 1.3179, 2.6451)  # values of the first letter

_WORDS = re.compile(
    r"\\(?:boxed|text|mathrm|mathbf|left|right|displaystyle|,|;|!|quad)|[$`]|(?<![\w)])\*\*|\*\*(?![\w(])|\\[()\[\]]"
)
_REPLACED = (
    ("−", "-"), ("–", "-"), ("×", "*"), ("·", "*"), ("÷", "/"), ("≈", "="), ("\\approx", "="),
    ("\\cdot", "*"), ("\\times", "*"), ("\\pi", "pi"), ("π", "pi"), ("√", "sqrt"),
    ("\\sqrt", "sqrt"),
    ("\\ln", "ln"), ("\\log", "log"), ("\\sin", "sin"), ("\\cos", "cos"), ("\\tan", "tan"),
    ("\\exp", "exp"), ("\\%", "%"), ("²", "^2"), ("³", "^3"), ("°", " deg "), ("µ", "u"),
    ("μ", "u"),
    ("\u202f", " "), ("\u00a0", " "),
)  # fmt: skip
_FRACTION = re.compile(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_SPACED_THOUSANDS = re.compile(r"(?<=\d) (?=\d{3}(?!\d))")
_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:\s*(?:[eE]|\*\s*10\s*\^?)\s*\{?\(?([-+]?\d+)\)?\}?)?"
_MEASURE = re.compile(
    rf"(?P<sign>[-+]?)\s*(?P<money>[€£¥]?)\s*(?P<number>{_NUMBER})\s*(?P<unit>.*)"
)

_FUNCTIONS: dict[str, Callable[..., complex]] = {
    "sqrt": cmath.sqrt, "exp": cmath.exp, "ln": cmath.log, "log": cmath.log, "sin": cmath.sin,
    "cos": cmath.cos, "tan": cmath.tan, "asin": cmath.asin, "acos": cmath.acos,
    "atan": cmath.atan, "sinh": cmath.sinh, "cosh": cmath.cosh, "tanh": cmath.tanh, "abs": abs,
}  # fmt: skip
_CONSTANTS = {"pi": math.pi, "e": math.e, "i": 1j}
_OPERATORS: dict[type, Callable[[complex, complex], complex]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
}
# Symbols whose case matters, and sympy's names of them.
_SYMBOLS = """
N:newton J:joule W:watt C:coulomb V:volt T:tesla F:farad H:henry A:ampere K:kelvin Hz:hertz
Pa:pascal Wb:weber eV:electronvolt ohm:ohm ohms:ohm g:gram kg:kilogram m:meter s:second sec:second
min:minute h:hour hr:hour day:day days:day L:liter l:liter mol:mol deg:degree atm:atmosphere bar:bar
"""
_UNITS = {symbol: name for symbol, _, name in (p.partition(":") for p in _SYMBOLS.split())}


def same_result(left: str, right: str, *, tolerance: float) -> bool:
    """Return True if two final results agree.

    Args:
        left: a result as a model wrote it.
        right: another one.
        tolerance: relative difference of numbers that count as equal.
    """
    left, right = _clean(left), _clean(right)
    if not left or not right:
        return False
    if left.casefold() == right.casefold():
        return True
    by_value = _same_measure(left, right, tolerance)
    if by_value is not None:
        return by_value
    by_shape = _same_expression(left, right, tolerance)
    if by_shape is not None:
        return by_shape
    return _plain_words(left) == _plain_words(right)


def _clean(text: str) -> str:
    """Return a result without markup, names before `=`, and a full stop."""
    text = text.strip()[:_LONGEST]
    for old, new in _REPLACED:
        text = text.replace(old, new)
    text = _WORDS.sub(" ", text)
    while (plain := _FRACTION.sub(r"((\1)/(\2))", text)) != text:
        text = plain
    while (plain := re.sub(r"\{([^{}]*)\}", r"(\1)", text)) != text:
        text = plain
    text = _SPACED_THOUSANDS.sub("", _THOUSANDS.sub("", text))
    # Of a chain a = b = c the last member is the result.
    text = text.rpartition("=")[2]
    return re.sub(r"\s+", " ", text).strip().rstrip(".").strip()


def _plain_words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def _close(left: complex, right: complex, tolerance: float) -> bool:
    return abs(left - right) <= max(tolerance * max(abs(left), abs(right)), 1e-12)


def _same_measure(left: str, right: str, tolerance: float) -> bool | None:
    """Compare two numbers with units; None if one is not of this form."""
    one, other = _measure(left), _measure(right)
    if one is None or other is None:
        return None
    (value, unit), (other_value, other_unit) = one, other
    if unit == other_unit or not unit or not other_unit:
        if _close(value, other_value, tolerance):
            return True
        # A share may be written as a percentage.
        factor = {("%", ""): 0.01, ("", "%"): 100.0}.get((unit, other_unit))
        return factor is not None and _close(value * factor, other_value, tolerance)
    size, other_size = _unit(unit), _unit(other_unit)
    if size is None or other_size is None:
        # Words such as "apples" and "pieces" name no unit that could be converted.
        return _close(value, other_value, tolerance)
    if size[1] != other_size[1]:
        return False
    return _close(value * size[0], other_value * other_size[0], tolerance)


def _measure(text: str) -> tuple[float, str] | None:
    found = _MEASURE.fullmatch(text)
    if found is None:
        return None
    number = re.sub(r"\s*\*\s*10\s*\^?\s*", "e", found["number"])
    try:
        value = float(re.sub(r"[{}()\s]", "", number))
    except ValueError:
        return None
    unit = (found["money"] or found["unit"]).strip().strip("()")
    # The text behind a number may be the rest of an expression: 3*x, 2/3, 5 sqrt(2).
    if re.match(r"[-+*/^(\d]|(sqrt|pi|e|ln|log|sin|cos|exp)\b", unit) or re.search(r"[+(]", unit):
        return None
    return (-value if found["sign"] == "-" else value), unit


@functools.lru_cache(maxsize=4096)
def _unit(text: str) -> tuple[float, str] | None:
    """Return (factor to base units, base units) of a unit; None for a word that is none."""
    from sympy.physics import units

    base = (units.kg, units.m, units.s, units.A, units.K, units.mol, units.cd)
    text = re.sub(r"\bper\b", "/", text.replace("**", "^"))
    pieces = re.findall(r"([*/]?)\s*\(?\s*([A-Za-z%]+)\s*\)?(?:\s*\^?\s*\(?(-?\d)\)?)?", text)
    expression: Any = 1
    for sign, name, power in pieces:
        known = _named_unit(name)
        if known is None:
            return None
        exponent = int(power or 1) * (-1 if sign == "/" else 1)
        expression = expression * known**exponent
    converted = units.convert_to(expression, base)
    factor, rest = converted.as_coeff_Mul()
    return float(factor), str(rest)


def _named_unit(name: str) -> Any:
    from sympy.physics import units

    def own(symbol: str) -> Any:
        return getattr(units, _UNITS[symbol])

    if name == "rad":
        return 1
    if name in _UNITS:
        return own(name)
    prefixes = {"k": 1000, "M": 10**6, "G": 10**9, "c": 0.01, "m": 0.001, "u": 1e-6, "n": 1e-9}
    if len(name) > 1 and name[0] in prefixes and name[1:] in _UNITS:
        return prefixes[name[0]] * own(name[1:])
    found = getattr(units, name.lower(), None)
    return found if isinstance(found, units.Quantity) else None


def _same_expression(left: str, right: str, tolerance: float) -> bool | None:
    """Compare two expressions at a few points; None if one cannot be read."""
    one, other = _parse(left), _parse(right)
    if one is None or other is None:
        return None
    letters = sorted(_letters(one) | _letters(other))
    compared = False
    for point in _POINTS:
        values = {letter: point + 0.37 * n for n, letter in enumerate(letters)}
        try:
            found, expected = _value(one, values), _value(other, values)
        except (ArithmeticError, ValueError, OverflowError):
            continue
        if not _close(found, expected, tolerance):
            return False
        compared = True
    return True if compared else None


def _parse(text: str) -> ast.expr | None:
    text = text.replace("^", "**")
    # Products without a sign: 2x, 3(x+1), 2 sqrt(3).
    text = re.sub(r"(?<=[\d)])\s*(?=[A-Za-z(])", "*", text)
    text = re.sub(r"\bsqrt\s*\*?\s*(\d+|[a-z])\b", r"sqrt(\1)", text)
    if not re.fullmatch(r"[\w\s+\-*/().]+", text):
        return None
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    try:
        _value(tree, dict.fromkeys(_letters(tree), 0.5))
    except (KeyError, TypeError):
        return None
    except (ArithmeticError, ValueError):
        pass
    return tree


def _letters(tree: ast.expr) -> set[str]:
    """Return the names that are neither a function nor a constant."""
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    return {n for n in names if n not in _FUNCTIONS and n not in _CONSTANTS and len(n) <= 2}


def _value(tree: ast.expr, letters: Mapping[str, float]) -> complex:
    """Return the value of an expression.

    Raises:
        TypeError: it holds something that is not arithmetic.
    """
    match tree:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            return complex(number)
        case ast.Name(id=name):
            return complex(_CONSTANTS[name] if name in _CONSTANTS else letters[name])
        case ast.UnaryOp(op=ast.USub(), operand=inner):
            return -_value(inner, letters)
        case ast.UnaryOp(op=ast.UAdd(), operand=inner):
            return _value(inner, letters)
        # Complex numbers throughout: powers overflow at once instead of growing for hours.
        case ast.BinOp(left=left, op=operation, right=right) if type(operation) in _OPERATORS:
            return _OPERATORS[type(operation)](_value(left, letters), _value(right, letters))
        case ast.Call(func=ast.Name(id=name), args=[inner], keywords=[]) if name in _FUNCTIONS:
            return complex(_FUNCTIONS[name](_value(inner, letters)))
    raise TypeError(f"{type(tree).__name__} is not arithmetic")
