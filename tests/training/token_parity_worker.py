"""One rank of the token-prediction matrix: the real engine against transformers in one process.

Started by test_token_gradients.py through a launcher; prints one JSON line per case on rank 0.
The reference knows no packing, chunks, tiles or ranks: `*ForCausalLM` on one row after another.
Next-token cases first break two steps off, which must leave nothing behind.
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import peft
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from pipeline import comm
from pipeline.config import (
    DataConfig,
    LoraConfig,
    MaskedDiffusionConfig,
    MntpConfig,
    ModelConfig,
    NextTokenConfig,
    ObjectiveConfig,
    TrainConfig,
)
from pipeline.data.batch import Chunk, GlobalBatch
from pipeline.data.loader import DUMMY
from pipeline.data.text_loader import NOTHING, Prediction, Vocabulary, predict
from pipeline.launch import discover_world
from pipeline.model.encoder import LanguageModel, build_language_model
from pipeline.training import token_step
from pipeline.training.ds_config import resolve_ds_config
from pipeline.training.engine import ChunkOutOfMemoryError, NonFiniteLossError, build_optimizer
from pipeline.training.zero import ZeroEngine
from tests.support import PATIENCE
from tests.training.exactness import gradient_errors, wake_adapters

NUM_TEXTS, VOCABULARY, MASK = 14, 500, 499
SEED, STEP = 7, 3
OBJECTIVES = {
    "mntp": (ObjectiveConfig(mntp=MntpConfig()), "bidirectional", True),
    "mntp, causal": (ObjectiveConfig(mntp=MntpConfig(replace="all")), "causal", True),
    "diffusion": (
        ObjectiveConfig(masked_diffusion=MaskedDiffusionConfig(shift=False)),
        "bidirectional",
        False,
    ),
    "diffusion, shifted": (
        ObjectiveConfig(masked_diffusion=MaskedDiffusionConfig()),
        "bidirectional",
        True,
    ),
    "next token": (ObjectiveConfig(next_token=NextTokenConfig()), "causal", True),
}


def make_texts() -> list[Any]:
    """Texts of 1 to 24 tokens, each twice in a row, which a model with a tied head gets right.

    The first has a single token, which nothing precedes.
    """
    rng = np.random.default_rng(0)
    lengths = [1, *rng.integers(2, 25, size=NUM_TEXTS - 1)]
    return [rng.integers(2, VOCABULARY - 1, size=length).repeat(2)[:length] for length in lengths]


def make_chunk(texts: list[Any], chosen: Any) -> Chunk:
    return Chunk(
        input_ids=np.concatenate([texts[i] for i in chosen]).astype(np.int64),
        lengths=np.array([len(texts[i]) for i in chosen], dtype=np.int64),
        texts=np.array(chosen, dtype=np.int64),
    )


def make_batch(rank: int, counts: list[int]) -> GlobalBatch:
    """Texts dealt to ranks; rank r cuts its own into counts[r] chunks, dummies fill up."""
    texts = make_texts()
    mine = np.random.default_rng(1).permutation(NUM_TEXTS)[rank :: len(counts)]
    chunks = [make_chunk(texts, part) for part in np.array_split(mine, counts[rank])]
    return GlobalBatch(
        step=STEP,
        num_queries=0,
        num_documents=NUM_TEXTS,
        chunks=(*chunks, *[DUMMY] * (max(counts) - counts[rank])),
        positives=NOTHING,
        negatives=NOTHING,
        masked=NOTHING,
        example_ids=100 + np.arange(NUM_TEXTS),
        tokens=sum(map(len, texts)),
    )


def reference_loss(
    model: Any, objective: ObjectiveConfig, prediction: Prediction
) -> tuple[torch.Tensor, float]:
    """The loss by its definition, from whole rows of logits, and the share of right answers."""
    lengths = [len(text) for text in make_texts()]
    rows = torch.from_numpy(prediction.input_ids).split(lengths)
    logits = torch.cat([model(input_ids=row[None]).logits[0] for row in rows])
    asked, labels = logits[prediction.states], torch.from_numpy(prediction.labels)
    accuracy = float((asked.argmax(dim=1) == labels).double().mean())
    if objective.masked_diffusion is None:
        return F.cross_entropy(asked, labels), accuracy
    losses = F.cross_entropy(asked, labels, reduction="none")
    num_rows = NUM_TEXTS - 1 if prediction.total == NUM_TEXTS - 1 else NUM_TEXTS
    return (losses * torch.from_numpy(prediction.weights)).sum() / num_rows, accuracy


def reference_gradients(
    path: str, objective: ObjectiveConfig, prediction: Prediction, ours: Any, model: ModelConfig
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Loss, accuracy and gradients of the plain model, under our names."""
    plain: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    plain.config.is_causal = model.attention == "causal"
    if model.lora is not None:
        targets = list(model.lora.targets)
        plain = peft.get_peft_model(
            plain, peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules=targets)
        )
        fresh = {our_name(name): parameter for name, parameter in plain.named_parameters()}
        with torch.no_grad():
            for name, parameter in ours.named_parameters():
                if "lora_" in name:
                    fresh[name].copy_(parameter)
    loss, accuracy = reference_loss(plain, objective, prediction)
    loss.backward()
    return {"reference_loss": loss.item(), "reference_accuracy": accuracy}, {
        our_name(n): p.grad.clone() for n, p in plain.named_parameters() if p.grad is not None
    }


