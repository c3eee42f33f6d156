"""Bayesian search over declared spaces, in this process or on Ray."""
