"""What the server process that runs are forked from imports once: torch, s3prl with all its upstreams, the expert.

Imported in the order of :func:`s3prl_metaperser.run_downstream.main`; nothing of it touches a GPU.
"""

import gc
from importlib import import_module

from s3prl_metaperser.run_downstream import make_ready

make_ready()
for _name in (
    "s3prl.hub",
    "s3prl.run_downstream",
    "s3prl_metaperser.expert",
    "s3prl_metaperser.preflight",
    "s3prl_metaperser.experiments.launchers",
):
    import_module(_name)
# 400,000 objects that outlive every run: none looks through them for garbage, which would copy their pages too.
gc.freeze()
