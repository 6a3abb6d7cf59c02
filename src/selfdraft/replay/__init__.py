"""Recorded answers, decoded again without a model: what a drafter would have proposed and gained."""
