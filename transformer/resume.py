"""What may change in a config between a checkpoint and the run that resumes from it. Each field says it in its own type."""

from __future__ import annotations

import enum
from typing import Annotated, TypeVar

T = TypeVar("T")


class OnResume(enum.Enum):
    """What a run may do with a field whose value differs from its checkpoint's."""

    FREE = "free"
    """Resume: the field has no influence on what is computed, beyond rounding."""
    UPWARDS = "upwards"
    """Resume with a larger value; with a smaller one only if the user says so."""
    BY_CONTENT = "by content"
    """Resume: the field says where data is and how it is read, and the data itself is compared."""
    ASK = "ask"
    """Resume only if the user says so: the state still fits, and what follows is computed in another way."""
    NEVER = "never"
    """Refuse: this is another run."""


Free = Annotated[T, OnResume.FREE]
Upwards = Annotated[T, OnResume.UPWARDS]
ByContent = Annotated[T, OnResume.BY_CONTENT]
Ask = Annotated[T, OnResume.ASK]
Never = Annotated[T, OnResume.NEVER]
