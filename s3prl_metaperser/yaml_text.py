"""YAML that others wrote, read as plain values, with bounds on what a few lines of it can grow to.

PyYAML's safe loader makes no objects of other types, yet an alias may stand for a list of aliases, and so on: nine
lines expand to a billion values once they are merged or printed (https://en.wikipedia.org/wiki/Billion_laughs_attack).
So the text is walked through event by event first, which takes no memory, and what it would expand to is counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml

from s3prl_metaperser.errors import MetaPerSERError

MOST_CHARACTERS = 1_000_000
MOST_VALUES = 10_000
"""Of a config, aliases counted as what they stand for; the largest of ours has 70."""
DEEPEST = 32
LONGEST = 2_048
"""Characters of one value. Python does not print whole numbers of more than 4,300 digits."""
MERGE = "<<"
"""The key that merges other mappings into one."""


def read_yaml(text: str, source: str) -> Any:
    """Read one document of plain values.

    Args:
        text: the YAML.
        source: what it is called in errors, such as ``config.yaml``.

    Returns:
        Mappings, lists, text, numbers, dates, true, false or None.

    Raises:
        MetaPerSERError: when it is no YAML, asks for another type, gives a key twice, or is larger than any config;
            with the line, where there is one.
    """
    if len(text) > MOST_CHARACTERS:
        raise MetaPerSERError(f"{source}: {len(text):,} characters; expected a config, of {MOST_CHARACTERS:,} at most")
    try:
        for line, fault in _faults(text):
            raise MetaPerSERError(f"{source}:{line}: {fault}")
        return yaml.safe_load(text)
    except MetaPerSERError:
        raise
    except yaml.MarkedYAMLError as error:
        where = f"{source}:{error.problem_mark.line + 1}" if error.problem_mark else source
        raise MetaPerSERError(f"{where}: not valid YAML: {error.problem or error.context}") from None
    except Exception as error:
        # A value that is not of the type it looks like (0x, 2001-99-99, !!bool maybe) raises whatever making it raises.
        raise MetaPerSERError(f"{source}: not valid YAML: {type(error).__name__}: {error}") from None


@dataclass
class _Collection:
    """A list or mapping that is being read.

    Attributes:
        anchor: that aliases know it by.
        keys: of a mapping, so far; None for a list.
        parts: how many of it have been read, of a mapping keys and values.
        size: values in it so far, aliases counted as what they stand for.
    """

    anchor: str | None
    keys: set[str] | None
    parts: int = 0
    size: int = 1

    def has_key(self, text: str) -> bool:
        """Tell whether a text that comes next is a key, and one that was there before; merges may be several."""
        return self.keys is not None and self.parts % 2 == 0 and text in self.keys and text != MERGE

    def take(self, event: yaml.Event, size: int) -> None:
        """Count what was read."""
        if self.keys is not None and self.parts % 2 == 0 and isinstance(event, yaml.ScalarEvent):
            self.keys.add(event.value)
        self.parts += 1
        self.size += size


def _faults(text: str) -> Iterator[tuple[int, str]]:
    """Find what is too large, refers to itself or, a key, stands twice: in which line, and what."""
    sizes: dict[str, int] = {}
    around: list[_Collection] = []
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        anchor, size, line = None, 1, event.start_mark.line + 1 if event.start_mark else 1
        match event:
            case yaml.CollectionStartEvent():
                around.append(_Collection(event.anchor, set() if isinstance(event, yaml.MappingStartEvent) else None))
                if len(around) > DEEPEST:
                    yield line, f"more than {DEEPEST} levels of lists and mappings in each other"
                continue
            case yaml.CollectionEndEvent():
                ended = around.pop()
                anchor, size = ended.anchor, ended.size
            case yaml.ScalarEvent():
                anchor = event.anchor
                if len(event.value) > LONGEST:
                    yield line, f"a value of {len(event.value):,} characters; expected {LONGEST:,} at most"
                if around and around[-1].has_key(event.value):
                    yield line, f"the key {event.value!r:.80} stands twice in one mapping, of which YAML keeps the last"
            case yaml.AliasEvent():
                if event.anchor not in sizes:
                    yield line, f"*{event.anchor} stands for something that is not complete before it"
                    continue
                size = sizes[event.anchor]
            case _:
                continue
        if anchor is not None:
            sizes[anchor] = size
        if around:
            around[-1].take(event, size)
        if size > MOST_VALUES or (around and around[-1].size > MOST_VALUES):
            yield line, f"more than {MOST_VALUES:,} values, those that aliases stand for included"
