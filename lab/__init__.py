"""The bench: run folders, checkpoints, dashboards, and one file per job."""
