"""The version of this package, which checkpoints write down."""

__version__ = "0.2.0"
