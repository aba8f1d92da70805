"""The whole configuration as frozen dataclasses, read strictly from YAML."""

from pipeline.config.data import (
    CandidatesConfig,
    DataConfig,
    DecontaminateConfig,
    EvaluationSetConfig,
    PrepareConfig,
    Role,
    SourceConfig,
    Template,
)
from pipeline.config.evaluation import (
    ChainConfig,
    EvaluateConfig,
    EvaluatedModel,
    ExportStep,
    OwnTask,
    Precision,
    ProbeConfig,
)
from pipeline.config.loading import (
    as_tree,
    build_config,
    dump_config,
    dump_yaml,
    expand_path,
    load_config,
    read_tree,
    read_yaml,
    require,
)
from pipeline.config.mining import (
    BM25,
    MAX_CANDIDATES,
    MAX_DEPTH,
    BandConfig,
    CorpusConfig,
    MarginConfig,
    MineConfig,
    RetrieverConfig,
    TeacherConfig,
    WindowConfig,
)
from pipeline.config.model import (
    POOLING_FLAGS,
    POOLINGS,
    Attention,
    Declared,
    LoraConfig,
    ModelConfig,
    Pooling,
    RopeScaling,
    StarterConfig,
    local_file,
    model_fix,
    pooling_mode,
    read_declared,
    require_model_path,
)
from pipeline.config.training import (
    CheckpointConfig,
    ChunkConfig,
    DistillationConfig,
    EvaluateEveryConfig,
    GuideConfig,
    LossConfig,
    MaskedDiffusionConfig,
    MntpConfig,
    NextTokenConfig,
    ObjectiveConfig,
    OptimizerConfig,
    TrainConfig,
)
