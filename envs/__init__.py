"""The world: environments behind one batched contract (see `envs.api`)."""
