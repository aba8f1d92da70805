"""The DeepSpeed engine at ZeRO stage 1, 2 or 3: cached chunks in, exact sharded gradients out.

    one step   hold (gather) -> embed ... backward (fp32 sums) -> reduce ... finish -> step(lr)
    state      a parameter's fp32 master and moments by rank, stage 3:
               [ rank 0 | rank 1 | rank 2 + padding ]    equal shares, padded with zeros

DeepSpeed's own hooks decide per micro-batch; one optimizer step here has many backwards and reduces
each gradient once, so they are removed, and `hold` and `accumulation` take these decisions.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from pipeline import comm
from pipeline.model.weights import Placement
from pipeline.training.checkpoints import KEYS, MOMENTS, equal_share
from pipeline.training.collectives import Gathering, Reduction


def import_deepspeed() -> Any:
    """Import DeepSpeed without compilation and log lines."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # DeepSpeed calls functions that newer torch versions deprecate: every rank would print it.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    import deepspeed

    # DeepSpeed would compile a shared-memory collective at start-up that only inference uses;
    # a machine without a compiler could not start.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # It would import torch's compiler, two seconds of CPU on every rank, to decorate an optimizer
    # that we never use (Muon).
    deepspeed.runtime.compiler.compile = lambda: lambda function: function
    deepspeed.utils.logger.setLevel(logging.ERROR)
    return deepspeed


def join_deepspeed() -> Any:
    """Import DeepSpeed, let it use the process group, and give its own groups our timeout."""
    deepspeed = import_deepspeed()
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    deepspeed.comm.comm.cdb.new_group = comm.new_group
    return deepspeed


class Partitions(Placement):
    """Weights become ZeRO-3 partitions piece by piece, so that no rank ever holds a whole model.

    Rank 0 reads; DeepSpeed hands every piece from there to all ranks as it cuts it up.

    Args:
        ds_config: a DeepSpeed config of stage 3 with every `auto` resolved.
    """

    by_piece = True

    def __init__(self, ds_config: dict[str, Any]) -> None:
        super().__init__(comm.device(), together=comm.together)
        self.reads = comm.rank() == 0
        self._deepspeed = join_deepspeed()
        self._ds_config = ds_config
        self._partitioned: Any = None

    def take(self, parameters: list[torch.nn.Parameter]) -> None:
        """Keep this rank's partitions of rank 0's weights; a collective call."""
        from deepspeed.utils import groups

        # `Init` gives its parameters the methods by which the later pieces are cut up too.
        if self._partitioned is None:
            self._deepspeed.zero.Init(
                module=torch.nn.ParameterList(parameters),
                config_dict_or_path=self._ds_config,
                # hpZ's group, if an engine of this process has made it.
                zero_param_parallel_group=groups._get_zero_param_intra_parallel_group(),
            )
            self._partitioned = parameters[0]
        else:
            self._partitioned.convert_to_zero_parameters(param_list=parameters)


def placement_of(ds_config: dict[str, Any]) -> Placement:
    """Return the form of weights that a ZeRO stage needs: partitions, or whole on every rank."""
    if ds_config["zero_optimization"]["stage"] == 3:
        return Partitions(ds_config)
    return Placement(comm.device(), together=comm.together)


