"""The second start of a checkpoint: its whole pass out of a file, without the modelling code of transformers."""
