"""Models of the world: encode, score, simulate, plan (see `generative.api`)."""
