"""The nine emotions, their order, and the ways in which corpora and people spell them."""

from __future__ import annotations

from s3prl_metaperser.errors import suggest

EMOTIONS: tuple[str, ...] = (
    "frustrated",
    "angry",
    "sad",
    "disgust",
    "excited",
    "fear",
    "neutral",
    "surprise",
    "happy",
)
"""The classes in the order of every vector, table and figure."""

OTHER = "other"
"""What a listener ticks when none of the nine fits. It is no class: it is dropped from an annotation."""

_VARIANTS: dict[str, tuple[str, ...]] = {
    "frustrated": ("frustration", "frustrated state"),
    "angry": ("anger", "angry state"),
    "sad": ("sadness", "sad state"),
    "disgust": ("disgusted",),
    "excited": ("excitement", "excited state"),
    "fear": ("fearful",),
    "neutral": ("neutral state", "neutrality"),
    "surprise": ("surprised",),
    "happy": ("happiness", "happy state", "joy"),
    OTHER: ("others",),
}

SPELLINGS: dict[str, str] = {
    spelling: emotion for emotion, variants in _VARIANTS.items() for spelling in (emotion, *variants)
}
"""Lower-case spelling to emotion (or :data:`OTHER`)."""


class UnknownEmotionError(ValueError):
    """A word that is no spelling of an emotion. The message ends in the nearest known words."""

    def __init__(self, word: str) -> None:
        nearest = suggest(word, SPELLINGS) if word else "expected one of: " + ", ".join(EMOTIONS)
        super().__init__(f"{word!r} is no emotion; {nearest}")


def parse_emotions(text: str) -> list[str]:
    """Read the emotions that a listener ticked, in any spelling.

    Args:
        text: names separated by semicolons, such as ``"Anger; Neutral state;"``. Case and outer blanks don't matter.

    Returns:
        The distinct emotions in the order of :data:`EMOTIONS`, with :data:`OTHER` last. Empty when nothing is ticked.

    Raises:
        UnknownEmotionError: a name is no spelling of an emotion.

    >>> parse_emotions("Neutral state; Anger;")
    ['angry', 'neutral']
    """
    found: set[str] = set()
    for part in text.split(";"):
        word = " ".join(part.lower().split())
        if not word:
            continue
        if word not in SPELLINGS:
            raise UnknownEmotionError(word)
        found.add(SPELLINGS[word])
    return [emotion for emotion in (*EMOTIONS, OTHER) if emotion in found]
