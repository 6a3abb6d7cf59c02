"""Adapters to engines and clusters of others, each with an extra of its own."""
