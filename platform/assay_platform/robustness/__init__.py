"""Attacks that could happen, and what stands against them."""
