"""Draw the story around a problem: people, a place, and background unrelated to the idea.

All concepts share the same scenes, so the setting of a problem gives no hint about its solution.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

PEOPLE = (
    "Amara", "Bruno", "Chiara", "Dmitri", "Elif", "Farid", "Greta", "Hiro", "Ines", "Jonas",
    "Kamala", "Leon", "Mirela", "Nadia", "Oskar", "Priya", "Quentin", "Rosa", "Sven", "Tala",
    "Umar", "Vera", "Wanjiru", "Xenia", "Yusuf", "Zofia", "Anselm", "Beatriz", "Ciaran", "Dalia",
    "Emeka", "Freya", "Goran", "Hana", "Ismael", "Jasmin", "Kofi", "Lucia", "Matteo", "Noor",
    "Olga", "Pavel", "Rania", "Stefan", "Thandi", "Ulrike", "Viktor", "Wen", "Ximena", "Yara",
    "Zeno", "Ayo", "Birgit", "Cosmin", "Devika", "Eamon", "Fatou", "Gustav", "Hamida",
)  # fmt: skip

# world: (place, things that are handled there)
PLACES: dict[str, tuple[tuple[str, str], ...]] = {
    "coast": (
        ("the harbour office", "crates"),
        ("the lighthouse", "lamps"),
        ("the fish market", "baskets"),
        ("the ferry terminal", "tickets"),
        ("the boatyard", "planks"),
        ("the sailing club", "buoys"),
    ),
    "countryside": (
        ("the hillside farm", "sacks"),
        ("the vineyard", "barrels"),
        ("the apple orchard", "boxes"),
        ("the old mill", "bags"),
        ("the ranger station", "markers"),
        ("the dairy", "churns"),
    ),
    "town": (
        ("the public library", "volumes"),
        ("the corner bakery", "trays"),
        ("the puppet theatre", "costumes"),
        ("the tram depot", "wagons"),
        ("the post office", "parcels"),
        ("the toy museum", "exhibits"),
    ),
    "research": (
        ("the mountain observatory", "plates"),
        ("the polar station", "samples"),
        ("the botanical institute", "seedlings"),
        ("the engineering school", "kits"),
        ("the weather service", "balloons"),
        ("the hospital laboratory", "vials"),
    ),
}

ROLES = (
    "caretaker", "manager", "volunteer", "watchman", "trainee", "technician", "guide", "cashier",
    "gardener", "librarian", "clerk", "student", "driver", "cook",
)  # fmt: skip

_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_MONTHS = ("January", "March", "April", "June", "August", "October", "December")

_BACKGROUND = (
    "It is a {mood} {day} at {place}.",
    "{who}, a {role} at {place}, likes to write such questions on the back of an envelope.",
    "{who} and {other} have worked at {place} for {n} years.",
    "The notice board at {place} still shows the plan for {month}.",
    "There are {n} {things} near the door, and nobody knows who ordered them.",
    "{other} is busy repainting the {things} and cannot help today.",
    "The kettle in the back room takes {n} minutes, which is beside the point here.",
    "Last {month} a journalist wrote about {place} and its {things}.",
    "{other} heard the same question from a cousin on {day}.",
    "{who} keeps a notebook with {n} pages of remarks about {place}.",
    "A {mood} morning: rain and wind rattle the windows of {place}.",
    "Before lunch {who} counts the {things} once more and finds {n}.",
    "The {role} on duty has promised a cake to whoever settles the matter first.",
    "{place} opens at {hour} o'clock and closes when {other} goes home.",
    "The sign above the entrance of {place} was carved {n} years ago.",
    "{other} would rather talk about the football results of {day}.",
    "All {things} have been moved to the cellar since {month}.",
    "{who} learned about this from a former {role}.",
    "On the wall hangs a {mood} picture of {place} as it was {n} years ago.",
    "Someone left {n} umbrellas and a scarf at {place}.",
    "Every {day} the {role} writes a report that nobody reads.",
    "{who} shares an office with {other}, two cats and {n} {things}.",
    "The radio at {place} has played the same song {n} times.",
    "{other} bets {n} biscuits that no one can find the answer before {hour} o'clock.",
    "By {month} the {things} should be replaced, but the budget has not been approved.",
    "Visitors come to {place} mostly on {day}, when the {role} tells old stories.",
    "A {mood} dog sleeps beside the {things}.",
    "{who} wrote the details on a card so that {other} could check them later.",
    "The floor of {place} was cleaned at {hour} o'clock.",
    "{other} once worked as a {role} somewhere else, and says that {place} is better.",
    "For the anniversary in {month}, {n} guests are expected at {place}.",
    "The corridor smells of fresh paint, and {other} has opened {n} windows.",
)
_MOODS = ("grey", "quiet", "bright", "rainy", "cheerful", "cold", "sleepy", "stormy", "warm")


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """People, a place and its things; `world` groups the places."""

    who: str
    other: str
    role: str
    world: str
    place: str
    things: str

    def fields(self) -> dict[str, str]:
        """Return the template fields of this scene."""
        return {
            "who": self.who,
            "other": self.other,
            "role": self.role,
            "place": self.place,
            "things": self.things,
        }


def draw_scene(rng: Random) -> Scene:
    """Draw people and a place, each equally likely."""
    who, other = rng.sample(PEOPLE, 2)
    world = rng.choice(tuple(PLACES))
    place, things = rng.choice(PLACES[world])
    role = rng.choice(ROLES)
    return Scene(who=who, other=other, role=role, world=world, place=place, things=things)


def background(scene: Scene, rng: Random, num_sentences: int) -> list[str]:
    """Return sentences that no solution needs; neighbours never have the same template."""
    sentences: list[str] = []
    order: list[str] = []
    while len(sentences) < num_sentences:
        if not order:
            order = rng.sample(_BACKGROUND, len(_BACKGROUND))
        sentence = order.pop().format(
            **scene.fields(),
            n=rng.randint(3, 60),
            day=rng.choice(_DAYS),
            month=rng.choice(_MONTHS),
            mood=rng.choice(_MOODS),
            hour=rng.randint(6, 12),
        )
        sentences.append(sentence[0].upper() + sentence[1:])
    return sentences
