"""Ranks, layouts and the DeepSpeed engine. Importing this package imports neither DeepSpeed nor a process group."""
