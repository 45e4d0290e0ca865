"""Scores of a checkpoint, reports, tables and pictures."""
