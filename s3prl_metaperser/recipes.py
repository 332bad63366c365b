"""Recipes: settings that belong together, named in one line of a config (``recipe: best``).

``paper`` is the paper's method as it is described. ``best`` is what adapts best to an unseen listener in our
measurements (docs/findings.md): a body that recognises what is expressed, trained on what the annotators' labels say is
in the recording, and a small naming, the only thing that the inner loop moves.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

RECIPES: dict[str, dict[str, Any]] = {
    "paper": {
        "model": {"pooling": "mean", "activation": "none", "dropout": 0.0, "naming": False, "class_balanced": True},
        "ssl": {"targets": "mean"},
        "meta": {"adapts": "all", "outer_loss": "cross_entropy", "query": "combined", "lslr": True},
    },
    "best": {
        "model": {
            "pooling": "mean_std_per_layer",
            "activation": "relu",
            "dropout": 0.7,
            "naming": True,
            "class_balanced": False,
        },
        "ssl": {"targets": "expressed"},
        "meta": {"adapts": "naming", "outer_loss": "cross_entropy_f1", "query": "disjoint", "lslr": True},
    },
}


def with_recipe(section: Mapping[str, Any]) -> dict[str, Any]:
    """Fill in what a config's recipe presets and the config itself does not say.

    Args:
        section: of the config, unchecked; an unknown recipe changes nothing and is left to the check.

    >>> with_recipe({"recipe": "best", "ssl": {"batch_size": 8}})["ssl"]
    {'targets': 'expressed', 'batch_size': 8}
    """
    recipe = section.get("recipe")
    filled = dict(section)
    for key, presets in RECIPES.get(recipe, {}).items() if isinstance(recipe, str) else ():
        given = section.get(key, {})
        if isinstance(given, Mapping):
            filled[key] = {**presets, **given}
    return filled
