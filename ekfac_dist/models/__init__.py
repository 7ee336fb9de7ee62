"""Hugging Face models: loading them, finding their MLP modules, capturing what passes through."""
