"""Hugging Face folders and hub ids: configuration, safetensors checkpoints, tokenizers."""
