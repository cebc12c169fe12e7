"""For training jobs: runs that save in the background and resume exactly, and sharded checkpoints."""
