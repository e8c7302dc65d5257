"""Who acts: agents, their memories and the one loop (see `agents.api`)."""
