"""The only room that knows transformers: any stock decoder as a Target."""
