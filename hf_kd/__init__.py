"""Knowledge distillation for classifiers: timm teachers, the transformers Trainer, WTTM first."""

from . import models
from .config import DistillationConfig
from .hub import Publication, PublishingError, publish_student
from .networks import Preprocessing
from .student import create_student, save_student
from .teacher import Teacher
from .teacher_cache import TeacherCache
from .trainer import DistillationTrainer
from .version import __version__


__all__ = [
    "DistillationConfig",
    "DistillationTrainer",
    "Preprocessing",
    "Publication",
    "PublishingError",
    "Teacher",
    "TeacherCache",
    "__version__",
    "create_student",
    "models",
    "publish_student",
    "save_student",
]
