"""The tiled, distributed loss equals the naive one, whatever the recipe, tiling and world size."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pipeline import comm
from pipeline.config import (
    DistillationConfig,
    GuideConfig,
    LossConfig,
    ProjectionConfig,
    build_config,
)
from pipeline.errors import UserError
from pipeline.loss import tiles
from pipeline.loss.contrastive import contrastive_loss
from pipeline.loss.scores import segment_log_sum_exp
from pipeline.loss.targets import LossOutput
from tests.loss.reference import Case, make_case, naive_loss, relative_error
from tests.support import run_ranks

ROOMY = 2**20
THREE_ROWS = 4 * 101 * 3  # blocks of three queries against all 101 documents
TINY = 256  # tiles of 8 x 8, scored twice

RECIPES = {
    "in-batch": LossConfig(),
    "cold": LossConfig(temperature=0.01),
    "dot": LossConfig(similarity="dot", temperature=5),
    "own negatives": LossConfig(negatives="own"),
    "margin": LossConfig(false_negative_margin=-0.05),
    "own negatives, margin": LossConfig(negatives="own", false_negative_margin=-0.2),
    "symmetric": LossConfig(symmetric=True),
    "matryoshka": LossConfig(matryoshka_dims=(8, 16)),
    "learned temperature": LossConfig(learn_temperature=True, temperature=0.05),
    "distillation": LossConfig(distillation=DistillationConfig(weight=0.3, temperature=0.5)),
    "distillation only": LossConfig(distillation=DistillationConfig(weight=1.0)),
    "guide": LossConfig(guide=GuideConfig()),
    "guide, absolute margin": LossConfig(guide=GuideConfig(margin=0.2)),
    "guide, relative margin": LossConfig(
        symmetric=True, guide=GuideConfig(margin=0.05, margin_strategy="relative")
    ),
    "own negatives, guide": LossConfig(negatives="own", guide=GuideConfig(margin=0.1)),
    "distillation over the batch": LossConfig(
        distillation=DistillationConfig(documents="batch", temperature=0.05)
    ),
    "distillation over the batch only": LossConfig(
        negatives="own",
        temperature=0.01,
        distillation=DistillationConfig(documents="batch", weight=1.0, temperature=0.02),
    ),
    "guide and distillation over the batch": LossConfig(
        temperature=0.03,
        learn_temperature=True,
        symmetric=True,
        matryoshka_dims=(8, 16),
        false_negative_margin=0.02,
        guide=GuideConfig(margin=-0.1),
        distillation=DistillationConfig(documents="batch", temperature=0.1),
    ),
    "projection": LossConfig(projection=ProjectionConfig()),
    "projection, squared distance": LossConfig(
        negatives="own", projection=ProjectionConfig(distance="squared", weight=0.1)
    ),
    "projection of dot products": LossConfig(
        similarity="dot", temperature=5, projection=ProjectionConfig(distance="squared", weight=3)
    ),
    "projection with everything": LossConfig(
        symmetric=True,
        matryoshka_dims=(8, 16),
        learn_temperature=True,
        guide=GuideConfig(),
        distillation=DistillationConfig(documents="batch", temperature=0.1),
        projection=ProjectionConfig(weight=2),
    ),
    "all together": LossConfig(
        temperature=0.03,
        learn_temperature=True,
        symmetric=True,
        matryoshka_dims=(8, 16),
        false_negative_margin=0.02,
        distillation=DistillationConfig(),
    ),
}


@dataclasses.dataclass
class Share:
    """The inputs and results of one rank."""

    output: LossOutput
    queries: Tensor
    documents: Tensor


def loss_of_rank(case: Case, configs: list[LossConfig], score_bytes: int) -> list[Share]:
    """Each config's loss on this rank's uneven, unordered share of the batch."""
    g = torch.Generator().manual_seed(7)
    owner_N = torch.randint(comm.world_size(), (len(case.query),), generator=g)
    owner_M = torch.randint(comm.world_size(), (len(case.document),), generator=g)
    queries = torch.nonzero(owner_N == comm.rank())[:, 0].flip(0)
    documents = torch.nonzero(owner_M == comm.rank())[:, 0]
    return [
        Share(
            contrastive_loss(
                case.query[queries],
                case.document[documents],
                case.targets(queries, documents),
                config=config,
                temperature=config.temperature if config.learn_temperature else None,
                projection=None if config.projection is None else case.projection,
                score_bytes=score_bytes,
            ),
            queries,
            documents,
        )
        for config in configs
    ]


def assert_equal_to_naive(
    case: Case, config: LossConfig, shares: list[Share], tolerance: float = 1e-6
) -> None:
    expected = naive_loss(case, config)
    query_grad = torch.full_like(expected.query, torch.nan)
    document_grad = torch.full_like(expected.document, torch.nan)
    for share in shares:
        output = share.output
        assert float(output.loss) == pytest.approx(expected.loss, rel=tolerance)
        query_grad[share.queries] = output.query_grad.double()
        document_grad[share.documents] = output.document_grad.double()
        if config.learn_temperature:
            assert output.temperature_grad == pytest.approx(
                expected.temperature, rel=10 * tolerance
            )
        if expected.projection is not None:
            assert output.projection_grad is not None
            assert relative_error(output.projection_grad, expected.projection) < tolerance
    assert relative_error(query_grad, expected.query) < tolerance
    assert relative_error(document_grad, expected.document) < tolerance


@pytest.mark.parametrize(
    ("score_bytes", "columns"),
    [(TINY, 1024), (THREE_ROWS, 1024), (ROOMY, 1024), (ROOMY, 16)],
    ids=["tiles of 8 x 8", "three rows", "one tile", "kept tiles"],
)
@pytest.mark.parametrize("recipe", RECIPES)
def test_tiled_loss_equals_naive_loss(
    recipe: str, score_bytes: int, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Documents of a rank are more than a tile's columns wherever batches are large."""
    monkeypatch.setattr(tiles, "TILE_COLUMNS", columns)
    case, config = make_case(teacher=True), RECIPES[recipe]
    (share,) = loss_of_rank(case, [config], score_bytes)
    assert_equal_to_naive(case, config, [share])


