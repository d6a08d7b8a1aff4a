"""Filters of orthogonal wavelets, computed from what defines them: Daubechies (db), least asymmetric (sym), coiflets.

A low-pass filter of L taps has sum √2 and is orthonormal to itself shifted by 2, 4, ...; the high-pass filter, the
wavelet, is the same reversed, every second sign turned.
"""

import functools
import math
from decimal import Decimal, localcontext

import numpy as np

SIZES = {"db": range(1, 39), "sym": range(2, 21), "coif": range(1, 18)}
FAMILIES = tuple(f"{name}{size}" for name, sizes in SIZES.items() for size in sizes)
GRID = 4096  # frequencies at which filters are computed; far above the 76 taps of the longest

# Which of the zeros of symN, pairs numbered by ascending real part, lie outside the unit circle: the choices, in bits,
# that make the phase nearly linear.
OUTSIDE = dict(enumerate([0, 0, 1, 2, 5, 4, 5, 6, 21, 12, 42, 14, 26, 28, 154, 113, 357, 92, 666], start=2))

# Hugging Face PEFT's coif4, which is no coiflet and not orthogonal. Its adapters were trained with it.
COIF4 = """
 8.92313902537003e-04 -1.629492425226786e-03 -7.346167936268051e-03  1.6066782559655206e-02  2.6792362270697267e-02
-7.314290441258073e-02 -4.877076756791383e-02 0.42747788393337943 0.7842491699914577 0.4354613422154989
-6.15536584279808e-02 -9.176542029839818e-02 2.811565972369683e-02 2.4945239305530328e-02 -1.0417174666056649e-02
-3.2702731315608483e-03 2.0166775120449105e-03 6.600112966963782e-04 -1.7960623150243602e-04 -1.598819866911797e-04
 4.3110389559021745e-05 1.791447688858775e-05 -2.2414246658720156e-06 -1.5895026298510706e-06
"""


@functools.cache
def filters(family):
    """The low-pass and the high-pass filter of one of FAMILIES, two tuples of the same even length."""
    name = family.rstrip("0123456789")
    low = {"db": _db, "sym": _sym, "coif": _coif}[name](int(family[len(name) :]))
    return tuple(low), tuple(-x if k % 2 else x for k, x in enumerate(reversed(low)))


# -- Daubechies and the least asymmetric -------------------------------------------------------------------------
def _db(n):
    return _taps(_minimum_phase(n), n)


def _sym(n):
    """Daubechies' with some zeros moved out of the unit circle, which turns phases and no magnitude."""
    H, z = _minimum_phase(n), _waves()
    for k, zero in enumerate(_zeros(n)):
        if OUTSIDE[n] >> k & 1:
            for r in (zero,) if abs(zero.imag) < 1e-9 else (zero, zero.conjugate()):
                H = H * (z - r.conjugate()) / (1 - r * z)
    return _taps(H, n)


def _waves():
    return np.exp(-2j * np.pi * np.arange(GRID) / GRID)


def _taps(H, n):
    return np.fft.ifft(H).real[: 2 * n].tolist()


