"""Fields that configs used to have, and where what they decided is now."""

MOVED: dict[str, str] = {
    "loss.temperature": "objective.temperature",
    "loss.class_weights": "objective.class_weights",
}
"""Old path → new place. `*` stands for the index of an item of a list."""
