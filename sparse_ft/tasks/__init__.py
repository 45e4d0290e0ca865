"""What a task is, how its files are read and divided, and its kinds."""
