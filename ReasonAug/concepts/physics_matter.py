"""Physics families about heat, flow and motion; each answer is found twice."""

from __future__ import annotations

import math
from random import Random

from ReasonAug.problem import PHYSICS, Concept, Values, agree


def _ideal_gas(rng: Random) -> Values:
    p1, v1, c1 = rng.randint(90, 300), rng.randint(2, 40), rng.randint(5, 40)
    v2, c2 = v1 + rng.randint(1, 30), c1 + rng.randint(15, 150)
    t1, t2 = c1 + 273, c2 + 273
    p2 = p1 * v1 * t2 / (t1 * v2)
    moles = p1 * v1 / (8.314 * t1)  # kPa times litres are joules
    agree(moles * 8.314 * t2 / v2, p2)
    return {"p1": p1, "v1": v1, "c1": c1, "v2": v2, "c2": c2, "t1": t1, "t2": t2, "p2": p2}


IDEAL_GAS = Concept(
    name="Ideal Gas Law",
    domain=PHYSICS,
    draw=_ideal_gas,
    verified_by="number of moles from the first state, pressure from the second",
    definition="""
    Pressure, volume, amount and absolute temperature of a dilute gas satisfy p V = n R T. For a
    fixed amount of gas, p V / T is therefore the same in every state.
    """,
    forms="""
    A sealed cylinder holds gas at {p1} kPa, {v1} litres and {c1} degrees Celsius. The piston moves
    until the volume is {v2} litres while the gas is heated to {c2} degrees. What is the pressure
    now?

    {who} fills a flexible balloon: {v1} L of gas, {p1} kPa, {c1} C. Later it has expanded to {v2} L
    and warmed up to {c2} C, with nothing leaking. Find the pressure inside.

    A trapped quantity of helium first occupies {v1} L at a pressure of {p1} kPa and a temperature
    of {c1} C. Which pressure does it exert after being brought to {v2} L and {c2} C?

    In a closed container with a movable wall, the enclosed air was measured at {c1} C ({p1} kPa,
    {v1} l). After the wall slid outward to {v2} l and a heater raised the temperature to {c2} C,
    how many kPa does the gauge show?
    """,
    solutions="""
    Ideal gas law with a fixed amount: p1 V1 / T1 = p2 V2 / T2, temperatures in kelvin. p2 = {p1} *
    {v1} * {t2} / ({t1} * {v2}) = {p2:.4g} kPa.

    Convert to absolute temperature: {t1} K and {t2} K. Since p V = n R T and n R does not change,
    p2 = {p1} kPa * ({v1}/{v2}) * ({t2}/{t1}) = {p2:.4g} kPa. The gas pressure follows from volume
    and temperature alone.
    """,
)


def _torricelli(rng: Random) -> Values:
    depth, height = rng.randint(5, 60) / 10, rng.randint(2, 20) / 10
    speed = math.sqrt(2 * 9.81 * depth)
    reach = 2 * math.sqrt(depth * height)
    time = reach / speed  # the jet must have fallen exactly `height` when it lands
    agree(0.5 * 9.81 * time * time, height)
    agree(0.5 * speed * speed, 9.81 * depth)
    return {"depth": depth, "height": height, "speed": speed, "reach": reach}


