"""Chat templates of the usual model families, and how a tokenizer gets one."""
