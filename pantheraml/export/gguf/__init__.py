"""GGUF files: what llama.cpp, Ollama and LM Studio load. ``convert`` is the entry; nothing here imports it for you."""
