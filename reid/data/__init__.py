"""Datasets: names, records, preparation, drawn people."""
