"""A page on which one person listens to a few clips, names what they hear, and gets a model of their own."""
