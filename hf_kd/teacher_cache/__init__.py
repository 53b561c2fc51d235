"""Teacher logits computed once and read from then on: no teacher in a later run, and the same losses."""

from .replay import TeacherCache


__all__ = ["TeacherCache"]
