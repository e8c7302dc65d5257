"""Tells Gymnasium of the levels. Called by Gymnasium itself when it is imported where the project is installed; imports next to nothing."""

from __future__ import annotations

from pathlib import Path


def register_levels() -> None:
    """Registers reverie/NAME-v0 for every level that comes with the project. Twice is harmless."""
    from gymnasium.envs.registration import register, registry

    for path in sorted((Path(__file__).parent / "levels").glob("*.toml")):
        name = f"reverie/{path.stem}-v0"
        if name not in registry:
            gym = "envs.labyrinth.gym"
            register(
                name,
                entry_point=f"{gym}:LabyrinthEnv",
                vector_entry_point=f"{gym}:LabyrinthVectorEnv",
                kwargs={"level": path.stem},
            )
