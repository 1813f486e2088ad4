"""From an image config to an OCI runtime config."""
