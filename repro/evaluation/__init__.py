"""From captions to numbers."""
