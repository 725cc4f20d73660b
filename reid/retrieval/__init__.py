"""Retrieval: embeddings, index, search, metrics, re-ranking, camera and time."""
