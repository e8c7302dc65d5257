"""Which keys of a keyboard stand for which actions, read from the actions' names."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

Chord = frozenset[str]
"""Keys that are held together, as `KeyboardEvent.code` names them; none for resting."""

_UP, _DOWN, _LEFT, _RIGHT, _FIRE = "ArrowUp", "ArrowDown", "ArrowLeft", "ArrowRight", "Space"
WORDS: dict[str, str | None] = {
    "NOOP": None,
    "STAY": None,
    "UP": _UP,
    "DOWN": _DOWN,
    "LEFT": _LEFT,
    "RIGHT": _RIGHT,
    "FIRE": _FIRE,
    "FORWARD": _UP,
    "BACKWARD": _DOWN,
    "TURN_LEFT": _LEFT,
    "TURN_RIGHT": _RIGHT,
    "MOVE_FORWARD": _UP,
    "MOVE_BACKWARD": _DOWN,
    "MOVE_LEFT": "KeyA",
    "MOVE_RIGHT": "KeyD",
    "BACK": _LEFT,
    "FORTH": _RIGHT,
    "CLIMB": _UP,
    "TAKE": _FIRE,
}
DIGITS = [f"Digit{digit}" for digit in (1, 2, 3, 4, 5, 6, 7, 8, 9, 0)]
_WORD = re.compile("|".join(sorted(WORDS, key=len, reverse=True)))


def chords(action_names: Sequence[str]) -> list[Chord | None]:
    """The keys of each action. What has no name that is known, or the keys of another, gets a digit by its place, as far as they reach.

    Names may be joined, as in UPRIGHTFIRE or FORWARD_TURN_LEFT. None: no key.
    """
    found: list[Chord | None] = []
    for index, name in enumerate(action_names):
        chord = _chord(name)
        if chord is None or chord in found:
            chord = frozenset({DIGITS[index]}) if index < len(DIGITS) else None
        found.append(chord)
    return found


def resting(known: Sequence[Chord | None]) -> int | None:
    """The action of no key, or None where each has its own: such a world waits for one."""
    return known.index(frozenset()) if frozenset() in known else None


def chosen(known: Sequence[Chord | None], held: Sequence[str]) -> int | None:
    """The action of the keys that are held, oldest first; None where they stand for none, or no key is held.

    Of several the one of the most keys, then the one whose last key is the latest: who holds left and adds right goes right.
    """
    best: tuple[tuple[int, int], int] | None = None
    for action, chord in enumerate(known):
        if chord and chord <= set(held):
            rank = len(chord), max(held.index(key) for key in chord)
            if best is None or rank > best[0]:
                best = rank, action
    return best[1] if best else None


def in_order(keys: Collection[str]) -> list[str]:
    """As a person reads them: up and down, left and right, letters and digits, and the space bar last."""
    return sorted(keys, key=lambda key: ([_UP, _DOWN, _LEFT, _RIGHT].index(key) if key.startswith("Arrow") else 4, key == _FIRE, key))


def all_keys(known: Collection[Chord | None]) -> list[str]:
    """Every key that stands in a chord."""
    return in_order({key for chord in known if chord for key in chord})


def words(name: str) -> str:
    """An action's name for people: `up right fire` for UPRIGHTFIRE."""
    found = _WORD.findall(name)
    whole = found and name in ("_".join(found), "".join(found))
    return (" ".join(found) if whole else name).replace("_", " ").lower()


def _chord(name: str) -> Chord | None:
    found = _WORD.findall(name)
    if not found or name not in ("_".join(found), "".join(found)):
        return None
    keys = [WORDS[word] for word in found]
    return frozenset(key for key in keys if key is not None)
