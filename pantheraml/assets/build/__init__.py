"""How the demo's tokenizer, model and data were made; nothing in PantheraML imports it at run time."""
