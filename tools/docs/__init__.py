"""The documentation's generated parts: references of configuration and commands."""
