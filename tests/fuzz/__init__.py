"""Damages files of every kind at random, and runs the command line on them."""
