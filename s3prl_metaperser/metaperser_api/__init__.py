"""Installed as ``metaperser``: one person's speech emotion recogniser in Python.

>>> import metaperser
>>> model = metaperser.load("result/meta_perser/dev-best.ckpt")  # doctest: +SKIP
>>> mine = model.adapt(["a.wav", "b.wav"], ["angry", "sad;frustrated"])  # doctest: +SKIP
>>> mine.predict(["c.wav"])[0].emotions  # doctest: +SKIP
('sad',)
"""

from s3prl_metaperser import __version__
from s3prl_metaperser.errors import MetaPerSERError
from s3prl_metaperser.personalize import Heard, Judgement, Recogniser, load

__all__ = ["Heard", "Judgement", "MetaPerSERError", "Recogniser", "__version__", "load"]
