"""Physics families about heat, flow and motion; each answer is found twice."""

from __future__ import annotations

import math
from pathlib import Path
from random import Random

from pipeline.config.loading import read_yaml
from ReasonAug.problem import PHYSICS, Concept, Values, agree

TEXTS = read_yaml(Path(__file__).with_suffix(".yaml"))


def _ideal_gas(rng: Random) -> Values:
    p1, v1, c1 = rng.randint(90, 300), rng.randint(2, 40), rng.randint(5, 40)
    v2, c2 = v1 + rng.randint(1, 30), c1 + rng.randint(15, 150)
    t1, t2 = c1 + 273, c2 + 273
    p2 = p1 * v1 * t2 / (t1 * v2)
    moles = p1 * v1 / (8.314 * t1)  # kPa times litres are joules
    agree(moles * 8.314 * t2 / v2, p2)
    return {"p1": p1, "v1": v1, "c1": c1, "v2": v2, "c2": c2, "t1": t1, "t2": t2, "p2": p2}


IDEAL_GAS = Concept.with_texts(
    TEXTS,
    name="Ideal Gas Law",
    domain=PHYSICS,
    draw=_ideal_gas,
    verified_by="number of moles from the first state, pressure from the second",
)


def _torricelli(rng: Random) -> Values:
    depth, height = rng.randint(5, 60) / 10, rng.randint(2, 20) / 10
    speed = math.sqrt(2 * 9.81 * depth)
    reach = 2 * math.sqrt(depth * height)
    time = reach / speed  # the jet must have fallen exactly `height` when it lands
    agree(0.5 * 9.81 * time * time, height)
    agree(0.5 * speed * speed, 9.81 * depth)
    return {"depth": depth, "height": height, "speed": speed, "reach": reach}


TORRICELLI = Concept.with_texts(
    TEXTS,
    name="Torricelli's Law",
    domain=PHYSICS,
    draw=_torricelli,
    verified_by="energy balance of the liquid and free fall of the jet",
)


def _calorimetry(rng: Random) -> Values:
    metal, heat = rng.choice((("copper", 385), ("aluminium", 900), ("iron", 450), ("brass", 380)))
    m, hot = rng.randint(2, 20) / 10, rng.randint(90, 300)
    water, cold = rng.randint(5, 40) / 10, rng.randint(8, 25)
    a, b = m * heat, water * 4186
    final = (a * hot + b * cold) / (a + b)
    low, high = float(cold), float(hot)
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if a * (hot - middle) > b * (middle - cold) else (low, middle)
    agree(low, final)
    return {
        "metal": metal, "heat": heat, "m": m, "hot": hot, "water": water, "cold": cold,
        "final": final, "given": a * (hot - final),
    }  # fmt: skip


CALORIMETRY = Concept.with_texts(
    TEXTS,
    name="Calorimetry (Specific Heat Balance)",
    domain=PHYSICS,
    draw=_calorimetry,
    held_out=True,
    verified_by="bisection on the balance of heat given and taken",
)


def _carnot(rng: Random) -> Values:
    hot, cold = rng.randint(180, 700), rng.randint(5, 60)
    heat = rng.randrange(200, 3000, 50)
    t_hot, t_cold = hot + 273, cold + 273
    efficiency = 1 - t_cold / t_hot
    work = heat * efficiency
    agree(heat / t_hot, (heat - work) / t_cold)  # a reversible cycle makes no entropy
    return {
        "hot": hot, "cold": cold, "heat": heat, "t_hot": t_hot, "t_cold": t_cold,
        "percent": 100 * efficiency, "work": work, "waste": heat - work,
    }  # fmt: skip


CARNOT = Concept.with_texts(
    TEXTS,
    name="Carnot's Theorem",
    domain=PHYSICS,
    draw=_carnot,
    verified_by="entropy taken from the hot side equals entropy given to the cold side",
)


def _collision(rng: Random) -> Values:
    m1, m2 = rng.sample(range(1, 13), 2)
    u1, u2 = rng.randint(2, 12), -rng.randint(0, 8)
    v1 = ((m1 - m2) * u1 + 2 * m2 * u2) / (m1 + m2)
    v2 = ((m2 - m1) * u2 + 2 * m1 * u1) / (m1 + m2)
    agree(m1 * v1 + m2 * v2, m1 * u1 + m2 * u2)
    agree(m1 * v1**2 + m2 * v2**2, m1 * u1**2 + m2 * u2**2)
    return {"m1": m1, "m2": m2, "u1": u1, "u2": u2, "w2": -u2, "v1": v1, "v2": v2}


ELASTIC_COLLISION = Concept.with_texts(
    TEXTS,
    name="Elastic Collision",
    domain=PHYSICS,
    draw=_collision,
    verified_by="momentum and kinetic energy before and after",
)


CONCEPTS = (IDEAL_GAS, TORRICELLI, CALORIMETRY, CARNOT, ELASTIC_COLLISION)
