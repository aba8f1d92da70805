"""Physics families about charge and current; each answer is found twice."""

from __future__ import annotations

from random import Random

import sympy

from ReasonAug.problem import PHYSICS, Concept, Values, agree


def _resistors(rng: Random) -> Values:
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


KIRCHHOFF = Concept(
    name="Kirchhoff's Laws",
    domain=PHYSICS,
    draw=_resistors,
    verified_by="linear system of the junction and loop equations, solved exactly",
    definition="""
    Junction rule: the currents into a node sum to the currents out of it. Loop rule: the voltages
    around every closed loop sum to zero. Together with Ohm's law they determine every current of a
    resistor network.
    """,
    forms="""
    A {volts} V battery feeds a {r1} ohm resistor in series with a parallel pair of {r2} ohm and
    {r3} ohm. Find the current through each resistor.

    In a circuit at {place}, the wire from the {volts} volt supply first passes {r1} ohm, then
    splits into two branches of {r2} ohm and {r3} ohm which join again before the return. How many
    amperes flow in each branch?

    {who} solders a heater of {r1} ohm, and behind it two bulbs side by side with {r2} and {r3} ohm,
    to a {volts} V source. What currents do ammeters in front of the three parts show?

    Charge leaves the {volts} V cell, is throttled by {r1} ohm, and must then choose between a path
    of {r2} ohm and one of {r3} ohm back to the cell. How is the flow shared, in amperes?
    """,
    solutions="""
    Parallel pair: {r2} * {r3} / ({r2} + {r3}) = {parallel:.4g} ohm. Total current {volts} / ({r1} +
    {parallel:.4g}) = {current:.4g} A. By Kirchhoff's junction rule it splits into {i2:.4g} A and
    {i3:.4g} A.

    Kirchhoff: i1 = i2 + i3 at the node; loops: {r1} i1 + {r2} i2 = {volts} and {r2} i2 = {r3} i3.
    Solving the resistor network, i1 = {current:.4g} A, i2 = {i2:.4g} A, i3 = {i3:.4g} A.
    """,
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


COULOMB = Concept(
    name="Coulomb's Law",
    domain=PHYSICS,
    draw=_coulomb,
    verified_by="numerical derivative of the potential energy",
    definition="""
    Two point charges attract or repel each other along their connecting line with the force F = k
    q1 q2 / r^2, where k = 8.99e9 N m^2 / C^2. Like charges repel.
    """,
    forms="""
    Two point charges of {q1} and {q2} microcoulomb are {cm} cm apart. How strongly do they repel
    each other?

    {who} hangs two small charged spheres from silk threads. They carry {q1} and {q2} microcoulomb
    of the same sign, centres {cm} cm from each other. Which electric push acts on each sphere?

    Dust grains in an electrostatic filter have picked up charge: {q1} microcoulomb on one, {q2} on
    its neighbour, {cm} centimetres away. What repulsive force results, in newtons?

    Rubbing gave two pith balls an excess of {q1} and {q2} millionths of a coulomb. At a separation
    of {cm} cm, with how many newtons do they drive each other away?
    """,
    solutions="""
    Coulomb's law: F = k q1 q2 / r^2 = 8.99e9 * {q1}e-6 * {q2}e-6 / (0.01 * {cm})^2 = {force:.4g} N.

    The electrostatic force between point charges falls with the square of their distance. Inserting
    k = 8.99e9 N m^2/C^2, the charges {q1}e-6 C and {q2}e-6 C and r = {cm} cm gives a repulsion of
    {force:.4g} N; at twice the distance it would be {quarter:.4g} N.
    """,
)

CONCEPTS = (KIRCHHOFF, COULOMB)
