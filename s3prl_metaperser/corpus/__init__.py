"""Labelled speech on disk: the annotation manifest, the readers that write it, and a synthetic corpus to try it on.

A reader (``iemocap``, ``crema_d``, ``table``) turns a corpus as its makers distribute it into one
:class:`~s3prl_metaperser.corpus.manifest.Corpus`; everything else in the project knows only that.
"""
