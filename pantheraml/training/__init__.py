"""Training: defaults, guards and progress around TRL's trainers."""
