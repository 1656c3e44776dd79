"""An expert's bytes on their way from the checkpoint to a slot: rows in pinned host memory, and copies."""
