"""Writing directories whole or not at all, and reading and writing safetensors one tensor at a time."""
