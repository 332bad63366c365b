"""Installed as ``s3prl.downstream.metaperser``, the name by which s3prl's runner finds a downstream."""
