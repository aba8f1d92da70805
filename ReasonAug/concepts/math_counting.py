"""Math families about counting, chance and geometry; each answer is found twice."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import permutations, product
from random import Random

from ReasonAug.problem import MATH, Concept, Values, agree


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


BAYES = Concept(
    name="Bayes' Theorem",
    domain=MATH,
    draw=_bayes,
    verified_by="natural frequencies among a million cases",
    definition="""
    Conditional probabilities are reversed by P(A | B) = P(B | A) P(A) / P(B): the posterior is the
    prior weighted with how well each hypothesis explains the evidence.
    """,
    forms="""
    {prior} % of the {things} are faulty. A test flags {hit} % of the faulty ones but also {false} %
    of the good ones. If one is flagged, how likely is it to be faulty?

    An illness affects {prior} percent of a population. The screening is positive for {hit} percent
    of the ill and, by mistake, for {false} percent of the healthy. {who} tests positive. What is
    the chance that {who} is ill?

    A filter catches {hit} % of unwanted messages and wrongly stops {false} % of the wanted ones;
    {prior} % of all messages are unwanted. What fraction of stopped messages deserves it?

    Smoke detectors at {place} ring on {hit} of 100 evenings with a fire, and on {false} of 100
    evenings without one. Fires occur on {prior} of 100 evenings. It rings tonight. How worried
    should one be, as a percentage?
    """,
    solutions="""
    Bayes' theorem: P = 0.01*{prior} * 0.01*{hit} divided by the total probability of a positive
    result. The posterior is {posterior:.4g} %.

    Among a million cases, {found} are true positives and {wrong} are false positives. By Bayes the
    conditional probability given a positive test is {found} / ({found} + {wrong}) = {posterior:.4g}
    %.
    """,
)


def _stars_bars(rng: Random) -> Values:
    items, kinds = rng.randint(5, 14), rng.randint(3, 5)
    ways = math.comb(items + kinds - 1, kinds - 1)
    count = sum(1 for counts in product(range(items + 1), repeat=kinds - 1) if sum(counts) <= items)
    agree(count, ways)
    return {"items": items, "kinds": kinds, "ways": ways, "n": items + kinds - 1, "k": kinds - 1}


STARS_BARS = Concept(
    name="Stars and Bars",
    domain=MATH,
    draw=_stars_bars,
    verified_by="enumeration of all distributions",
    definition="""
    The number of ways to put n identical objects into k distinct boxes is C(n + k - 1, k - 1):
    write the objects as stars and separate the boxes with k - 1 bars.
    """,
    forms="""
    In how many ways can {items} identical sweets be shared out among {kinds} children, if a child
    may get nothing?

    {who} orders {items} scoops of ice cream from {kinds} flavours. Only the number of scoops of
    each flavour matters. How many different orders are there?

    Count the solutions of x1 + ... + x{kinds} = {items} in non-negative whole numbers.

    At {place}, {items} indistinguishable {things} are to be placed on {kinds} labelled shelves,
    empty shelves allowed. How many arrangements look different?
    """,
    solutions="""
    Stars and bars: {items} stars and {k} bars can be arranged in C({n}, {k}) = {ways} ways.

    Draw the identical objects as stars in a row and separate the {kinds} boxes by {k} bars.
    Choosing the bar positions among {n} places gives the binomial coefficient C({n}, {k}) = {ways}.
    """,
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


INCLUSION_EXCLUSION = Concept(
    name="Principle of Inclusion-Exclusion",
    domain=MATH,
    draw=_inclusion,
    verified_by="direct count",
    definition="""
    The size of a union is the sum of the sizes of the sets, minus the sizes of all pairwise
    intersections, plus those of the triple intersections, and so on with alternating sign.
    """,
    forms="""
    How many of the whole numbers from 1 to {n} are divisible by at least one of {a}, {b} and {c}?

    The {things} are numbered 1 to {n}. {who} paints those whose number is in the {a} times table,
    {other} uses the {b} times table and the {role} the {c} times table. How many {things} carry any
    paint?

    Find the number of positive integers up to {n} that are multiples of {a}, of {b} or of {c}.

    Three lamps flash together at second 0, then every {a}, {b} and {c} seconds. During the next {n}
    seconds, in how many of the seconds is a flash seen?
    """,
    solutions="""
    Inclusion-exclusion: ({singles}) - ({pairs}) + {triple} = {answer}.

    Add the multiples of each number, {singles}; multiples of two of them were counted twice, so
    subtract the intersections {pairs}; add back the {triple} in all three sets. The union has
    {answer} elements by inclusion and exclusion.
    """,
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


DERANGEMENT = Concept(
    name="Derangements",
    domain=MATH,
    draw=_derangement,
    verified_by="enumeration of all permutations",
    definition="""
    A derangement is a permutation without a fixed point. Their number satisfies D(n) = (n - 1)(D(n
    - 1) + D(n - 2)) and is the integer nearest to n!/e.
    """,
    forms="""
    {n} guests leave their hats at the door. In how many ways can the hats be given back so that
    nobody gets their own?

    {who} puts {n} letters into {n} addressed envelopes so that not a single letter is right. How
    many such mix-ups exist, and how likely is one if the letters are stuffed at random?

    {n} workers of {place} swap lockers so that every worker ends up with a locker that was somebody
    else's. Count the possibilities.

    Each of {n} friends brings a present and draws one from the heap. In how many outcomes does no
    one take home what they brought?
    """,
    solutions="""
    Derangements: D({n}) = {answer} of the {all} permutations have no fixed point (probability
    {chance:.4g}).

    Use the recursion for permutations without fixed points, D(k) = (k - 1)(D(k - 1) + D(k - 2)),
    D(1) = 0, D(2) = 1. It gives D({n}) = {answer}, out of {all} permutations.
    """,
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


PICK = Concept(
    name="Pick's Theorem",
    domain=MATH,
    draw=_pick,
    held_out=True,
    verified_by="testing every grid point",
    definition="""
    A simple polygon with vertices on a square lattice has area A = I + B/2 - 1, where I and B count
    the lattice points inside it and on its boundary.
    """,
    forms="""
    A triangle has its corners at (0, 0), ({base}, 0) and ({shift}, {height}). How many points with
    integer coordinates lie strictly inside it?

    On squared paper {who} draws a triangle with corners at the crossings (0,0), ({base},0) and
    ({shift},{height}). Count the crossings in its interior.

    Trees stand at all whole-number positions of a plane. A fence runs straight from (0, 0) to
    ({base}, 0), on to ({shift}, {height}) and back. How many trees are enclosed, those on the fence
    not counted?

    A rubber band on a pegboard is stretched around the pegs (0, 0), ({base}, 0), ({shift},
    {height}). How many pegs does it surround without touching them?
    """,
    solutions="""
    Pick's theorem: area {area:g}, boundary lattice points {boundary}. I = A - B/2 + 1 = {interior}
    interior points.

    The lattice triangle has area {base} * {height} / 2 = {area:g}. Greatest common divisors of the
    edge steps give B = {boundary} boundary points. From A = I + B/2 - 1, there are {interior}
    lattice points inside.
    """,
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


SHOELACE = Concept(
    name="Shoelace Theorem",
    domain=MATH,
    draw=_shoelace,
    verified_by="Heron's formula on two triangles",
    definition="""
    The area of a simple polygon with vertices (x1, y1), ..., (xn, yn) in order is half the absolute
    value of the sum of x_i y_(i+1) - x_(i+1) y_i.
    """,
    forms="""
    Find the area of the quadrilateral with the vertices {points}, taken in this order.

    A surveyor walks around a plot of land near {place} and notes the corners {points} on a metric
    map. How many square units does the plot cover?

    {who} cuts a four-sided piece out of cardboard; its corners have the coordinates {points}. How
    big is the piece?

    A garden bed is bounded by straight edges from stake to stake; the stakes are at {points}, and
    the last is joined to the first. How much surface must be covered with mulch?
    """,
    solutions="""
    Shoelace theorem: half the absolute value of {products}, that is an area of {area:g}.

    Cross-multiply the coordinates of consecutive vertices, x_i y_(i+1) - x_(i+1) y_i: {products}.
    Half of the absolute sum is the polygon's area, {area:g}.
    """,
)

CONCEPTS = (
    BAYES, STARS_BARS, INCLUSION_EXCLUSION, DERANGEMENT, PICK, SHOELACE,
)  # fmt: skip
