"""Weights that an embedder leaves out, but that every reader of its architecture looks for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel

from pipeline.config import ModelConfig
from pipeline.model.families import Family
from pipeline.model.weights import WeightFiles


def unused_weights(model: Any, family: Family, config: ModelConfig) -> dict[str, Tensor]:
    """Return what a whole model of this architecture holds and ours does not, by native name.

    The pooler of BERT and its kin, as the base model has it; zeros where the base has none.
    Without it every load would warn of a model that is not whole.

    Args:
        model: the Hugging Face model that was trained.
        family: how it was taken apart.
        config: the model section it was built from.
    """
    if not family.arguments:
        return {}  # nothing was left out
    with torch.device("meta"):
        whole = AutoModel.from_config(model.config, trust_remote_code=False)
    shapes = {name: tensor.shape for name, tensor in whole.state_dict().items()}
    files = WeightFiles(config.path, config.revision)
    found = {}
    for name in shapes.keys() - model.state_dict().keys():
        published = [name, f"{whole.base_model_prefix}.{name}"]
        source = next((key for key in published if files.shapes.get(key) == shapes[name]), None)
        if source is None:
            found[name] = torch.zeros(shapes[name], dtype=model.dtype)
        else:
            with files.slices([source]) as slices:
                found[name] = slices[source][:].to(model.dtype)
    return found
