"""Support for several test rooms: images, registries that fail on demand, daemons, peers."""
