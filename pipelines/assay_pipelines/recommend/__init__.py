"""Recommendation: from a table of interactions to a registered graph model with an MoE ranker."""
