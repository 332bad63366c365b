"""The downstream as a folder of s3prl's own: written from this package's modules, for a clone without this package."""
