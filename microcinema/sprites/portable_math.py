"""Sine, cosine and exponential from additions and multiplications alone: the same bits on every processor.

NumPy's own differ in their last bits between instruction sets, and with them the identifier of a protocol and rendered pixels. All
compute in float64, within two units of the last place, and return the type of their argument.
"""

import math
from functools import reduce

import numpy as np

# pi / 2 and log 2, each as a sum whose first term has few enough digits that its small multiples are exact (fdlibm).
_HALF_PI = (1.57079632673412561417, 6.07710050650619224932e-11)
_LOG_2 = (6.93147180369123816490e-01, 1.90821492927058770002e-10)
_SINE = [(-1) ** k / math.factorial(2 * k + 1) for k in range(9)]
_COSINE = [(-1) ** k / math.factorial(2 * k) for k in range(9)]
_EXPONENTIAL = [1 / math.factorial(k) for k in range(14)]


def sin(x: np.ndarray | float) -> np.ndarray:
    """Of angles up to some thousand radians."""
    return _sine(x, 0)


def cos(x: np.ndarray | float) -> np.ndarray:
    """Of angles up to some thousand radians."""
    return _sine(x, 1)


def exp(x: np.ndarray | float) -> np.ndarray:
    """Of values that neither overflow nor underflow."""
    values, quotient, remainder = _reduce(x, _LOG_2)
    return np.ldexp(_polynomial(_EXPONENTIAL, remainder), quotient).astype(values.dtype)


def _sine(x: np.ndarray | float, quadrants_ahead: int) -> np.ndarray:
    values, quotient, remainder = _reduce(x, _HALF_PI)
    quadrant = (quotient + quadrants_ahead) % 4
    square = remainder * remainder
    even, odd = _polynomial(_COSINE, square), remainder * _polynomial(_SINE, square)
    result = np.where(quadrant % 2 == 0, odd, even)
    return np.where(quadrant < 2, result, -result).astype(values.dtype)


def _reduce(x: np.ndarray | float, period: tuple[float, float]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The argument as an array, and the integer n and the small r of `x = n period + r`."""
    values = np.asarray(x) * 1.0
    exact = values.astype(np.float64)
    quotient = np.rint(exact / sum(period))
    return values, quotient.astype(np.int64), (exact - quotient * period[0]) - quotient * period[1]


def _polynomial(coefficients: list[float], x: np.ndarray) -> np.ndarray:
    """Coefficients from the constant on (Horner's scheme)."""
    return reduce(lambda result, coefficient: result * x + coefficient, reversed(coefficients), np.zeros_like(x))
