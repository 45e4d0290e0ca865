"""Requests, the ways of answering them, and the loaded model."""
