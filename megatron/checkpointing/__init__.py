"""Checkpoints: a directory that is there whole or not at all, safetensors and JSON, no pickle anywhere."""
