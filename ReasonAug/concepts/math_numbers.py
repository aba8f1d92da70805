"""Math families about integers and polynomials; each answer is found twice."""

from __future__ import annotations

import math
from pathlib import Path
from random import Random

from pipeline.config.loading import read_yaml
from ReasonAug.problem import MATH, Concept, Values, agree

TEXTS = read_yaml(Path(__file__).with_suffix(".yaml"))


def _vieta(rng: Random) -> Values:
    import sympy  # slow to import, and only one concept needs it

    roots = [rng.choice([n for n in range(-6, 7) if n]) for _ in range(3)]
    e1 = sum(roots)
    e2 = roots[0] * roots[1] + roots[0] * roots[2] + roots[1] * roots[2]
    e3 = math.prod(roots)
    b, c, d = -e1, e2, -e3
    squares = b * b - 2 * c
    x = sympy.Symbol("x")
    found = sympy.roots(x**3 + b * x**2 + c * x + d, x)
    agree(float(sum(root**2 * count for root, count in found.items())), squares)
    return {"b": b, "c": c, "d": d, "squares": squares, "total": -b}


VIETA = Concept.with_texts(
    TEXTS,
    name="Vieta's Formulas",
    domain=MATH,
    draw=_vieta,
    verified_by="the roots themselves, found by sympy",
)


def _crt(rng: Random) -> Values:
    m1, m2, m3 = rng.choice(((3, 5, 7), (4, 5, 7), (5, 7, 9), (3, 7, 11), (5, 8, 9), (4, 9, 11)))
    number = rng.randint(1, m1 * m2 * m3 - 1)
    r1, r2, r3 = number % m1, number % m2, number % m3
    modulus = m1 * m2 * m3
    parts = [
        r * (modulus // m) * pow(modulus // m, -1, m)
        for r, m in zip((r1, r2, r3), (m1, m2, m3), strict=True)
    ]
    answer = sum(parts) % modulus
    search = next(
        n for n in range(modulus) if (n % m1, n % m2, n % m3) == (r1, r2, r3)
    )  # fmt: skip
    agree(answer, search)
    return {
        "m1": m1, "m2": m2, "m3": m3, "r1": r1, "r2": r2, "r3": r3, "modulus": modulus,
        "answer": answer, "parts": " + ".join(map(str, parts)),
    }  # fmt: skip


CRT = Concept.with_texts(
    TEXTS,
    name="Chinese Remainder Theorem",
    domain=MATH,
    draw=_crt,
    held_out=True,
    verified_by="trying every number below the product of the moduli",
)


def _legendre(rng: Random) -> Values:
    n, p = rng.randint(40, 900), rng.choice((3, 5, 7, 11))
    terms, power = [], p
    while power <= n:
        terms.append(n // power)
        power *= p
    exponent = sum(terms)
    count, product = 0, math.factorial(n)
    while product % p == 0:
        product //= p
        count += 1
    agree(count, exponent)
    return {"n": n, "p": p, "terms": " + ".join(map(str, terms)), "exponent": exponent}


LEGENDRE = Concept.with_texts(
    TEXTS,
    name="Legendre's Formula",
    domain=MATH,
    draw=_legendre,
    verified_by="dividing the factorial itself",
)


def _mcnugget(rng: Random) -> Values:
    while True:
        a, b = sorted(rng.sample(range(4, 24), 2))
        if math.gcd(a, b) == 1:
            break
    largest = a * b - a - b
    reachable = {a * i + b * j for i in range(b + 1) for j in range(a + 1)}
    agree(max(n for n in range(a * b) if n not in reachable), largest)
    return {"a": a, "b": b, "largest": largest, "gaps": (a - 1) * (b - 1) // 2}


MCNUGGET = Concept.with_texts(
    TEXTS,
    name="Chicken McNugget Theorem",
    domain=MATH,
    draw=_mcnugget,
    verified_by="listing every reachable total",
)


def _fermat(rng: Random) -> Values:
    p = rng.choice((7, 11, 13, 17, 19, 23))
    a, exponent = rng.randint(2, p - 1), rng.randint(200, 5000)
    rest = exponent % (p - 1)
    answer = a**rest % p
    value = 1  # second method: multiply step by step
    for _ in range(exponent):
        value = value * a % p
    agree(value, answer)
    return {"p": p, "a": a, "exponent": exponent, "rest": rest, "answer": answer, "order": p - 1}


FERMAT = Concept.with_texts(
    TEXTS,
    name="Fermat's Little Theorem",
    domain=MATH,
    draw=_fermat,
    verified_by="step-by-step multiplication modulo the prime",
)

CONCEPTS = (VIETA, CRT, LEGENDRE, MCNUGGET, FERMAT)
