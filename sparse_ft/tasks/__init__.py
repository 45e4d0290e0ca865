"""Tasks: their files, how the files are read and divided, and the kinds of tasks."""
