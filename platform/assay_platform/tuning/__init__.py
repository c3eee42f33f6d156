"""Bayesian search over declared spaces on Ray Tune."""
