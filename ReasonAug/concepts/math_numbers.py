"""Math families about integers and polynomials; each answer is found twice."""

from __future__ import annotations

import math
from random import Random

import sympy

from ReasonAug.problem import MATH, Concept, Values, agree


def _vieta(rng: Random) -> Values:
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


VIETA = Concept(
    name="Vieta's Formulas",
    domain=MATH,
    draw=_vieta,
    verified_by="the roots themselves, found by sympy",
    definition="""
    The coefficients of a polynomial are, up to sign, the elementary symmetric functions of its
    roots. For x^3 + b x^2 + c x + d the roots sum to -b, their pairwise products to c, and their
    product is -d.
    """,
    forms="""
    Let p, q and r be the roots of x^3 + ({b}) x^2 + ({c}) x + ({d}) = 0. Find p^2 + q^2 + r^2
    without solving the equation.

    Three numbers are the zeros of the cubic x^3 + ({b})x^2 + ({c})x + ({d}). What is the sum of
    their squares?

    {who} knows that a cubic polynomial with leading coefficient 1 and further coefficients {b},
    {c}, {d} vanishes at three places. From the coefficients alone, compute the sum of the squares
    of these places.

    The edge lengths of a strange (possibly negative) box solve t^3 + ({b}) t^2 + ({c}) t + ({d}) =
    0. What do the squared lengths add up to?
    """,
    solutions="""
    Vieta's formulas: p + q + r = {total} and pq + pr + qr = {c}. The sum of squares is {total}^2 -
    2 * ({c}) = {squares}.

    The symmetric functions of the roots can be read from the coefficients: sum {total}, sum of
    pairwise products {c}. Since (p+q+r)^2 = p^2+q^2+r^2 + 2(pq+pr+qr), the answer is {squares}.
    """,
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


CRT = Concept(
    name="Chinese Remainder Theorem",
    domain=MATH,
    draw=_crt,
    held_out=True,
    verified_by="trying every number below the product of the moduli",
    definition="""
    If moduli are pairwise coprime, a system of congruences x = r_i (mod m_i) has exactly one
    solution modulo their product, which can be built from inverses of the complementary products.
    """,
    forms="""
    Find the smallest non-negative integer that leaves remainder {r1} on division by {m1}, remainder
    {r2} on division by {m2} and remainder {r3} on division by {m3}.

    {who} packs {things}. In groups of {m1} there are {r1} left over, in groups of {m2} there are
    {r2} left over, and in groups of {m3} there are {r3}. What is the smallest possible number of
    {things}?

    Solve simultaneously n = {r1} (mod {m1}), n = {r2} (mod {m2}), n = {r3} (mod {m3}) for the least
    n that is not negative.

    A parade is lined up in rows of {m1}, and {r1} people remain without a row. With rows of {m2} it
    is {r2} people, with rows of {m3} it is {r3}. At least how many people take part?
    """,
    solutions="""
    Chinese remainder theorem: the moduli are pairwise coprime with product {modulus}. Adding
    {parts} and reducing modulo {modulus} gives {answer}.

    The congruences have a unique solution modulo {m1} * {m2} * {m3} = {modulus}. Build it from the
    inverses of the complementary products: {parts}, which leaves the remainder {answer} modulo
    {modulus}.
    """,
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


LEGENDRE = Concept(
    name="Legendre's Formula",
    domain=MATH,
    draw=_legendre,
    verified_by="dividing the factorial itself",
    definition="""
    The exponent of a prime p in n! is the sum of floor(n / p^k) over all k >= 1: multiples of p
    count once, multiples of p^2 once more, and so on.
    """,
    forms="""
    How many times can the product 1 * 2 * 3 * ... * {n} be divided by {p} without remainder?

    {who} writes down {n} factorial and keeps dividing by {p} as long as the result is a whole
    number. After how many divisions does that stop?

    Determine the largest k for which {p}^k divides {n}!.

    All whole numbers up to {n} are multiplied together. Written in base {p} (a prime), with how
    many zeros does the enormous result end?
    """,
    solutions="""
    Legendre's formula: the exponent of the prime {p} in {n}! is {terms} = {exponent}.

    Count multiples: floor({n}/{p}) numbers contribute a factor {p}, those divisible by {p}^2
    another one, and so on. The prime exponent in the factorial is {terms} = {exponent}.
    """,
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


MCNUGGET = Concept(
    name="Chicken McNugget Theorem",
    domain=MATH,
    draw=_mcnugget,
    verified_by="listing every reachable total",
    definition="""
    For coprime positive integers a and b, the largest integer that is not a combination a x + b y
    with non-negative x and y is a b - a - b (the Frobenius number of two coins).
    """,
    forms="""
    Stamps come only in values of {a} and {b} cents. What is the largest postage that cannot be put
    together exactly?

    {who} has unlimited weights of {a} kg and {b} kg. Which is the heaviest whole number of
    kilograms that no collection of weights adds up to?

    At {place}, {things} are sold only in packs of {a} and packs of {b}. Find the greatest number of
    {things} that cannot be bought.

    A frog climbs stairs in leaps of {a} or {b} steps, upward only. What is the last step that the
    frog can never stand on, however it combines leaps?
    """,
    solutions="""
    Chicken McNugget theorem: {a} and {b} are coprime, so the largest number that is not a
    non-negative combination is {a} * {b} - {a} - {b} = {largest}.

    Frobenius number of two coprime denominations: ab - a - b = {largest}. Altogether {gaps} amounts
    cannot be represented as {a}x + {b}y, and {largest} is the largest of them.
    """,
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


FERMAT = Concept(
    name="Fermat's Little Theorem",
    domain=MATH,
    draw=_fermat,
    verified_by="step-by-step multiplication modulo the prime",
    definition="""
    If p is prime and does not divide a, then a^(p-1) leaves remainder 1 on division by p. Exponents
    may therefore be reduced modulo p - 1.
    """,
    forms="""
    What is the remainder when {a} to the power {exponent} is divided by {p}?

    {who} raises {a} to the {exponent}th power and counts off the enormous result in groups of {p}.
    How many units are left over?

    Compute {a}^{exponent} mod {p} by hand.

    A clock has {p} hours. Its hand stands at 1 and a button multiplies its position by {a} each
    time, wrapping around. Where does the hand point after the button was pressed {exponent} times?
    """,
    solutions="""
    Fermat's little theorem: {a}^{order} = 1 (mod {p}) because {p} is prime. {exponent} leaves
    {rest} modulo {order}, so the answer is {a}^{rest} mod {p} = {answer}.

    Powers modulo the prime {p} repeat with period {order}. Reduce the exponent: {exponent} mod
    {order} = {rest}. Then {a}^{exponent} is congruent to {a}^{rest}, which leaves remainder
    {answer}.
    """,
)

CONCEPTS = (VIETA, CRT, LEGENDRE, MCNUGGET, FERMAT)
