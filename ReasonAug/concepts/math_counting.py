"""Math families about counting, chance and geometry; each answer is found twice."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import permutations, product
from pathlib import Path
from random import Random

from pipeline.config.loading import read_yaml
from ReasonAug.problem import MATH, Concept, Values, agree

TEXTS = read_yaml(Path(__file__).with_suffix(".yaml"))


def _bayes(rng: Random) -> Values:
    prior, hit, false = rng.randint(1, 20), rng.randint(75, 99), rng.randint(1, 20)
    alarm = prior * hit + (100 - prior) * false
    posterior = prior * hit / alarm
    # second method: count cases among a million
    sick = 10_000 * prior
    found, wrong = sick * hit // 100, (1_000_000 - sick) * false // 100
    agree(found / (found + wrong), posterior)
    return {
        "prior": prior, "hit": hit, "false": false, "posterior": 100 * posterior,
        "found": found, "wrong": wrong,
    }  # fmt: skip


BAYES = Concept.with_texts(
    TEXTS,
    name="Bayes' Theorem",
    domain=MATH,
    draw=_bayes,
    verified_by="natural frequencies among a million cases",
)


def _stars_bars(rng: Random) -> Values:
    items, kinds = rng.randint(5, 14), rng.randint(3, 5)
    ways = math.comb(items + kinds - 1, kinds - 1)
    count = sum(1 for counts in product(range(items + 1), repeat=kinds - 1) if sum(counts) <= items)
    agree(count, ways)
    return {"items": items, "kinds": kinds, "ways": ways, "n": items + kinds - 1, "k": kinds - 1}


STARS_BARS = Concept.with_texts(
    TEXTS,
    name="Stars and Bars",
    domain=MATH,
    draw=_stars_bars,
    verified_by="enumeration of all distributions",
)


def _inclusion(rng: Random) -> Values:
    n = rng.randrange(200, 3000, 50)
    a, b, c = rng.choice(((2, 3, 5), (3, 5, 7), (2, 5, 7), (3, 4, 5), (2, 7, 9), (4, 5, 9)))
    singles = [n // a, n // b, n // c]
    pairs = [n // math.lcm(a, b), n // math.lcm(a, c), n // math.lcm(b, c)]
    triple = n // math.lcm(a, b, c)
    answer = sum(singles) - sum(pairs) + triple
    agree(sum(1 for x in range(1, n + 1) if x % a == 0 or x % b == 0 or x % c == 0), answer)
    return {
        "n": n, "a": a, "b": b, "c": c, "answer": answer, "triple": triple,
        "singles": " + ".join(map(str, singles)), "pairs": " + ".join(map(str, pairs)),
    }  # fmt: skip


INCLUSION_EXCLUSION = Concept.with_texts(
    TEXTS,
    name="Principle of Inclusion-Exclusion",
    domain=MATH,
    draw=_inclusion,
    verified_by="direct count",
)


def _derangement(rng: Random) -> Values:
    n = rng.randint(4, 7)
    values = [1, 0]
    for k in range(2, n + 1):
        values.append((k - 1) * (values[-1] + values[-2]))
    answer = values[n]
    count = sum(1 for p in permutations(range(n)) if all(p[i] != i for i in range(n)))
    agree(count, answer)
    return {
        "n": n,
        "answer": answer,
        "all": math.factorial(n),
        "chance": answer / math.factorial(n),
    }


DERANGEMENT = Concept.with_texts(
    TEXTS,
    name="Derangements",
    domain=MATH,
    draw=_derangement,
    verified_by="enumeration of all permutations",
)


def _pick(rng: Random) -> Values:
    base, height, shift = rng.randint(3, 14), rng.randint(3, 14), rng.randint(0, 10)
    boundary = base + math.gcd(shift, height) + math.gcd(abs(base - shift), height)
    area = Fraction(base * height, 2)
    interior = area - Fraction(boundary, 2) + 1
    count = 0  # second method: test the grid points one by one
    for y in range(1, height):
        for x in range(-1, max(base, shift) + 1):
            left, right = Fraction(shift * y, height), base + Fraction((shift - base) * y, height)
            count += left < x < right
    agree(count, float(interior))
    return {
        "base": base, "height": height, "shift": shift, "boundary": boundary,
        "area": float(area), "interior": int(interior),
    }  # fmt: skip


PICK = Concept.with_texts(
    TEXTS,
    name="Pick's Theorem",
    domain=MATH,
    draw=_pick,
    held_out=True,
    verified_by="testing every grid point",
)


def _shoelace(rng: Random) -> Values:
    a, b = rng.randint(6, 20), rng.randint(6, 20)
    points = [
        (0, 0), (a, rng.randint(0, 3)), (a + rng.randint(0, 4), b), (rng.randint(0, 4), b + 2),
    ]  # fmt: skip
    products = [
        p[0] * q[1] - q[0] * p[1] for p, q in zip(points, points[1:] + points[:1], strict=True)
    ]
    area = abs(sum(products)) / 2
    triangles = 0.0  # second method: Heron's formula for the two halves
    for p, q, r in ((points[0], points[1], points[2]), (points[0], points[2], points[3])):
        sides = (math.dist(p, q), math.dist(q, r), math.dist(r, p))
        half = sum(sides) / 2
        triangles += math.sqrt(half * math.prod(half - side for side in sides))
    agree(triangles, area)
    return {
        "points": ", ".join(map(str, points)), "area": area,
        "products": " + ".join(map(str, products)),
    }  # fmt: skip


SHOELACE = Concept.with_texts(
    TEXTS,
    name="Shoelace Theorem",
    domain=MATH,
    draw=_shoelace,
    verified_by="Heron's formula on two triangles",
)

CONCEPTS = (
    BAYES, STARS_BARS, INCLUSION_EXCLUSION, DERANGEMENT, PICK, SHOELACE,
)  # fmt: skip
