"""Fleets in silico: models, data sets, partitions and the demonstration."""
