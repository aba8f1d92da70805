"""Physics families about light and sound; each answer is found twice."""

from __future__ import annotations

import math
from random import Random

from ReasonAug.problem import PHYSICS, Concept, Values, agree


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


SNELL = Concept(
    name="Snell's Law",
    domain=PHYSICS,
    draw=_snell,
    verified_by="the refracted path is the fastest one (Fermat), found by ternary search",
    definition="""
    When light crosses the boundary of two transparent media it changes direction so that the
    refractive index times the sine of the angle to the normal is the same on both sides: n1 sin(t1)
    = n2 sin(t2). A ray that enters an optically denser medium bends towards the normal.
    """,
    forms="""
    A narrow beam of light in air strikes a flat block of {medium} (refractive index {n2}) at
    {angle} degrees from the normal. At what angle to the normal does it travel inside the block?

    {who} shines a laser pointer onto the smooth surface of a tank filled with {medium}. The ray
    makes {angle} degrees with the perpendicular before it enters, and the index of the filling is
    {n2}. By how many degrees from the perpendicular is the ray inclined after entering?

    Through the air, a sunbeam reaches a thick sheet of {medium} whose optical density gives light a
    speed {n2} times lower than in air. Incidence is {angle} degrees. Find the direction of the bent
    beam, measured from the upright to the sheet.

    A pencil of rays hits the transparent slab, made of {medium} with index {n2}, tilted {angle}
    degrees away from the line that stands at right angles on its face. How strongly tilted does it
    continue below the face?
    """,
    solutions="""
    By Snell's law the product of refractive index and sine of the angle is unchanged across the
    boundary: 1.00 sin({angle}) = {n2} sin(t). Therefore sin(t) = {sine:.4f} and the ray is
    refracted to t = {refracted:.4g} degrees.

    Refraction: n1 sin(t1) = n2 sin(t2) with n1 = 1 for air. sin(t2) = sin({angle} deg) / {n2} =
    {sine:.4f}. The angle of refraction is {refracted:.4g} degrees, smaller than {angle} degrees
    because the ray enters the optically denser medium and bends towards the normal.
    """,
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


MALUS = Concept(
    name="Malus's Law",
    domain=PHYSICS,
    draw=_malus,
    verified_by="projection of the electric field vector on the second axis",
    definition="""
    An ideal polarizer passes only the component of the electric field along its axis. Polarized
    light of intensity I0 leaves a second polarizer with I = I0 cos^2(a), where a is the angle
    between the polarization and the axis. Unpolarized light loses half its intensity first.
    """,
    forms="""
    Unpolarized light of {intensity} W/m^2 passes two polarizing filters, one after the other. Their
    axes differ by {turn} degrees. What intensity leaves the second filter?

    {who} holds two sheets of polaroid in front of a lamp that delivers {intensity} watts per square
    metre of ordinary, unpolarized light. The second sheet is rotated by {turn} degrees relative to
    the first. How bright is the transmitted light?

    A photographer stacks a polarizer and an analyzer whose transmission directions enclose {turn}
    degrees. The incoming daylight, polarized in no direction, carries {intensity} W/m^2. How much
    gets through the pair?

    Two pairs of polarized sunglasses are put behind each other, the rear pair twisted by {turn}
    degrees. If the glare in front has an irradiance of {intensity} W per m^2 with random vibration
    directions, what irradiance remains at the eye?
    """,
    solutions="""
    The first polarizer halves unpolarized light: {middle:.4g} W/m^2. Malus's law then gives I =
    {middle:.4g} cos^2({turn} deg) = {after:.4g} W/m^2 behind the second polarizer.

    Behind the first filter the light is polarized and has intensity {intensity}/2 = {middle:.4g}
    W/m^2. Only the field component along the second axis is transmitted, a factor cos({turn} deg)
    in amplitude and cos^2 in intensity. The result is {after:.4g} W/m^2.
    """,
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


DOPPLER = Concept(
    name="Doppler Effect",
    domain=PHYSICS,
    draw=_doppler,
    held_out=True,
    verified_by="arrival times of two successive crests",
    definition="""
    The frequency that an observer hears differs from the emitted one when source and observer move
    relative to each other. For a source that approaches with speed v in a medium with sound speed
    c, f' = f c / (c - v); for a receding source f' = f c / (c + v).
    """,
    forms="""
    A siren emits a tone of {frequency} Hz while its vehicle drives straight towards a listener who
    stands still, at {speed} m/s. Sound travels at 340 m/s. Which frequency does the listener hear?

    {who} waits at a level crossing. A train whistle with a pitch of {frequency} hertz comes nearer
    at {speed} metres per second. With a speed of sound of 340 m/s, what pitch reaches {who}?

    A speedboat, sounding its horn at {frequency} vibrations per second, races at {speed} m/s
    towards the pier. How many vibrations per second arrive at the ear of somebody on the pier (340
    m/s for sound)?

    While an ambulance rushes up with {speed} m/s, the note of its horn seems too high. The horn
    itself oscillates at {frequency} Hz and air carries sound at 340 m/s. Compute the apparent
    frequency of the note.
    """,
    solutions="""
    Doppler effect, approaching source: f' = f c / (c - v) = {frequency} * 340 / (340 - {speed}) =
    {heard:.5g} Hz. The wave crests are squeezed together in front of the moving source.

    Between two crests the source follows its own sound, so the wavelength shrinks to (340 -
    {speed}) / {frequency} m. The observed frequency is 340 divided by that: {heard:.5g} Hz. After
    passing, the receding source would be heard at {passed:.5g} Hz.
    """,
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


DOUBLE_SLIT = Concept(
    name="Young's Double-Slit Experiment",
    domain=PHYSICS,
    draw=_double_slit,
    verified_by="bisection on the exact path difference",
    definition="""
    Coherent light through two narrow slits interferes. Bright fringes appear where the path
    difference d sin(t) is a whole number of wavelengths, so on a distant screen neighbouring
    fringes are separated by dy = lambda L / d.
    """,
    forms="""
    Light of wavelength {wavelength} nm falls on two narrow slits that are {gap} mm apart. A screen
    stands {distance} m behind them. How far apart are neighbouring bright fringes?

    {who} scratches two parallel lines, {gap} millimetres from each other, into a blackened slide
    and sends a {wavelength} nm laser through them. On the wall {distance} metres away, stripes
    appear. Find the distance from one bright stripe to the next.

    An interference pattern of monochromatic light ({wavelength} nm) is recorded on a camera chip
    {distance} m from a double aperture with a separation of {gap} mm. What period does the pattern
    have?

    Coherent waves, {wavelength} nm long, leave a pair of thin openings in a foil; the openings have
    a spacing of {gap} mm. Which gap between adjacent maxima is seen on a sheet of paper at
    {distance} m?
    """,
    solutions="""
    Young's double slit: neighbouring maxima are separated by dy = lambda L / d = {wavelength}e-9 *
    {distance} / {gap}e-3 m = {mm:.4g} mm.

    Constructive interference requires a path difference of whole wavelengths, d sin(t) = m lambda.
    For small angles y = m lambda L / d, hence the fringe spacing is lambda L / d = {mm:.4g} mm.
    """,
)

CONCEPTS = (SNELL, MALUS, DOPPLER, DOUBLE_SLIT)