def everything_on_ranks(case: Case) -> tuple[list[Share], list[Share]]:
    """One start of ranks for all recipes: starting them is what takes the time."""
    return loss_of_rank(case, list(RECIPES.values()), THREE_ROWS), loss_with_idle_rank(case)


RankResults = list[tuple[list[Share], list[Share]]]


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest) -> RankResults:
    """Return the results of each of so many ranks."""
    return run_ranks(request.param, everything_on_ranks, make_case(teacher=True))


@pytest.mark.parametrize("results", [2, 3], indirect=True)
@pytest.mark.parametrize("recipe", RECIPES)
def test_distributed_loss_equals_naive_loss(recipe: str, results: RankResults) -> None:
    number = list(RECIPES).index(recipe)
    shares = [spread[number] for spread, _ in results]
    assert_equal_to_naive(make_case(teacher=True), RECIPES[recipe], shares)


@pytest.mark.parametrize("results", [2, 3], indirect=True)
@pytest.mark.parametrize("number", [0, 1], ids=["one rank has all", "queries apart"])
def test_a_rank_without_rows_changes_nothing(number: int, results: RankResults) -> None:
    shares = [idle[number] for _, idle in results]
    assert_equal_to_naive(make_case(teacher=True), LossConfig(), shares)


def loss_with_idle_rank(case: Case) -> list[Share]:
    """Once all rows on rank 0; once queries on rank 0 and documents on rank 1."""
    everything = torch.arange(len(case.query)), torch.arange(len(case.document))
    nothing = torch.arange(0)
    results = []
    for query_owner, document_owner in ((0, 0), (0, 1)):
        queries = everything[0] if comm.rank() == query_owner else nothing
        documents = everything[1] if comm.rank() == document_owner else nothing
        output = contrastive_loss(
            case.query[queries],
            case.document[documents],
            case.targets(queries, documents),
            config=LossConfig(),
        )
        results.append(Share(output, queries, documents))
    return results


