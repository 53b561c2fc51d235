"""Knowledge distillation for classifiers: timm teachers, the transformers Trainer, WTTM first."""

from . import models
from .config import DistillationConfig
from .hub import Publication, PublishingError, publish_student
from .networks import Preprocessing
from .student import create_student, save_student
from .teacher import Teacher
from .trainer import DistillationTrainer
from .version import __version__


__all__ = [
    "DistillationConfig",
    "DistillationTrainer",
    "Preprocessing",
    "Publication",
    "PublishingError",
    "Teacher",
    "__version__",
    "create_student",
    "models",
    "publish_student",
    "save_student",
]
