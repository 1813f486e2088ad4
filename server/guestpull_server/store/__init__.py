"""What is on disk: meta_store.json, layers, bundles; locking and recovery."""