def whole_loss(case: Case, config: LossConfig) -> LossOutput:
    queries, documents = torch.arange(len(case.query)), torch.arange(len(case.document))
    targets = case.targets(queries, documents)
    return contrastive_loss(case.query, case.document, targets, config=config)


def test_the_worked_example_of_the_module_is_what_the_loss_computes() -> None:
    query = torch.tensor([[1, 0], [0, 1], [0.6, 0.8]])
    document = torch.tensor([[0.8, 0.6], [0, 1], [1, 0], [0.6, 0.8]])
    case = Case(query, document, [[0], [1], [3]], [[2], [], []], [[], [], [1]])
    output = whole_loss(case, LossConfig(temperature=0.5))
    score_grad = torch.tensor(
        [[-0.234, 0.020, 0.148, 0.066], [0.066, -0.186, 0.020, 0.099], [0.130, 0.0, 0.063, -0.193]]
    )
    assert float(output.loss) == pytest.approx(0.963, abs=5e-4)
    for rows, grad, got in (
        (query, score_grad @ document, output.query_grad),
        (document, score_grad.T @ query, output.document_grad),
    ):
        along = (grad * rows).sum(1, keepdim=True) * rows
        torch.testing.assert_close(got, (grad - along) / 0.5, atol=3e-3, rtol=0)


def one_positive_case(num_queries: int, num_negatives: int, width: int = 32) -> Case:
    """Documents as the published losses lay them out: all positives, then the negatives."""
    g = torch.Generator().manual_seed(3)
    num_documents = num_queries * (1 + num_negatives)
    return Case(
        torch.randn(num_queries, width, generator=g),
        torch.randn(num_documents, width, generator=g),
        [[i] for i in range(num_queries)],
        [
            [num_queries + i * num_negatives + n for n in range(num_negatives)]
            for i in range(num_queries)
        ],
        [[] for _ in range(num_queries)],
    )


def test_hard_negative_nll_as_published() -> None:
    """Cross-entropy of 50 cos(Q, [P; N]), label i in row i."""
    case = one_positive_case(24, 1)
    q, d = case.query.double().requires_grad_(), case.document.double().requires_grad_()
    score = 50 * F.normalize(q, dim=1) @ F.normalize(d, dim=1).T
    loss = F.cross_entropy(score, torch.arange(24))
    assert_matches(whole_loss(case, LossConfig(temperature=1 / 50)), loss, q, d)


def test_repllama_as_published() -> None:
    """Cross-entropy over [positive, its 15 negatives] of the raw dot product over the width."""
    case = one_positive_case(6, 15)
    q, d = case.query.double().requires_grad_(), case.document.double().requires_grad_()
    listed = torch.tensor([p + n for p, n in zip(case.positives, case.negatives, strict=True)])
    score = (d[listed] @ q[:, :, None])[:, :, 0] / q.shape[1]
    loss = F.cross_entropy(score, torch.zeros(6, dtype=torch.int64))
    config = LossConfig(similarity="scaled_dot", temperature=1, negatives="own")
    assert_matches(whole_loss(case, config), loss, q, d)


def assert_matches(
    output: LossOutput, loss: Tensor, query: Tensor, document: Tensor, tolerance: float = 1e-6
) -> None:
    query_grad, document_grad = torch.autograd.grad(loss, (query, document))
    assert float(output.loss) == pytest.approx(loss.item(), rel=1e-6)
    assert relative_error(output.query_grad, query_grad) < tolerance
    assert relative_error(output.document_grad, document_grad) < tolerance


