"""Train: one exact optimizer step after another, on any ZeRO stage and any number of ranks.

a run       trainer -> run_checkpoints, run_identity, metrics, evaluations
a step      Objective (contrastive_step, token_step) -> schedules -> Engine, Agreement (engine)
DeepSpeed   zero (the engine), ds_config
on disk     checkpoints; export_run
"""