class ZeroEngine:
    """One DeepSpeed engine at ZeRO stage 1, 2 or 3 around an encoder.

    Args:
        model: the encoder, whole or partitioned; `optimizer` has its trainable parameters.
        optimizer: a torch optimizer over the trainable parameters.
        ds_config: a DeepSpeed config with every `auto` resolved.
    """

    def __init__(
        self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, ds_config: dict[str, Any]
    ) -> None:
        deepspeed = join_deepspeed()
        # Names before the engine wraps the model; shared parameters appear once.
        self._parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        if ds_config["bf16"]["enabled"] and any(hasattr(p, "ds_id") for p in model.parameters()):
            # peft keeps adapters in fp32. DeepSpeed casts a model that is whole, and refuses one
            # that is partitioned.
            for parameter in self._parameters.values():
                parameter.data = parameter.data.to(torch.bfloat16)
        self._engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config)
        self._engine.train()
        self.stage: int = self._engine.zero_optimization_stage()
        if self.stage == 3:
            _remove_module_hooks(self._engine)
        self._gathering = Gathering()
        self._reduction = Reduction(self._engine.optimizer, self.stage)
        self._moments_linked = False

    def embed(
        self,
        input_ids: torch.Tensor,
        lengths: torch.Tensor,
        instruction_tokens: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Embed one packed chunk: (T,) token ids and (C,) row lengths to (C, E) vectors.

        At ZeRO-3 only inside of `hold`. Skips the engine's hooks, whose purposes (accumulate or
        overwrite, gather, prefetch) belong to `accumulation` and `hold`.
        """
        out: torch.Tensor = self._engine.module.forward(input_ids, lengths, instruction_tokens)
        return out

    @property
    def encoder(self) -> Any:
        """The model itself, for schedules that call its layers one by one."""
        return self._engine.module

    def hold(self, parameters: list[Any]) -> AbstractContextManager[None]:
        """Keep ZeRO-3 parameters whole until the context ends; a collective call."""
        return self._gathering.hold(parameters)

    def prefetch(self, parameters: list[Any]) -> None:
        """Start to gather what the next `hold` asks for, without waiting; a collective call."""
        self._gathering.prefetch(parameters)

    @contextmanager
    def accumulation(self) -> Iterator[None]:
        """Every backward of one optimizer step goes inside; gradients are reduced on exit.

        Those that `reduce` was given are reduced already. DeepSpeed's `grad_accum_dtype` applies
        from the reduction on; before it, chunks add up in fp32.
        """
        self._reduction.open()
        # Not on an error: the other ranks are elsewhere, and would never join a reduction.
        yield
        self._reduction.finish()

    def backward(self, surrogate: torch.Tensor) -> None:
        """Accumulate the gradients of a scalar.

        Ranks are averaged while each rank holds its own share of the sum: the caller has to
        multiply the loss's gradient by the world size, once.
        """
        surrogate.backward()  # type: ignore[no-untyped-call]

    def reduce(self, parameters: list[Any]) -> None:
        """Reduce gradients that are complete, so that this rank keeps its share; collective."""
        self._reduction.reduce(parameters)

    def fill_gradients(self, parameters: list[Any]) -> None:
        """Give parameters gradients of zeros where they have none.

        For a rank whose backward failed, in the step of others that will reduce theirs.
        """
        self._reduction.fill(parameters)

    def discard(self) -> None:
        """Drop the gradients of an accumulation that an exception ended; called on all ranks."""
        self._reduction.discard()
        self._gathering.discard(self.encoder.parameters())

    def step(self, lr: float) -> float:
        """Clip, update, and clear the gradients; return their global norm before clipping.

        Where the norm is not finite, nothing is updated.
        """
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        self._engine.step()
        # The optimizer makes its moments in its first update.
        self._link_moments()
        return float(self._engine.get_global_grad_norm())

    def _link_moments(self) -> None:
        """Let every parameter find its moments in ZeRO-1/2's flat partitions.

        DeepSpeed links after the first parameter group's first update, when the other groups have
        no moments yet, and never again.
        """
        # No moments yet where the first updates were left out.
        if self.stage < 3 and self._has_moments and not self._moments_linked:
            zero = self._engine.optimizer
            zero._hp_optimizer_states_linked = False
            zero._lazy_init_hp_params_optimizer_state()
            self._moments_linked = True

    def full_gradient(self, name: str) -> torch.Tensor:
        """Return the whole averaged gradient of a parameter, fp32; collective, before `step`."""
        from deepspeed.utils import safe_get_full_grad

        gradient: torch.Tensor = safe_get_full_grad(self._parameters[name])
        return gradient.float()

    @property
    def parameter_names(self) -> list[str]:
        """Names of the trainable parameters, in the model's order."""
        return list(self._parameters)

    @property
    def optimizer_steps(self) -> int:
        """The number of updates that the optimizer has made."""
        zero = self._engine.optimizer
        state = zero.optimizer.state.get(self._flat_partitions()[0], {})
        # Not DeepSpeed's own count, which also counts updates that it skipped.
        return int(state["step"]) if "step" in state else 0

    def weights_are_finite(self) -> bool:
        """Check that all trained weights of all ranks are finite; a collective call."""
        finite = all(bool(torch.isfinite(part).all()) for part in self._flat_partitions())
        return not comm.any_rank(not finite)

    @property
    def _has_moments(self) -> bool:
        """True once the optimizer has made its state, at its first update."""
        state = self._engine.optimizer.optimizer.state
        return MOMENTS[0] in state.get(self._flat_partitions()[0], {})

    def _flat_partitions(self) -> list[torch.Tensor]:
        """Return this rank's fp32 master partitions, the keys of the optimizer's state."""
        zero = self._engine.optimizer
        partitions: list[torch.Tensor] = (
            zero.fp32_partitioned_groups_flat
            if self.stage == 3
            else zero.single_partition_of_fp32_groups
        )
        return partitions

    def share_state(self, name: str) -> dict[str, torch.Tensor]:
        """Return this rank's elements of a parameter's fp32 weight and moments, see `share_of`.

        They may be views, which the next update changes. Moments are zeros before the first update.
        """
        parameter, count = self._parameters[name], len(self.share_of(name))
        state = {"weight": self._share(parameter, "weight")[:count]}
        for moment in MOMENTS:
            state[moment] = (
                self._share(parameter, moment)[:count]
                if self._has_moments
                else torch.zeros_like(state["weight"])
            )
        return state

    def _share(self, parameter: Any, key: str) -> torch.Tensor:
        """Return this rank's elements of a master weight or moment, at stage 3 with its padding."""
        from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

        values: torch.Tensor
        if self.stage < 3:
            if parameter._hp_mapping is None:
                return torch.empty(0, device=comm.device())
            values = parameter._hp_mapping.get_hp_fragment(None if key == "weight" else key)
        elif key == "weight":
            values = safe_get_local_fp32_param(parameter)
        else:
            values = safe_get_local_optimizer_state(parameter, key)
        return values.detach().to(comm.device())

    def prepare_restore(self, optimizer_steps: int) -> None:
        """Create the optimizer's state, empty, as after `optimizer_steps` updates."""
        zero = self._engine.optimizer
        for partition in self._flat_partitions():
            state = zero.optimizer.state[partition]
            # Where fused AdamW keeps it.
            state["step"] = torch.tensor(float(optimizer_steps), device=partition.device)
            for moment in MOMENTS:
                state[moment] = torch.zeros_like(partition)
        self._link_moments()

    def shape_of(self, name: str) -> tuple[int, ...]:
        """Return the shape of a whole parameter."""
        parameter = self._parameters[name]
        return tuple(getattr(parameter, "ds_shape", parameter.shape))

    def share_of(self, name: str) -> range:
        """Return the flat elements of a parameter whose master and moments this rank keeps."""
        parameter: Any = self._parameters[name]
        if self.stage == 3:
            share = parameter.ds_tensor.ds_numel
            return equal_share(parameter.ds_numel, rank=comm.rank(), share=share)
        if parameter._hp_mapping is None:  # wholly in other ranks' partitions
            return range(0)
        address = parameter._hp_mapping.lp_fragment_address
        return range(address.start, address.start + address.numel)

    def restore_state(self, name: str, share: dict[str, torch.Tensor]) -> None:
        """Set this rank's elements of a parameter's master and moments.

        Args:
            name: of the parameter.
            share: `weight` and moments, each the flat elements of `share_of`.
        """
        parameter: Any = self._parameters[name]
        for key in KEYS:
            self._set_share(parameter, key, share[key].to(comm.device()))
        if self.stage == 3:
            # The working copy is rounded from the master, which rounding must not touch.
            parameter.ds_tensor.data.copy_(padded(share["weight"], parameter.ds_tensor.ds_numel))

    def finish_restore(self) -> None:
        """Bring the working copies up to date with the masters, as after an update; collective."""
        zero = self._engine.optimizer
        if self.stage < 3:
            zero.update_lp_params()
            return
        # Parameters that stay whole on every rank still have the values from before: the epilogue
        # gathers them again, and drops hpZ's second copies, which the next gather makes.
        for parameter in zero.persistent_parameters:
            parameter.partition()
        zero.checkpoint_event_epilogue()

    def _set_share(self, parameter: Any, key: str, values: torch.Tensor) -> None:
        """Set this rank's elements of a master weight or moment.

        DeepSpeed's setters of whole values forget the padding of ZeRO-3's partitions: they fail
        wherever the ranks do not divide a parameter.
        """
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        if self.stage < 3:
            if len(values):
                moment = None if key == "weight" else key
                parameter._hp_mapping.get_hp_fragment(moment).data.copy_(values)
            return
        values = padded(values, parameter.ds_tensor.ds_numel)
        if key == "weight":
            safe_set_local_fp32_param(parameter, values)
        else:
            safe_set_local_optimizer_state(parameter, values, key)

    def close(self) -> None:
        """Release the engine's hooks and buffers."""
        self._engine.destroy()


def _remove_module_hooks(engine: Any) -> None:
    """Take DeepSpeed's hooks off every module, and its dictionaries of parameters.

    They gather a module's parameters before each use and release them after it, and record the
    order of modules, which ranks compare in collectives that a rank which fails in a chunk would
    leave the others waiting in. `hold` has gathered everything, so they would only cost time: three
    times the host's work of a layer.
    """
    engine.optimizer.parameter_offload._remove_module_hooks()
    for module in engine.module.modules():
        module._parameters = dict(module._parameters)


def padded(values: torch.Tensor, size: int) -> torch.Tensor:
    """Return flat (K,) values, K <= size, followed by zeros: (size,)."""
    return torch.nn.functional.pad(values, (0, size - len(values)))
