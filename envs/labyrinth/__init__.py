"""First-person levels: maps, physics, and a ray caster of our own. No OpenGL, no display."""
