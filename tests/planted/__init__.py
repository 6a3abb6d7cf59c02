"""Planted bugs: a test suite is worth what it catches. `python -m tests.planted` replays them all."""
