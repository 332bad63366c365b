"""What must be installed beside s3prl for the exported folder, in this package's own ranges."""

from __future__ import annotations

import re
from collections.abc import Iterable
from importlib import metadata

from s3prl_metaperser.errors import MetaPerSERError
from s3prl_metaperser.s3prl_export.modules import third_party
from s3prl_metaperser.s3prl_link import find_s3prl

DISTRIBUTION = "s3prl-metaperser"
MODULES_OF = {"pyyaml": "yaml", "scikit-learn": "sklearn"}
"""The distributions whose module has another name."""
S3PRLS_OWN = ("run_downstream.py", "downstream/runner.py")
"""What every training runs of s3prl, which imports more than s3prl itself declares."""


def requirements(texts: Iterable[str]) -> list[str]:
    """Name what exported modules and s3prl's runner import, each with the range this package declares for it.

    Args:
        texts: of the exported modules.

    Returns:
        Lines of a requirements file, sorted; s3prl itself is none of them.

    Raises:
        MetaPerSERError: this package or s3prl is not installed.
    """
    try:
        declared = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        raise MetaPerSERError(
            f"{DISTRIBUTION} is not installed: pip install it, so that its ranges are known"
        ) from None
    package = find_s3prl()
    runner = [(package / name).read_text(encoding="utf-8") for name in S3PRLS_OWN]
    ranges = {_module(line): line for line in declared if "extra ==" not in line}
    wanted = third_party(texts) - {"s3prl"}
    if not wanted <= ranges.keys():
        raise ValueError(f"imported, but not declared: {', '.join(sorted(wanted - ranges.keys()))}")
    wanted |= third_party(runner) & ranges.keys() - {"s3prl"}
    return sorted((ranges[module] for module in wanted), key=str.lower)


def _module(requirement: str) -> str:
    name = re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0]
    return MODULES_OF.get(name.lower(), name)