TORRICELLI = Concept(
    name="Torricelli's Law",
    domain=PHYSICS,
    draw=_torricelli,
    verified_by="energy balance of the liquid and free fall of the jet",
    definition="""
    Liquid leaves a small hole at depth h below the free surface of a wide open tank as fast as a
    body that has fallen freely through h: v = sqrt(2 g h).
    """,
    forms="""
    A wide open tank has a small hole {depth} m below the water surface and {height} m above the
    floor. How fast does the water leave the hole, and how far from the tank does the jet land?

    At {place}, a rain barrel springs a leak. The leak is {depth} metres under the water level and
    {height} metres above the ground. Determine the outflow speed and the horizontal reach of the
    stream.

    {who} opens a tiny tap in the side of a full cistern; the liquid stands {depth} m above the tap
    and the tap is {height} m above the pavement. With which speed does the liquid squirt out, and
    where does it hit the pavement?

    Somebody drilled a puncture into a big vat of juice: {depth} m of juice are over the puncture,
    {height} m of air under it. Calculate how quickly the juice spurts out and the width that the
    arc spans before it splashes down.
    """,
    solutions="""
    Torricelli's law: v = sqrt(2 g h) = sqrt(2 * 9.81 * {depth}) = {speed:.4g} m/s. Falling {height}
    m takes sqrt(2 * {height} / 9.81) s, so the jet lands 2 sqrt({depth} * {height}) = {reach:.4g} m
    away.

    The pressure of the liquid column turns into kinetic energy of the efflux: v^2 = 2 g h, v =
    {speed:.4g} m/s. Horizontal motion is uniform and vertical motion free fall; the water stream
    travels {reach:.4g} m before it reaches the floor.
    """,
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


CALORIMETRY = Concept(
    name="Calorimetry (Specific Heat Balance)",
    domain=PHYSICS,
    draw=_calorimetry,
    held_out=True,
    verified_by="bisection on the balance of heat given and taken",
    definition="""
    In an insulated vessel the heat that hot bodies give up equals the heat that cold bodies take
    in. With Q = m c dT for each body, the common final temperature is the mean of the starting
    temperatures weighted by m c.
    """,
    forms="""
    A {m} kg piece of {metal} (specific heat {heat} J/(kg K)) at {hot} C is dropped into {water} kg
    of water (4186 J/(kg K)) at {cold} C in an insulated vessel. What is the final temperature?

    {who} takes a weight of {m} kg, made of {metal}, out of an oven at {hot} degrees and plunges it
    into a bucket with {water} kg of cold water at {cold} degrees. Nothing is lost to the
    surroundings. How warm does the bucket become? Heat capacities: {heat} for the weight, 4186 for
    water, in J per kg and kelvin.

    To find out how much a glowing {metal} part warms a bath, {other} quenches {m} kg of it, {hot} C
    hot, in {water} litres of water at {cold} C. Which temperature do both share in the end? Use
    {heat} and 4186 J/(kg K).

    A thermos flask contains {water} kg of water of {cold} C. Somebody adds a lump of {metal}, {m}
    kg, heated to {hot} C, and closes the lid. After a while the thermometer stands still. What does
    it show, with capacities of 4186 and {heat} J per kilogram kelvin?
    """,
    solutions="""
    Heat given equals heat taken: {m} * {heat} * ({hot} - T) = {water} * 4186 * (T - {cold}). The
    mixing temperature is T = {final:.4g} C.

    Calorimetry with Q = m c dT. The hot {metal} loses {given:.4g} J and the water gains the same
    heat. Weighted mean of the starting temperatures with weights m c gives the equilibrium
    temperature {final:.4g} C.
    """,
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


CARNOT = Concept(
    name="Carnot's Theorem",
    domain=PHYSICS,
    draw=_carnot,
    verified_by="entropy taken from the hot side equals entropy given to the cold side",
    definition="""
    No engine that works between two heat reservoirs is more efficient than a reversible one, whose
    efficiency depends only on the absolute temperatures: 1 - Tc / Th.
    """,
    forms="""
    A heat engine works between a boiler at {hot} C and a cooler at {cold} C and takes in {heat} kJ
    of heat per cycle. What is the largest work that it could deliver per cycle?

    An inventor at {place} claims a new motor that draws {heat} kJ from a furnace of {hot} C and
    rejects waste heat into a river of {cold} C. How much useful work is possible at the very most?

    Steam of {hot} C drives a turbine, and the condenser is kept at {cold} C. For each {heat} kJ
    supplied, find the upper bound of the mechanical energy and the waste heat that cannot be
    avoided.

    Between a geothermal source ({hot} C) and the winter air ({cold} C), an ideal reversible machine
    turns warmth into motion. Out of {heat} kJ withdrawn from the source, how many can be turned
    into motion?
    """,
    solutions="""
    Carnot's theorem: the maximal efficiency of a heat engine is 1 - Tc/Th = 1 - {t_cold}/{t_hot} =
    {percent:.4g} %. The work is at most {work:.5g} kJ, the waste heat at least {waste:.5g} kJ.

    In kelvin the reservoirs have {t_hot} K and {t_cold} K. A reversible cycle creates no entropy:
    {heat}/{t_hot} = Qc/{t_cold}, so Qc = {waste:.5g} kJ must go to the cold reservoir and the work
    is {work:.5g} kJ (efficiency {percent:.4g} %).
    """,
)


def _collision(rng: Random) -> Values:
    m1, m2 = rng.sample(range(1, 13), 2)
    u1, u2 = rng.randint(2, 12), -rng.randint(0, 8)
    v1 = ((m1 - m2) * u1 + 2 * m2 * u2) / (m1 + m2)
    v2 = ((m2 - m1) * u2 + 2 * m1 * u1) / (m1 + m2)
    agree(m1 * v1 + m2 * v2, m1 * u1 + m2 * u2)
    agree(m1 * v1**2 + m2 * v2**2, m1 * u1**2 + m2 * u2**2)
    return {"m1": m1, "m2": m2, "u1": u1, "u2": u2, "w2": -u2, "v1": v1, "v2": v2}


ELASTIC_COLLISION = Concept(
    name="Elastic Collision",
    domain=PHYSICS,
    draw=_collision,
    verified_by="momentum and kinetic energy before and after",
    definition="""
    In an elastic collision both total momentum and total kinetic energy are conserved. In one
    dimension the relative velocity is reversed, which fixes both final velocities.
    """,
    forms="""
    On a frictionless track a {m1} kg cart with {u1} m/s hits a {m2} kg cart with {u2} m/s head-on
    (positive means to the right). They bounce without losing energy. Find both velocities
    afterwards.

    Two steel pucks glide on ice along the same line: {m1} kg at {u1} m/s to the right, {m2} kg at
    {w2} m/s to the left. The impact is perfectly springy. With which velocities do they separate?

    {who} lets two magnetic sliders of {m1} kg and {m2} kg repel each other on an air rail. Before
    the encounter they move with {u1} and {u2} m/s. What do the speed sensors show after it, if no
    kinetic energy turns into heat?

    A marble ball of {m1} kg rolls at {u1} m/s into another of {m2} kg which has velocity {u2} m/s.
    Hard as they are, the balls rebound with all of their energy of motion preserved. Determine the
    motion of each after the knock.
    """,
    solutions="""
    Elastic collision: momentum and kinetic energy are conserved. v1 = ((m1 - m2) u1 + 2 m2 u2) /
    (m1 + m2) = {v1:.4g} m/s and v2 = ((m2 - m1) u2 + 2 m1 u1) / (m1 + m2) = {v2:.4g} m/s.

    Conservation of momentum: {m1} v1 + {m2} v2 = {m1} * {u1} + {m2} * ({u2}). Conservation of
    kinetic energy reverses the relative velocity: v2 - v1 = {u1} - ({u2}). Solving the two linear
    equations, the colliding masses leave with {v1:.4g} m/s and {v2:.4g} m/s.
    """,
)


CONCEPTS = (IDEAL_GAS, TORRICELLI, CALORIMETRY, CARNOT, ELASTIC_COLLISION)
