"""One run: from settings to a trained, evaluated model and its files."""
