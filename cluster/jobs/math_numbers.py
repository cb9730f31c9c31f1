"""Compares the numbers of two mathematical answers, however small or large they are.

It replaces math-verify's comparison in the process of `cluster.jobs.math_process`, which may be killed: an answer like
10^(10^(10^10)) needs more time or memory than any limit.
"""

from __future__ import annotations

from typing import Any

from math_verify.grader import get_pct_val
from sympy import (
    Basic,
    Derivative,
    Expr,
    Float,
    Integral,
    Limit,
    MatrixBase,
    MatrixExpr,
    Product,
    Rational,
    Sum,
    UnevaluatedExpr,
    log,
    simplify,
)
from sympy.core.evalf import PrecisionExhausted
from sympy.core.random import random

DIGITS = 300  # to which a difference is computed before it is decided exactly whether it is zero
DECIMALS = 6  # in which a decimal number must agree; below 1, its significant digits
PRECISION = 50  # digits of decimal numbers before they are rounded
HUGE = 10**30  # decimal numbers above it must be equal exactly
POINTS = 3  # random points at which expressions with variables are compared


def equal_numbers(gold: Any, given: Any, *_: object) -> bool:
    """True if two numbers, matrices or expressions are equal; False also if that is not decided.

    Exact numbers must be equal. If one has a decimal point, six significant digits must agree below 1, and six decimals
    above. 9 % equals 9 and .09. The further arguments are math-verify's precisions, which are not used.
    """
    if isinstance(gold, MatrixBase | MatrixExpr) and isinstance(given, MatrixBase | MatrixExpr):
        gold, given = gold.doit(), given.doit()
        if not isinstance(gold, MatrixBase) or not isinstance(given, MatrixBase) or gold.shape != given.shape:
            return False
        return all(map(equal_numbers, gold.flat(), given.flat()))
    if not isinstance(gold, Expr) or not isinstance(given, Expr):
        return False
    try:
        return _equal_shares(gold, given)
    except (ArithmeticError, AttributeError, NotImplementedError, TypeError, ValueError):  # sympy cannot compute it
        return False


def _equal_shares(gold: Expr, given: Expr) -> bool:
    shares = get_pct_val(gold), get_pct_val(given)
    if (shares[0] is None) != (shares[1] is None) and _equal(
        gold if shares[0] is None else shares[0], given if shares[1] is None else shares[1]
    ):
        return True
    return _equal(gold, given)


def _equal(gold: Expr, given: Expr) -> bool:
    decimal = gold.has(Float) or given.has(Float)
    gold, given = _without_decimals(gold), _without_decimals(given)
    variables = sorted(gold.free_symbols | given.free_symbols, key=str)
    if variables:
        return _equal_expressions(gold, given, variables)
    return _equal_decimals(gold, given) if decimal else _is_zero(gold - given)


def _equal_expressions(gold: Expr, given: Expr, variables: list[Basic]) -> bool:
    """math-verify's comparison to 15 digits, confirmed at points where it cannot hide a coefficient near zero."""
    difference = gold - given
    if difference.evalf(15, chop=True) != 0:
        return False
    points = [{variable: Rational(int(random() * 2_000 - 1_000), 101) for variable in variables} for _ in range(POINTS)]
    return all(_is_zero(difference.subs(point)) for point in points)


def _equal_decimals(gold: Expr, given: Expr) -> bool:
    right, answer = gold.evalf(PRECISION), given.evalf(PRECISION)
    if not (right.is_Float or right.is_Rational) or not (answer.is_Float or answer.is_Rational):  # complex or infinite
        return bool(abs(right - answer) <= abs(right) / (2 * 10**DECIMALS))
    if right == 0 or abs(right) > HUGE or abs(answer) > HUGE:
        return _is_zero(gold - given)
    scale = Float(10, PRECISION) ** (DECIMALS + max(0, int(-log(abs(right), 10).evalf(PRECISION))))
    return bool((right * scale).round() == (answer * scale).round())


def _is_zero(number: Expr) -> bool:
    """Whether a constant is zero: by its digits if they decide, otherwise exactly."""
    if number.has(Integral, Sum, Product, Limit, Derivative):
        number = number.doit()
    try:
        value = number.evalf(2, maxn=DIGITS, strict=True)
    except PrecisionExhausted:
        return simplify(number).is_zero is not False
    return bool(value.is_number and value == 0)


def _without_decimals(number: Basic) -> Any:
    """`number` with decimal numbers as fractions, so that 6.02 x 10^23 is a whole number."""
    decimals = {each: Rational(str(each)) for each in number.atoms(Float)}
    wrapped = {each: each.args[0] for each in number.atoms(UnevaluatedExpr)}
    return number.xreplace(wrapped | decimals) if decimals or wrapped else number
