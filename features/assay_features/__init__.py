"""Declared features, one engine for batch and stream, and the plug-ins that put them behind Feast."""
