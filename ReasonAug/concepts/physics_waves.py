"""Physics families about light and sound; each answer is found twice."""

from __future__ import annotations

import math
from pathlib import Path
from random import Random

from pipeline.config.loading import read_yaml
from ReasonAug.problem import PHYSICS, Concept, Values, agree

TEXTS = read_yaml(Path(__file__).with_suffix(".yaml"))


def _snell(rng: Random) -> Values:
    medium, n2 = rng.choice(
        (("water", 1.33), ("window glass", 1.52), ("plexiglass", 1.49), ("quartz", 1.46))
    )
    angle = rng.randint(15, 70)
    sine = math.sin(math.radians(angle)) / n2
    refracted = math.degrees(math.asin(sine))
    # Fermat: of all paths from 1 above the boundary to 1 below it, light takes the fastest
    width = math.tan(math.radians(angle)) + math.tan(math.radians(refracted))
    low, high = 0.0, width
    for _ in range(200):
        third = (high - low) / 3
        left, right = low + third, high - third
        if _travel_time(left, width, n2) < _travel_time(right, width, n2):
            high = right
        else:
            low = left
    agree(math.degrees(math.atan(width - low)), refracted, tolerance=1e-5)
    return {"medium": medium, "n2": n2, "angle": angle, "sine": sine, "refracted": refracted}


def _travel_time(x: float, width: float, n2: float) -> float:
    return math.hypot(1, x) + n2 * math.hypot(1, width - x)


SNELL = Concept.with_texts(
    TEXTS,
    name="Snell's Law",
    domain=PHYSICS,
    draw=_snell,
    verified_by="the refracted path is the fastest one (Fermat), found by ternary search",
)


def _malus(rng: Random) -> Values:
    intensity = rng.choice((120, 240, 300, 450, 600, 800))
    first, second = rng.randint(10, 60), rng.randint(15, 70)
    middle = intensity / 2
    after = middle * math.cos(math.radians(second)) ** 2
    # second method: project the field vector on the axis of the second filter
    amplitude = math.sqrt(middle)
    start = math.radians(first)
    axis = math.radians(first + second)
    field = (amplitude * math.cos(start), amplitude * math.sin(start))
    agree((field[0] * math.cos(axis) + field[1] * math.sin(axis)) ** 2, after)
    return {"intensity": intensity, "turn": second, "middle": middle, "after": after}


MALUS = Concept.with_texts(
    TEXTS,
    name="Malus's Law",
    domain=PHYSICS,
    draw=_malus,
    verified_by="projection of the electric field vector on the second axis",
)


def _doppler(rng: Random) -> Values:
    sound = 340.0
    frequency = rng.randrange(300, 1200, 20)
    speed = rng.randint(8, 60)
    heard = frequency * sound / (sound - speed)
    # second method: arrival times of two neighbouring crests at a listener 1000 m away
    period = 1 / frequency
    first = 1000 / sound
    second = period + (1000 - speed * period) / sound
    agree(1 / (second - first), heard, tolerance=1e-5)
    passed = frequency * sound / (sound + speed)
    return {"frequency": frequency, "speed": speed, "heard": heard, "passed": passed}


DOPPLER = Concept.with_texts(
    TEXTS,
    name="Doppler Effect",
    domain=PHYSICS,
    draw=_doppler,
    held_out=True,
    verified_by="arrival times of two successive crests",
)


def _double_slit(rng: Random) -> Values:
    wavelength = rng.choice((405, 450, 532, 589, 633, 650))
    gap = rng.choice((0.1, 0.15, 0.2, 0.25, 0.3, 0.4))
    distance = rng.choice((1.2, 1.5, 1.8, 2.0, 2.4, 3.0))
    spacing = wavelength * 1e-9 * distance / (gap * 1e-3)
    # second method: the height where the exact path difference is one wavelength, by bisection
    low, high = 0.0, 10 * spacing
    for _ in range(200):
        middle = (low + high) / 2
        upper = math.hypot(distance, middle + gap * 5e-4)
        difference = upper - math.hypot(distance, middle - gap * 5e-4)
        low, high = (middle, high) if difference < wavelength * 1e-9 else (low, middle)
    agree(low, spacing, tolerance=1e-3)
    return {"wavelength": wavelength, "gap": gap, "distance": distance, "mm": spacing * 1e3}


DOUBLE_SLIT = Concept.with_texts(
    TEXTS,
    name="Young's Double-Slit Experiment",
    domain=PHYSICS,
    draw=_double_slit,
    verified_by="bisection on the exact path difference",
)

CONCEPTS = (SNELL, MALUS, DOPPLER, DOUBLE_SLIT)
