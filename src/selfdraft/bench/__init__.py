"""Measuring and proving: prompts from files, timed comparisons, exactness checks. An engine is handed in."""
