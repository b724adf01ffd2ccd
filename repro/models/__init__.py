"""Captioning models and how they generate."""
