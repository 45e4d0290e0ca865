"""sparse-ft: one frozen backbone, one LoRA-sized expert per task."""

__version__ = "0.1.0"
