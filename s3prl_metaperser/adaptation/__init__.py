"""The inner loop: how a model's parameters move on a listener's support set, and how that is differentiated.

Nothing here knows of speech: an objective is any function from a flat dict of named parameters to a scalar.
"""
