"""Training of integer models, their float twins, and float models: recipe, loop, resume, checkpoints."""

from mamba_int.training.checkpoint import Checkpoint, DataDescription, load_checkpoint, save_checkpoint
from mamba_int.training.config import TrainingConfig
from mamba_int.training.data_parallel import Ranks, joined
from mamba_int.training.evaluation import evaluate
from mamba_int.training.model_config import ModelConfig
from mamba_int.training.protocol import TrainableModel
from mamba_int.training.trainer import Progress, TrainingResult, train

__all__ = [
    "Checkpoint",
    "DataDescription",
    "ModelConfig",
    "Progress",
    "Ranks",
    "TrainableModel",
    "TrainingConfig",
    "TrainingResult",
    "evaluate",
    "joined",
    "load_checkpoint",
    "save_checkpoint",
    "train",
]
