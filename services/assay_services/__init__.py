"""REST scoring that follows the registry."""
