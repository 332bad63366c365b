"""The parts of ``run.py``, each a module with a function ``measure``."""
