"""Pure training steps and what drives them."""
