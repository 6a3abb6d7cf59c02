"""Searching by measurement: what drafting costs here, and the settings that pay. Each method has its own file."""
