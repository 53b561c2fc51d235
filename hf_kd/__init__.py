"""Knowledge distillation for classifiers: timm teachers, the transformers Trainer, WTTM first."""

from .config import DistillationConfig
from .networks import Preprocessing
from .student import create_student, save_student
from .teacher import Teacher
from .trainer import DistillationTrainer


__version__ = "0.1.0"

__all__ = [
    "DistillationConfig",
    "DistillationTrainer",
    "Preprocessing",
    "Teacher",
    "create_student",
    "save_student",
]
