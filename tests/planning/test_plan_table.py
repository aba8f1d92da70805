"""Tables in documents agree with the present formulas, and state what they claim."""

from __future__ import annotations

from tests.planning import one_gpu_plans, plan_table, recipe_hours


def test_the_page_has_the_tables_of_these_formulas() -> None:
    page = plan_table.PAGE.read_text()

    assert plan_table.written(page) == page, "run python -m tests.planning.plan_table"


def test_the_recipes_for_one_gpu_fit_and_show_their_plans() -> None:
    page = one_gpu_plans.PAGE.read_text()

    # A recipe that does not fit raises.
    assert one_gpu_plans.written(page) == page, "run python -m tests.planning.one_gpu_plans"


def test_the_guide_of_recipes_has_the_hours_of_these_formulas() -> None:
    page = recipe_hours.PAGE.read_text()

    assert recipe_hours.written(page) == page, "run python -m tests.planning.recipe_hours"


def test_all_weights_of_70b_train_on_64_gpus_of_80_gb_with_room() -> None:
    head, *rows = plan_table.memory_rows()
    found = [dict(zip(head, row, strict=True)) for row in rows]
    large = [
        row
        for row in found
        if row["model"] in ("Llama-3.1-70B", "Qwen2.5-72B") and row["trained"] == "all"
    ]
    assert {row["tokens a GPU"] for row in large} >= {"8,192"}
    for row in large:
        assert (row["GPUs"], row["schedule"]) == ("64", "sweep")
        assert float(row["free"]) > 10
