"""Train: one exact optimizer step after another, on any ZeRO stage and any number of ranks.

a run       trainer -> run_checkpoints, run_identity, metrics, stop, evaluations
a step      Objective (contrastive_step, token_step) -> Engine, Agreement (engine), layer_sweep
DeepSpeed   zero (the engine), ds_config, optim
on disk     checkpoints; export_run
"""
