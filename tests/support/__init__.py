"""What several test rooms share: images built in a line, and registries that fail on demand."""
