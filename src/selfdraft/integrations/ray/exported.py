"""Prometheus texts of several processes as one, each sample with the label of where it comes from."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client.core import Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families


class _Found:
    """Families that were read, as a collector."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def merged(texts: Iterable[tuple[str, str]]) -> str:
    """One text out of (replica, text) pairs; every sample has the label `replica`."""
    families: dict[str, Metric] = {}
    for replica, text in texts:
        for family in text_string_to_metric_families(text):
            whole = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            for sample in family.samples:
                labels = {**sample.labels, "replica": replica}
                whole.samples.append(sample._replace(labels=labels))
    return generate_latest(_Found(families.values())).decode()
