"""Meta-PerSER for s3prl: few-shot, listener-personalised speech emotion recognition by meta-learning."""

__version__ = "0.1.0"
