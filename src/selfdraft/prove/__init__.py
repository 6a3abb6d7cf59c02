"""Is it equal? Proofs by comparison: drafted against plain decoding, against transformers, levels of this machine."""
