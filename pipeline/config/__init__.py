"""The whole configuration as frozen dataclasses, read strictly from YAML."""

from pipeline.config.border import (
    as_tree,
    build_config,
    dump_config,
    load_config,
)
from pipeline.config.data import (
    DataConfig,
    DecontaminateConfig,
    EvaluationSetConfig,
    PrepareConfig,
    SourceConfig,
)
from pipeline.config.declared import (
    POOLING_FLAGS,
    POOLINGS,
    Declared,
    Pooling,
    local_file,
    pooling_mode,
    read_declared,
)
from pipeline.config.evaluation import (
    EvaluateConfig,
    EvaluatedModel,
    OwnTask,
    Precision,
)
from pipeline.config.model import (
    Attention,
    LoraConfig,
    ModelConfig,
    RopeScaling,
    StarterConfig,
)
from pipeline.config.objective import (
    MaskedDiffusionConfig,
    MntpConfig,
    NextTokenConfig,
    ObjectiveConfig,
)
from pipeline.config.probe import (
    ProbeConfig,
)
from pipeline.config.submission import (
    ChainConfig,
    ExportStep,
)
from pipeline.config.text import (
    Template,
)
from pipeline.config.training import (
    CheckpointConfig,
    ChunkConfig,
    DistillationConfig,
    EvaluateEveryConfig,
    LossConfig,
    OptimizerConfig,
    TrainConfig,
)

__all__ = [
    "POOLINGS",
    "POOLING_FLAGS",
    "Attention",
    "ChainConfig",
    "CheckpointConfig",
    "ChunkConfig",
    "DataConfig",
    "Declared",
    "DecontaminateConfig",
    "DistillationConfig",
    "EvaluateConfig",
    "EvaluateEveryConfig",
    "EvaluatedModel",
    "EvaluationSetConfig",
    "ExportStep",
    "LoraConfig",
    "LossConfig",
    "MaskedDiffusionConfig",
    "MntpConfig",
    "ModelConfig",
    "NextTokenConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "OwnTask",
    "Pooling",
    "Precision",
    "PrepareConfig",
    "ProbeConfig",
    "RopeScaling",
    "SourceConfig",
    "StarterConfig",
    "Template",
    "TrainConfig",
    "as_tree",
    "build_config",
    "dump_config",
    "load_config",
    "local_file",
    "pooling_mode",
    "read_declared",
]
