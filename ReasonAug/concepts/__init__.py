"""List all concepts, in a fixed order."""

from __future__ import annotations

from ReasonAug.concepts import (
    algorithm_graphs,
    algorithm_search,
    algorithm_sequences,
    finance_markets,
    finance_value,
    math_counting,
    math_numbers,
    physics_charge,
    physics_matter,
    physics_waves,
    structure_linear,
    structure_trees,
)
from ReasonAug.problem import Concept

FAMILIES = (
    algorithm_sequences,
    algorithm_search,
    algorithm_graphs,
    structure_linear,
    structure_trees,
    math_numbers,
    math_counting,
    physics_waves,
    physics_matter,
    physics_charge,
    finance_value,
    finance_markets,
)

CONCEPTS: tuple[Concept, ...] = tuple(concept for family in FAMILIES for concept in family.CONCEPTS)