def our_name(name: str) -> str:
    """`model.layers...` of the plain model, possibly in peft's wrapper, in our names."""
    if name.startswith("base_model.model."):
        return "backbone.base_model.model." + name.removeprefix("base_model.model.model.")
    return "backbone." + name.removeprefix("model.") if name.startswith("model.") else name


def break_off(
    step: Any, engine: Any, batch: GlobalBatch, fault: float | None, error: type[Exception]
) -> None:
    """A step in which rank 1 alone scores NaN, or lacks memory; all ranks must leave it."""
    scores = LanguageModel.logits

    def faulty(self: LanguageModel, hidden: torch.Tensor) -> torch.Tensor:
        if comm.rank() == 1 and fault is None:
            raise torch.OutOfMemoryError
        return scores(self, hidden) * (1.0 if fault is None or comm.rank() == 0 else fault)

    LanguageModel.logits = faulty  # type: ignore[method-assign]
    try:
        step.accumulate(engine, batch)
    except error:
        return
    finally:
        LanguageModel.logits = scores  # type: ignore[method-assign]
    raise AssertionError(f"no {error.__name__} on rank {comm.rank()}")


def run_case(
    path: str, *, kind: str, stage: int, counts: list[int], lora: bool, schedule: str
) -> dict[str, Any]:
    """Return the worst relative error over all parameters, and both losses."""
    objective, attention, shift = OBJECTIVES[kind]
    model = ModelConfig(
        path=path,
        dtype="float32",
        attention=attention,  # type: ignore[arg-type]
        gradient_checkpointing=kind == "mntp, causal",
        lora=LoraConfig(rank=4, alpha=8, dropout=0.0) if lora else None,
    )
    config = TrainConfig(
        output_dir=Path("unused"),
        seed=SEED,
        num_steps=1,
        schedule=schedule,  # type: ignore[arg-type]
        model=model,
        objective=objective,
        data=DataConfig(path=Path("unused")),
    )
    torch.manual_seed(0)
    ours = build_language_model(model).train()
    wake_adapters(ours)
    whole = predict(
        make_chunk(make_texts(), range(NUM_TEXTS)),
        objective,
        Vocabulary(size=VOCABULARY, mask=MASK),
        text_ids=100 + np.arange(NUM_TEXTS),
        shift=shift,
        seed=SEED,
        step=STEP,
    )
    expected, wanted = reference_gradients(path, objective, whole, ours, model)
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
    ds_config = resolve_ds_config({"zero_optimization": zero}, config, world_size=comm.world_size())
    engine = ZeroEngine(ours, build_optimizer(ours, config.optimizer), ds_config)
    vocabulary = SimpleNamespace(tokenizer=SimpleNamespace(vocab_size=VOCABULARY))
    step = token_step.TokenPrediction(config, vocabulary)  # type: ignore[arg-type]
    if kind == "next token":
        faults = [(float("nan"), NonFiniteLossError), (None, ChunkOutOfMemoryError)]
        for fault, error in faults[: 1 if schedule == "sweep" else 2]:
            break_off(step, engine, make_batch(comm.rank(), counts), fault, error)
    values = step.accumulate(engine, make_batch(comm.rank(), counts))
    errors = gradient_errors(engine, wanted)
    engine.step(1e-4)
    engine.close()
    worst = max(errors, key=lambda name: errors[name])
    return {"error": errors[worst], "worst": worst, **values, **expected}


def list_cases(world_size: int) -> dict[str, dict[str, Any]]:
    """Return the arguments of `run_case` by the name of each case, with "tied" for the path."""
    cases = [
        ("mntp", [1, 1], False, "cache", False),
        ("mntp, causal", [3, 5], True, "cache", False),
        ("diffusion", [3, 5], False, "cache", True),
        ("diffusion", [3, 5], False, "sweep", False),
        ("diffusion, shifted", [2, 2], True, "sweep", True),
        ("next token", [3, 5], False, "cache", True),
    ]
    if world_size == 3:
        cases = [
            ("diffusion", [2, 3, 1], False, "sweep", False),
            ("next token", [1, 2, 2], False, "sweep", True),
        ]
    keys = ("kind", "counts", "lora", "schedule", "tied")
    return {
        f"{case[0]}, {case[3]}, zero{stage}": {**dict(zip(keys, case, strict=True)), "stage": stage}
        for stage, case in itertools.product((1, 2, 3), cases)
    }


def main() -> None:
    untied, tied = sys.argv[1:]
    torch.set_num_threads(1)
    comm.start(discover_world(), timeout_seconds=PATIENCE)
    # A tile of three predictions: every chunk needs several.
    token_step.TOKEN_TILE_BYTES["cpu"] = 3 * 16 * VOCABULARY
    token_step.find_mask_token = lambda *_: MASK  # type: ignore[assignment]
    token_step.load_model_tokenizer = lambda _: SimpleNamespace(all_special_ids=())
    paths = {False: untied, True: tied}
    for name, case in list_cases(comm.world_size()).items():
        result = run_case(paths[case.pop("tied")], **case)
        if comm.rank() == 0:
            print(json.dumps({"case": name, **result}), flush=True)
    comm.leave(0, gracefully=True)


if __name__ == "__main__":
    main()
