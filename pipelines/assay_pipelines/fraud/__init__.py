"""Fraud: from a table of events to a registered, calibrated, explained model."""
