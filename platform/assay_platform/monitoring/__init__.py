"""Prometheus metrics of the scoring service."""
