"""From a person's files to batches."""
