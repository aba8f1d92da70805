"""Physics families about charge and current; each answer is found twice."""

from __future__ import annotations

from pathlib import Path
from random import Random

from pipeline.config.loading import read_yaml
from ReasonAug.problem import PHYSICS, Concept, Values, agree

TEXTS = read_yaml(Path(__file__).with_suffix(".yaml"))


def _resistors(rng: Random) -> Values:
    import sympy  # slow to import, and only one concept needs it

    r1, r2, r3 = (rng.randint(2, 60) for _ in range(3))
    volts = rng.choice((6, 9, 12, 24, 48))
    parallel = r2 * r3 / (r2 + r3)
    current = volts / (r1 + parallel)
    i2 = current * r3 / (r2 + r3)
    # second method: Kirchhoff's equations as a linear system for i1, i2, i3
    system = sympy.Matrix([[1, -1, -1], [r1, r2, 0], [0, r2, -r3]])
    exact = system.LUsolve(sympy.Matrix([0, volts, 0]))
    agree(float(exact[0]), current)
    agree(float(exact[1]), i2)
    return {
        "r1": r1, "r2": r2, "r3": r3, "volts": volts, "parallel": parallel,
        "current": current, "i2": i2, "i3": current - i2,
    }  # fmt: skip


KIRCHHOFF = Concept.with_texts(
    TEXTS,
    name="Kirchhoff's Laws",
    domain=PHYSICS,
    draw=_resistors,
    verified_by="linear system of the junction and loop equations, solved exactly",
)


def _coulomb(rng: Random) -> Values:
    q1, q2 = rng.randint(1, 9), rng.randint(1, 9)
    cm = rng.choice((5, 8, 10, 12, 15, 20, 25, 30))
    k, r = 8.99e9, cm / 100
    force = k * q1 * q2 * 1e-12 / r**2
    step = r * 1e-5  # second method: the slope of the potential energy
    energy = [k * q1 * q2 * 1e-12 / (r + sign * step) for sign in (1, -1)]
    agree((energy[1] - energy[0]) / (2 * step), force)
    return {"q1": q1, "q2": q2, "cm": cm, "force": force, "quarter": force / 4}


COULOMB = Concept.with_texts(
    TEXTS,
    name="Coulomb's Law",
    domain=PHYSICS,
    draw=_coulomb,
    verified_by="numerical derivative of the potential energy",
)

CONCEPTS = (KIRCHHOFF, COULOMB)
