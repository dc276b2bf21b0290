"""GGUF files: the header, the block formats and their decoders, and what their metadata says in transformers' terms."""
