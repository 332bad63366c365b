"""The listeners of a corpus at a glance: what each calls things, who agrees with whom, what a model makes of it."""
