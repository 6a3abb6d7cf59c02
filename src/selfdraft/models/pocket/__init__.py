"""The pocket model: a small LLaMA inside the package, so that everything works on a fresh machine without a hub."""

from pathlib import Path

POCKET = Path(__file__).parent
