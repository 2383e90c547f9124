"""What leaves: merged models, adapters, and the hub. Everything written is verified before it gets its name."""
