"""Errors of an engine's gradients, adapters that have any, and whole states."""

from __future__ import annotations

import torch

from pipeline.training.zero import ZeroEngine


def wake_adapters(model: torch.nn.Module) -> None:
    """Give fresh adapters weights: their B is zero, and so would be the gradient of A."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)


def gradient_errors(engine: ZeroEngine, wanted: dict[str, torch.Tensor]) -> dict[str, float]:
    """By parameter, the largest difference over the largest value; a collective call."""
    assert set(engine.parameter_names) == set(wanted), set(engine.parameter_names) ^ set(wanted)
    errors = {}
    for name in engine.parameter_names:
        difference = (engine.full_gradient(name) - wanted[name]).abs().max()
        errors[name] = float(difference / wanted[name].abs().max())
    return errors


def whole_state(engine: ZeroEngine, name: str) -> dict[str, torch.Tensor]:
    """Return a parameter's whole fp32 weight and moments by DeepSpeed's own getters; collective."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    parameter = engine._parameters[name]
    weight = safe_get_full_fp32_param(parameter)
    moments = {
        key: safe_get_full_optimizer_state(parameter, key)
        if engine.optimizer_steps
        else torch.zeros_like(weight)
        for key in ("exp_avg", "exp_avg_sq")
    }
    return {"weight": weight, **moments}