def clustered(kind: str, num_rows: int, width: int = 384) -> tuple[Tensor, Tensor]:
    """Unit queries and documents whose similarities are like an untrained or a trained model's."""
    g = torch.Generator().manual_seed(0)

    def noise(rows: int) -> Tensor:
        return torch.randn(rows, width, generator=g) / width**0.5

    shared = noise(1)
    if kind == "isotropic":
        query = noise(num_rows)
        document = noise(num_rows) + 0.3 * query
    elif kind == "narrow cone":
        query = noise(num_rows) + 3 * shared
        document = noise(num_rows) + 0.3 * query + 2 * shared
    else:
        topic = noise(num_rows // 32).repeat_interleave(32, 0)
        query = topic + 0.5 * noise(num_rows) + 0.5 * shared
        document = topic + 0.5 * noise(num_rows) + 0.8 * query
    return F.normalize(query, dim=1), F.normalize(document, dim=1)


@pytest.mark.parametrize("temperature", [0.01, 0.02])
@pytest.mark.parametrize("kind", ["isotropic", "narrow cone", "topics"])
def test_embedding_gradients_of_many_documents_are_those_of_float64(
    kind: str, temperature: float
) -> None:
    rows = list(range(1024))
    case = Case(*clustered(kind, 1024), [[i] for i in rows], [[] for _ in rows], [[] for _ in rows])
    q, d = case.query.double().requires_grad_(), case.document.double().requires_grad_()
    score = F.normalize(q, dim=1) @ F.normalize(d, dim=1).T / temperature
    loss = F.cross_entropy(score, torch.arange(1024))
    # 0.6e-6 on most processors; float32 matrix products of some sum in an order that costs twice
    # as much.
    output = whole_loss(case, LossConfig(temperature=temperature))
    assert_matches(output, loss, q, d, tolerance=2e-6)


def test_a_vector_of_zeros_spoils_no_other_gradient() -> None:
    case = make_case()
    case.query[3] = 0
    output, expected = whole_loss(case, LossConfig()), naive_loss(case, LossConfig())
    others = torch.arange(len(case.query)) != 3
    assert float(output.loss) == pytest.approx(expected.loss, rel=1e-6)
    assert relative_error(output.query_grad[others], expected.query[others]) < 1e-6
    assert relative_error(output.document_grad, expected.document) < 1e-6


def test_sums_of_exponentials_hold_scores_beyond_the_range_of_exp() -> None:
    score = torch.tensor([3000.0, 2999.0, -5000.0], dtype=torch.float64)
    row = torch.tensor([0, 0, 2])
    wanted = [score[:2].logsumexp(0), -torch.inf, score[2]]
    torch.testing.assert_close(segment_log_sum_exp(score, row, 3), torch.tensor(wanted).double())


def test_query_without_any_negative_costs_nothing() -> None:
    case = Case(torch.randn(1, 4), torch.randn(1, 4), [[0]], [[]], [[]])
    for config in (LossConfig(), LossConfig(negatives="own"), LossConfig(symmetric=True)):
        output = whole_loss(case, config)
        assert float(output.loss) == 0
        assert not output.query_grad.any()
        assert not output.document_grad.any()


def test_accuracy_counts_queries_whose_best_positive_beats_every_negative() -> None:
    query = torch.eye(3)
    document = torch.tensor([[1.0, 0, 0], [0, 1.0, 0], [1.0, 0, 0.1]])
    case = Case(query, document, [[0], [1], [2]], [[], [], []], [[], [], []])
    metrics = whole_loss(case, LossConfig()).metrics
    assert metrics["accuracy@1"] == pytest.approx(1.0)
    cosine = F.cosine_similarity(query, document).mean().item()
    assert metrics["positive_similarity"] == pytest.approx(cosine)
    case.positives[2] = [1]
    assert whole_loss(case, LossConfig()).metrics["accuracy@1"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("negatives", ["batch", "own"])
def test_the_guide_leaves_out_the_documents_that_the_teacher_holds_closer(negatives: Any) -> None:
    case, margin = make_case(teacher=True), 0.2
    cosine_NM = case.teacher_cosines()
    expected = 0
    for i, positives in enumerate(case.positives):
        own = case.negatives[i] if negatives == "own" else range(len(case.document))
        others = [j for j in own if j not in {*positives, *case.masked[i]}]
        ceiling = cosine_NM[i, positives].max() - margin
        expected += int((cosine_NM[i, others] > ceiling).sum())
    config = LossConfig(negatives=negatives, guide=GuideConfig(margin=margin))
    metrics = whole_loss(case, config).metrics
    assert expected > 10
    assert metrics["guided_per_query"] == pytest.approx(expected / len(case.query))


@pytest.mark.parametrize("temperature", [0.01, 0.05])
def test_gradients_of_distillation_over_many_documents_are_those_of_float64(
    temperature: float,
) -> None:
    rows = list(range(1024))
    case = Case(*clustered("topics", 1024), [[i] for i in rows], [[]] * 1024, [[]] * 1024)
    case.vectors = clustered("narrow cone", 1024, width=48)
    config = LossConfig(
        temperature=0.02,
        distillation=DistillationConfig(documents="batch", weight=1, temperature=temperature),
    )
    q, d = case.query.double().requires_grad_(), case.document.double().requires_grad_()
    score = F.normalize(q, dim=1) @ F.normalize(d, dim=1).T / 0.02
    teacher = (case.teacher_cosines() / temperature).softmax(1)
    loss = F.kl_div(score.log_softmax(1), teacher, reduction="batchmean")
    assert_matches(whole_loss(case, config), loss, q, d, tolerance=2e-6)


class SeenPrecisions(TorchFunctionMode):
    """Notes the precision in force at every matrix product; a CPU has no TF32 that would show."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_function__(self, function, types, args=(), kwargs=None) -> Any:
        if function is torch.mm:
            self.seen.add(torch.get_float32_matmul_precision())
        return function(*args, **(kwargs or {}))


def test_loss_does_not_depend_on_the_callers_matmul_precision_or_autocast() -> None:
    case = make_case()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with SeenPrecisions() as precisions:
            expected = whole_loss(case, LossConfig())
        after = torch.get_float32_matmul_precision()
    finally:
        torch.set_float32_matmul_precision(before)
    assert (precisions.seen, after) == ({"highest"}, "medium")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(whole_loss(case, LossConfig()).query_grad, expected.query_grad)


def test_matryoshka_width_that_is_no_prefix_is_refused() -> None:
    with pytest.raises(UserError, match=r"loss\.matryoshka_dims: 24 .*below .*24"):
        whole_loss(make_case(), LossConfig(matryoshka_dims=(8, 24)))


def test_distillation_without_teacher_scores_is_refused() -> None:
    with pytest.raises(UserError, match="no teacher scores"):
        whole_loss(make_case(), LossConfig(distillation=DistillationConfig()))


@pytest.mark.parametrize(
    ("config", "key"),
    [
        (LossConfig(guide=GuideConfig()), r"loss\.guide"),
        (
            LossConfig(distillation=DistillationConfig(documents="batch")),
            r"loss\.distillation\.documents",
        ),
    ],
)
def test_a_term_of_a_teacher_without_its_vectors_is_refused(config: LossConfig, key: str) -> None:
    with pytest.raises(UserError, match=f"{key} .* holds no teacher vectors .*diffembed mine"):
        whole_loss(make_case(), config)


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"symmetric": True, "negatives": "own"}, "loss.symmetric"),
        ({"matryoshka_dims": (64, 32)}, "loss.matryoshka_dims"),
    ],
)
def test_impossible_recipe_is_refused_when_it_is_built(keys: dict, named: str) -> None:
    with pytest.raises(UserError, match=named):
        LossConfig(**keys)


def test_a_temperature_of_zero_is_refused_when_a_config_is_read() -> None:
    with pytest.raises(UserError, match="temperature"):
        build_config(LossConfig, {"temperature": 0.0}, origin="loss")
