"""Training system for few-shot text embedders (arXiv 2409.15700). Imports nothing: entries load only what they need."""

__version__ = "0.1.0"
