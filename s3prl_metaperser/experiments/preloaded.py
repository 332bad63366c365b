"""What the server process that runs are forked from imports once: torch, s3prl with all its upstreams, the expert.

Imported in the order of :func:`s3prl_metaperser.run_downstream.main`; nothing of it touches a GPU.
"""

from importlib import import_module

from s3prl_metaperser.run_downstream import install_stand_ins, quieten

quieten()
install_stand_ins()
for _name in ("s3prl.hub", "s3prl.run_downstream", "s3prl_metaperser.expert", "s3prl_metaperser.preflight"):
    import_module(_name)