def _minimum_phase(n):
    """The spectrum of dbN: n zeros at -1, and |Q|² = Σ C(n-1+k, k) sin(ω/2)^2k, all of whose zeros lie inside.

    Its phase is the Hilbert transform of log |Q|, which is smooth. Nothing cancels, so taps are exact to 1e-15.
    """
    y = np.sin(np.pi * np.arange(GRID) / GRID) ** 2
    cepstrum = np.fft.ifft(0.5 * np.log(sum(c * y**k for k, c in enumerate(_daubechies(n))))).real
    cepstrum[1 : GRID // 2] *= 2
    cepstrum[GRID // 2 + 1 :] = 0
    return math.sqrt(2) * ((1 + _waves()) / 2) ** n * np.exp(np.fft.fft(cepstrum))


def _zeros(n):
    """One of each pair of conjugate zeros of Q inside the unit circle, by ascending real part."""
    y = np.roots(_daubechies(n)[::-1]).astype(complex)
    b = 1 - 2 * y  # y = (2 - z - 1/z) / 4
    z = b + np.sqrt(b * b - 1)
    z = np.where(abs(z) > 1, 1 / z, z)
    z = z[z.imag > -1e-9]
    return z[np.argsort(z.real)]


def _daubechies(n):
    """The coefficients of P(y), which has (1-y)^n P(y) + y^n P(1-y) = 1."""
    return [math.comb(n - 1 + k, k) for k in range(n)]


# -- coiflets ----------------------------------------------------------------------------------------------------
def _coif(n):
    """6n taps; as many moments vanish of the scaling function as of the wavelet, 2n.

    With c = cos²(ω/2), s = sin²(ω/2), the spectrum over √2 is c^n P(s) + (cs)^n f, and f has 2n coefficients.
    """
    if n == 4:
        return list(map(float, COIF4.split()))
    with localcontext() as context:
        context.prec = 80  # the equations for n = 17 lose 24 digits
        f = _coif_rest(n)
        c, s = [Decimal(k) / 4 for k in (1, 2, 1)], [Decimal(k) / 4 for k in (-1, 2, -1)]
        taps = _times(_power(_times(c, s), n), f)
        taps += [Decimal(0)] * (6 * n - len(taps))
        for k, binomial in enumerate(_daubechies(n)):
            for i, x in enumerate(_times(_power(c, n), _power(s, k))):
                taps[n - k + i] += binomial * x
        return [float(x * Decimal(2).sqrt()) for x in taps]


def _times(p, q):
    product = [Decimal(0)] * (len(p) + len(q) - 1)
    for i, x in enumerate(p):
        for j, y in enumerate(q):
            product[i + j] += x * y
    return product


def _power(p, k):
    return functools.reduce(_times, [p] * k, [Decimal(1)])


@functools.cache
def _coif_rest(n):
    """The coefficients of f, by Newton's method; those of the next smaller coiflet lead to the usual solution."""
    if n == 1:
        f = [Decimal(1), Decimal(0)]
    else:
        growth = Decimal(math.comb(2 * n - 1, n)) / math.comb(2 * n - 3, n - 1)
        f = [x * growth for x in _coif_rest(n - 1)] + [Decimal(0)] * 2
    points = [_coif_point(n, Decimal(2 * i + 1) / (4 * n)) for i in range(2 * n)]
    for _ in range(12):
        step = _solve([_coif_equation(f, *point) for point in points])
        f = [x + d for x, d in zip(f, step)]
        if max(map(abs, step)) < Decimal("1e-30") * max(map(abs, f)):
            return f
    raise ArithmeticError(f"coif{n} was not found.")


def _coif_point(n, t):
    """What the equation at tan(ω/2) = t needs: e^-ikω as real and imaginary parts, c^n P(s), s^n P(c), (cs)^n, PP."""
    c = 1 / (1 + t * t)
    s = 1 - c
    re, im = [Decimal(1)], [Decimal(0)]
    for _ in range(2 * n - 1):
        x, y = re[-1], im[-1]
        re.append(x * (c - s) + y * 2 * t * c)
        im.append(y * (c - s) - x * 2 * t * c)
    P, P_turned = (sum(b * y**k for k, b in enumerate(_daubechies(n))) for y in (s, c))
    return re, im, c**n * P, s**n * P_turned, (c * s) ** n, P * P_turned


def _coif_equation(f, re, im, a, b, q, pp):
    """One row of Newton's equations: |H(ω)|² + |H(ω + π)|² = 2, less what is so whatever f is, over (cs)^n."""
    turned = [-x if k % 2 else x for k, x in enumerate(f)]
    (u, v), (ut, vt) = ((sum(map(Decimal.__mul__, g, re)), sum(map(Decimal.__mul__, g, im))) for g in (f, turned))
    row = []
    for k, (x, y) in enumerate(zip(re, im)):
        sign = -1 if k % 2 else 1
        row.append(2 * (a * x + q * (u * x + v * y) + sign * (b * x + q * (ut * x + vt * y))) / pp)
    return [*row, (2 * pp - 2 * (a * u + b * ut) - q * (u * u + v * v + ut * ut + vt * vt)) / pp]


def _solve(rows):
    """x of A x = b, by elimination; rows: [A | b]."""
    n = len(rows)
    for i in range(n):
        pivot = max(range(i, n), key=lambda k: abs(rows[k][i]))
        rows[i], rows[pivot] = rows[pivot], rows[i]
        for k in range(i + 1, n):
            factor = rows[k][i] / rows[i][i]
            rows[k] = [x if j < i else x - factor * y for j, (x, y) in enumerate(zip(rows[k], rows[i]))]
    x = [Decimal(0)] * n
    for i in reversed(range(n)):
        x[i] = (rows[i][n] - sum(a * b for a, b in zip(rows[i][i + 1 : n], x[i + 1 :]))) / rows[i][i]
    return x
